"""Fields and requests of clients of OpenAI's API, beyond a plain request."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

import httpx
import openai
import pytest
from serving.conftest import Running, audio_part, spoken, user

from blsp.serving import audio_input, scheduler
from blsp.serving.api import MAX_CLIPS, MAX_MESSAGES, MAX_PARTS, NEUTRAL, ChatRequest

HELLO = {"role": "user", "content": "hello"}


def post(server: Running, body: object, **options: Any) -> httpx.Response:
    return server.http().post("/v1/chat/completions", json=body, **options)


def refused(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error object of a refusal; it has a code and no words of the libraries inside."""
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error["code"] and error["type"] == "invalid_request_error"
    for word in ("function-", "tagged-union", "Input should", "valid dictionary", "discriminator", "<", "Value error"):
        assert word not in f"{error['message']} {error['param']}", error
    return error


def test_null_is_left_out_in_every_field(server: Running) -> None:
    names = [*ChatRequest.model_fields, *NEUTRAL, "user", "metadata", "store", "service_tier"]
    nulls = {name: None for name in names if name != "messages"}
    message = HELLO | {"name": None, "tool_calls": None, "refusal": None, "audio": None, "function_call": None}
    plain = post(server, {"messages": [HELLO], "max_tokens": 4}).json()["choices"]
    assert post(server, nulls | {"messages": [message], "max_tokens": 4}).json()["choices"] == plain
    for name in nulls:
        assert post(server, {"messages": [HELLO], "max_tokens": 4} | {name: None}).status_code == 200, name
    part = audio_part(spoken())
    part["input_audio"]["format"] = None
    options = {"include_usage": None, "include_obfuscation": None}
    body = {"messages": [{"role": "user", "content": [part | {"text": None}]}], "stream": True, "max_tokens": 2}
    assert post(server, body | {"stream_options": options}).text.endswith("data: [DONE]\n\n")
    assert refused(post(server, {"messages": None}))["param"] == "messages"
    assert refused(post(server, {"messages": [None]}))["param"] == "messages[0]"


def test_a_long_cache_key_is_refused(server: Running) -> None:
    assert post(server, {"messages": [HELLO], "max_tokens": 1, "prompt_cache_key": "k" * 512}).status_code == 200
    error = refused(post(server, {"messages": [HELLO], "prompt_cache_key": "k" * 513}))
    assert error["param"] == "prompt_cache_key" and "512" in error["message"]


def test_a_model_is_retrieved(server: Running) -> None:
    client = server.client()
    for model in client.models.list():
        assert client.models.retrieve(model.id) == model
    with pytest.raises(openai.NotFoundError, match="gpt-4o") as missing:
        client.models.retrieve("gpt-4o")
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    assert server.http().get("/v1/models/a/b").status_code == 404


STAINLESS = "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-os,x-stainless-package-version,"
STAINLESS += "x-stainless-retry-count,x-stainless-runtime,x-stainless-runtime-version,x-stainless-timeout"


def test_openais_javascript_client_passes_the_preflight_of_a_named_origin_only(server_with) -> None:
    asked = {"access-control-request-method": "POST", "access-control-request-headers": STAINLESS}
    with server_with(cors_origin=("https://app.example",), api_key=("secret",)) as server:
        for origin, status in (("https://app.example", 200), ("https://evil.example", 400)):
            answer = server.http().options("/v1/chat/completions", headers=asked | {"origin": origin})
            assert answer.status_code == status
            allowed = answer.headers.get("access-control-allow-origin")
            assert allowed == ("https://app.example" if status == 200 else None)
        answer = server.http().options("/v1/chat/completions", headers=asked | {"origin": "https://app.example"})
        assert set(STAINLESS.split(",")) <= set(answer.headers["access-control-allow-headers"].split(","))


def test_health_for_probes(server: Running) -> None:
    for path in ("/health", "/health/live", "/health/ready"):
        assert server.http().get(path).json() == {"status": "ok", "model": "tiny"}
        head = server.http().head(path)
        assert head.status_code == 200 and head.content == b""


def test_a_server_that_warms_up_lives_and_is_not_ready(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    health = next(route for route in server.app.routes if getattr(route, "path", "") == "/health")
    monkeypatch.setattr(health.endpoint.__self__, "ready", False)
    statuses = [server.http().get(path).status_code for path in ("/health/live", "/health/ready", "/health")]
    assert statuses == [200, 503, 503]


@pytest.mark.parametrize(
    ("path", "advice"),
    [
        ("/v1/audio/speech", "text-to-speech"),
        ("/v1/realtime", "stream: true"),
        ("/v1/realtime/sessions", "stream: true"),
        ("/v1/responses/resp_1", "the whole conversation"),
        ("/v1/completions", "/v1/chat/completions"),
        ("/v1/embeddings", "embedding"),
    ],
)
def test_routes_that_are_not_offered_say_what_to_use(server: Running, path: str, advice: str) -> None:
    for method in ("POST", "GET"):
        error = refused(server.http().request(method, path, json={} if method == "POST" else None), 404)
        assert error["code"] == "not_offered" and path in error["message"] and advice in error["message"]


def test_openais_client_is_told_that_speech_is_not_made(server: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="text-to-speech"):
        server.client().audio.speech.create(model="tts-1", voice="alloy", input="hello")


def test_unknown_routes_are_not_wrong_methods(server: Running) -> None:
    long = "/" + "a" * 5000
    for path in ("/v1/nothing", "/nothing", "/v1", "/chat/completions", "/v1/chat/completions/", "/%00", long):
        for method in ("GET", "POST", "DELETE", "PUT"):
            answer = server.http().request(method, path)
            assert refused(answer, 404)["code"] == "unknown_url", (method, path)
    for path in ("/chat/completions", "/v1/v1/chat/completions"):
        message = refused(server.http().post(path, json={}), 404)["message"]
        assert message.endswith("it is /v1/chat/completions, so the client's base URL ends in /v1")
    message = refused(server.http().post("/v1/chat/completions/", json={}), 404)["message"]
    assert message.endswith("it is /v1/chat/completions, without the slash at its end")
    answer = server.http().get("/v1/chat/completions")
    assert refused(answer, 405)["message"].endswith("takes POST, not GET") and answer.headers["allow"] == "POST"
    assert server.http().post("/v1/models").headers["allow"] == "GET"
    assert refused(server.http().post("/app.js"), 405) and server.http().head("/app.js").status_code == 200


def test_base64_as_people_send_it() -> None:
    data = bytes(range(256)) * 3 + b"\xfb\xff\xfe\xff"
    plain = base64.b64encode(data).decode()
    url_safe = base64.urlsafe_b64encode(data).decode()
    lines = base64.encodebytes(data).decode()
    assert "\n" in lines and set(url_safe) - set(plain)
    for text in (plain, plain + "\n", plain.rstrip("="), lines, lines.replace("\n", "\r\n"), url_safe, f" {plain} "):
        for head in ("", "data:audio/wav;base64,", "data:;base64,", "data:audio/wav;BASE64,", "DATA:a/b;base64,"):
            assert audio_input.from_base64(head + text) == data, head
            if head:
                assert audio_input.from_data_uri(head + text) == data, head
    for text in ("a", "ab=c", "ab$c", "é"):
        with pytest.raises(audio_input.ApiError, match="base64"):
            audio_input.from_base64(text)


def test_json_needs_no_content_type_but_web_sites_do(server: Running) -> None:
    content = json.dumps({"messages": [HELLO], "max_tokens": 2}).encode()
    for kind in (None, "application/x-www-form-urlencoded", "text/plain"):  # the second is curl's
        headers = {"content-type": kind} if kind else {}
        assert server.http().post("/v1/chat/completions", content=content, headers=headers).status_code == 200, kind
    # a browser sends text/plain to any host without asking first, so a web site must name JSON (and pass CORS)
    headers = {"origin": server.url, "content-type": "text/plain"}
    error = refused(server.http().post("/v1/chat/completions", content=content, headers=headers))
    assert "content-type: application/json" in error["message"]
    error = refused(server.http().post("/v1/chat/completions", content=b"{"))
    assert error["code"] == "invalid_json" and error["param"] is None
    assert "object" in refused(server.http().post("/v1/chat/completions", content=b"7"))["message"]


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
WRONG: dict[str, tuple[dict[str, Any], str, str]] = {  # messages before the last, what is named, param
    "no content": ({"role": "assistant", "content": None}, "needs its text", "messages[0].content"),
    "content left out": ({"role": "assistant"}, "needs its text", "messages[0].content"),
    "tool calls": (
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        "tool_calls",
        "messages[0].tool_calls",
    ),
    "tool calls and text": (
        {"role": "assistant", "content": "x", "tool_calls": [CALL]},
        "tool_calls",
        "messages[0].tool_calls",
    ),
    "a call": (
        {"role": "assistant", "function_call": {"name": "f", "arguments": ""}},
        "function_call",
        "messages[0].function_call",
    ),
    "an answer as audio": ({"role": "assistant", "audio": {"id": "a"}}, "audio", "messages[0].audio"),
    "a tool": ({"role": "tool", "content": "x", "tool_call_id": "c"}, "'tool'", "messages[0].role"),
    "a role": ({"role": "root", "content": "x"}, "'user'", "messages[0].role"),
    "a user without content": ({"role": "user", "content": None}, "missing", "messages[0].content"),
    "a number": ({"role": "user", "content": 7}, "text or a list", "messages[0].content"),
    "an object": ({"role": "user", "content": {"type": "text"}}, "text or a list", "messages[0].content"),
}
PARTS: dict[str, tuple[Any, str, str]] = {
    "image": ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}, "image_url", ".type"),
    "file": ({"type": "file", "file": {"file_id": "f"}}, "'file'", ".type"),
    "refusal": ({"type": "refusal", "refusal": "no"}, "refusal", ".type"),
    "no type": ({"text": "x"}, "missing", ".type"),
    "a type that is a list": ({"type": ["text"]}, "not supported", ".type"),
    "a text": ("hello", "object", ""),
    "no text": ({"type": "text"}, "missing", ".text"),
    "text that is none": ({"type": "text", "text": 7}, "must be text", ".text"),
    "no audio": ({"type": "input_audio"}, "missing", ".input_audio"),
    "no data": ({"type": "input_audio", "input_audio": {"format": "wav"}}, "missing", ".input_audio.data"),
    "a URL as text": ({"type": "audio_url", "audio_url": "https://a"}, "object", ".audio_url"),
}


@pytest.mark.parametrize("case", WRONG)
def test_messages_that_are_not_taken_are_named(server: Running, case: str) -> None:
    message, named, param = WRONG[case]
    error = refused(post(server, {"messages": [message, HELLO]}))
    assert error["param"] == param and named in error["message"], error


@pytest.mark.parametrize("case", PARTS)
def test_parts_that_are_not_taken_are_named(server: Running, case: str) -> None:
    part, named, place = PARTS[case]
    content = [{"type": "text", "text": "What?"}, part]
    error = refused(post(server, {"messages": [{"role": "user", "content": content}]}))
    assert error["param"] == f"messages[0].content[1]{place}" and named in error["message"], error


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("stream", "perhaps", "true or false"),
        ("temperature", "warm", "number"),
        ("temperature", 7, "at most 2"),
        ("top_p", 0, "above 0"),
        ("max_tokens", 0, "at least 1"),
        ("max_tokens", 1.5, "whole number"),
        ("seed", 2**70, "below"),
        ("stop", ["a"] * 5, "four"),
        ("stop", 7, "text or a list"),
        ("stop", {}, "text or a list"),
        ("stream_options", 7, "object"),
        ("messages", [], "at least 1"),
        ("messages", "hello", "list"),
        ("model", 7, "text"),
    ],
)
def test_values_that_are_wrong_are_named(server: Running, field: str, value: Any, said: str) -> None:
    error = refused(post(server, {"messages": [HELLO], field: value}))
    assert error["param"] == field and error["message"].startswith(field) and said in error["message"], error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("n", 0),
        ("logprobs", True),
        ("top_logprobs", 3),
        ("logit_bias", {"7": 1}),
        ("frequency_penalty", -0.5),
        ("presence_penalty", 0.5),
        ("repetition_penalty", 1.1),
        ("top_k", 40),
        ("min_p", 0.05),
        ("ignore_eos", True),
        ("stop_token_ids", [2]),
        ("tool_choice", "required"),
        ("function_call", {"name": "f"}),
        ("response_format", {"type": "json_schema"}),
        ("audio", {"voice": "alloy", "format": "wav"}),
        ("reasoning_effort", "high"),
    ],
)
def test_fields_that_would_change_the_answer_are_never_ignored(server: Running, field: str, value: Any) -> None:
    error = refused(post(server, {"messages": [HELLO], field: value}))
    assert error["param"] == field and field in error["message"] and error["code"] == "unsupported_parameter"
    for neutral in NEUTRAL[field]:
        assert post(server, {"messages": [HELLO], "max_tokens": 1, field: neutral}).status_code == 200


@pytest.mark.parametrize("route", ["transcriptions", "translations"])
def test_fields_of_uploads_are_never_ignored(server: Running, route: str) -> None:
    files = {"file": ("a.wav", spoken())}
    for field, value in (
        ("timestamp_granularities[]", "word"),  # without verbose_json
        ("include[]", "logprobs"),
        ("response_format", "diarized_json"),
        ("prompt", "Ottawa, Toronto"),
        ("chunking_strategy", '{"type": "server_vad"}'),
    ):
        error = refused(server.http().post(f"/v1/audio/{route}", files=files, data={field: value}))
        assert error["param"] == field.removesuffix("[]") and error["message"].startswith(error["param"])
    error = refused(server.http().post(f"/v1/audio/{route}", files=files, data={"temperature": "7"}))
    assert error["param"] == "temperature" and "at most 2" in error["message"]
    error = refused(server.http().post(f"/v1/audio/{route}", data={"model": "tiny"}))
    assert error["param"] == "file" and error["code"] == "missing_required_parameter"
    assert server.http().post(f"/v1/audio/{route}", files=files, data={"include[]": ""}).status_code == 200


def test_a_megabyte_of_text_is_refused_before_it_is_tokenised(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    laid_out: list[object] = []
    monkeypatch.setattr(scheduler, "lay_out", lambda *args: laid_out.append(args))
    with server.http() as http:
        http.get("/health")
        seconds = []
        for text in ("hello " * 170_000, "x" * 1_000_000, [{"type": "text", "text": "hello " * 1700}] * 100):
            content = json.dumps({"messages": [{"role": "user", "content": text}]}).encode()
            for _ in range(3):
                began = time.perf_counter()
                answer = http.post("/v1/chat/completions", content=content)
                seconds.append(time.perf_counter() - began)
                assert refused(answer)["code"] == "context_length_exceeded"
    assert not laid_out
    assert min(seconds) < 0.05, seconds  # the best of nine: other work on the machine is not the server's


def test_messages_parts_and_clips_are_bounded(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[object] = []
    monkeypatch.setattr(audio_input, "decode", lambda *args: decoded.append(args))
    clip = audio_part(spoken(seconds=0.01))
    crowds = {
        "messages": [HELLO] * (MAX_MESSAGES + 1),
        "parts": [user(*["a"] * (MAX_PARTS + 1))],
        "clips": [{"role": "user", "content": [clip] * (MAX_CLIPS + 1)}],
        "clips in": [{"role": "user", "content": [clip]}] * (MAX_CLIPS + 1),
        "parts in": [user("a", "b")] * (MAX_PARTS // 2 + 1),
    }
    for named, messages in crowds.items():
        began = time.perf_counter()
        error = refused(post(server, {"messages": messages}))
        assert named in error["message"] and error["param"] == "messages" and error["code"] == "too_many"
        assert time.perf_counter() - began < 1
    assert not decoded
