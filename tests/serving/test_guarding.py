"""Requests that the server refuses, and good requests after them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import socket
import threading
import time
from dataclasses import replace

import httpx
import numpy as np
import openai
import pytest
from serving.conftest import Running, audio_part, spoken, user, wav

from blsp.llm.decoding import Decoder
from blsp.serving import remote_audio
from blsp.serving import scheduler as scheduler_module
from blsp.serving.errors import ApiError
from blsp.serving.job import Failed, Job
from blsp.serving.scheduler import Limits, Scheduler
from blsp.serving.server import check_exposure, reserve
from blsp.serving.shared_recogniser import SharedRecogniser
from blsp.settings import ServeSettings


def chat(server: Running, body: object, **options: object) -> httpx.Response:
    content = json.dumps(body).encode()  # half characters are escaped, as a hostile client would
    headers = {"content-type": "application/json"}
    return server.http().post("/v1/chat/completions", content=content, headers=headers, **options)


BAD = {
    "no messages": {"messages": []},
    "not base64": {"messages": [{"role": "user", "content": [audio_part(b"")]}]},
    "not audio": {"messages": [user(b"not a sound file at all")]},
    "truncated": {"messages": [user(spoken()[:60])]},
    "empty": {"messages": [user("  ")]},
    "a path": {"messages": [{"role": "user", "content": [{"type": "audio_url", "audio_url": {"url": "/etc/passwd"}}]}]},
    "a file URL": {
        "messages": [{"role": "user", "content": [{"type": "audio_url", "audio_url": {"url": "file:///etc/passwd"}}]}]
    },
    "remote": {
        "messages": [
            {"role": "user", "content": [{"type": "audio_url", "audio_url": {"url": "https://example.org/a"}}]}
        ]
    },
    "an unknown part": {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    "an unknown role": {"messages": [{"role": "root", "content": "hello"}]},
    "an assistant who speaks": {"messages": [{"role": "assistant", "content": [audio_part(spoken())]}, user("hi")]},
    "the assistant's turn": {"messages": [{"role": "assistant", "content": "hello"}]},
    "temperature": {"messages": [user("hi")], "temperature": 7},
    "tokens": {"messages": [user("hi")], "max_tokens": 0},
    "stop": {"messages": [user("hi")], "stop": [""]},
    "a number": 7,
    "too long": {"messages": [user("hello " * 9000)]},
    "half a character": {"messages": [user("hello \ud800")]},
    "half a character in a plain message": {"messages": [{"role": "user", "content": "\udfff"}]},
    "half a character in a type": {"messages": [{"role": "user", "content": [{"type": "\ud800"}]}]},
    "half a character to stop at": {"messages": [user("hi")], "stop": "\ud800"},
    "a URL that is none": {
        "messages": [{"role": "user", "content": [{"type": "audio_url", "audio_url": {"url": "http://[x"}}]}]
    },
    "a port that is none": {
        "messages": [{"role": "user", "content": [{"type": "audio_url", "audio_url": {"url": "http://a:99999/"}}]}]
    },
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_get_openais_error_object(server: Running, case: str) -> None:
    answer = chat(server, BAD[case])
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]


def test_broken_json_and_unknown_routes(server: Running) -> None:
    http = server.http()
    assert (
        http.post("/v1/chat/completions", content=b"{", headers={"content-type": "application/json"}).status_code == 400
    )
    assert "error" in http.get("/v1/nothing").json()
    assert http.get("/../../etc/passwd").status_code == 404
    assert "error" in http.get("/v1/chat/completions").json()


def test_paths_that_nobody_offers_are_counted_together(server: Running) -> None:
    http = server.http()
    for number in range(50):
        http.get(f"/v1/{number}")
    counted = [line for line in http.get("/metrics").text.splitlines() if line.startswith("blsp_requests_total")]
    routes = {line.split('route="')[1].split('"')[0] for line in counted}
    assert routes <= {"chat", "responses", "transcriptions", "translations", "models", "other"}


def test_a_server_for_this_machine_answers_under_its_names_only(server: Running, server_with) -> None:
    port = server.url.rpartition(":")[2]
    for host, status in (("localhost", 200), (f"127.0.0.1:{port}", 200), (f"[::1]:{port}", 200), ("evil.example", 403),
                         (f"evil.example:{port}", 403), ("localhost.evil.example", 403)):  # fmt: skip
        assert server.http().get("/v1/models", headers={"host": host}).status_code == status, host
    with server_with(api_key=("secret",)) as known:  # behind a proxy the key does it
        headers = {"host": "speech.example", "authorization": "Bearer secret"}
        assert known.http().get("/v1/models", headers=headers).status_code == 200


def test_a_body_that_does_not_come_ends_at_the_deadline(server_with) -> None:
    with server_with(deadline=0.5) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as slow:
            slow.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                b"content-length: 100\r\n\r\n{"
            )
            answer = b"".join(iter(lambda: slow.recv(4000), b""))
    assert answer.startswith(b"HTTP/1.1 408") and b'"error"' in answer


def test_keys(server_with) -> None:
    with server_with(api_key=("secret",)) as server:
        assert server.http().get("/v1/models").status_code == 401
        assert server.http().get("/metrics").status_code == 401
        assert server.http().get("/").status_code == 200
        assert server.http().get("/health").status_code == 200
        with pytest.raises(openai.AuthenticationError):
            server.client("wrong").models.list()
        assert server.client("secret").models.list().data


def test_uploads_are_limited_before_and_while_they_come(server_with) -> None:
    with server_with(max_upload_mb=0.1) as server:
        big = {"messages": [user(spoken(seconds=5))]}
        assert chat(server, big).status_code == 413

        def undeclared():
            for _ in range(400):
                yield b" " * 1000

        answer = server.http().post("/v1/chat/completions", content=undeclared())
        assert answer.status_code == 413
        assert chat(server, {"messages": [user("hello")]}).status_code == 200


def test_a_client_that_sends_too_much_sees_why(server_with) -> None:
    body = b"x" * 5_000_000
    with server_with(max_upload_mb=1) as server, server.http() as http:
        for _ in range(20):  # closing over unread bytes would reset some of these
            assert http.post("/v1/chat/completions", content=body).json()["error"]["code"] == "too_large"
        chunks = (body[:100_000] for _ in range(50))
        assert http.post("/v1/chat/completions", content=chunks).json()["error"]["code"] == "too_large"


def test_json_of_very_many_entries_is_refused_unread(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading ten million of them would hold up everybody for seconds."""
    monkeypatch.setattr(json, "loads", lambda *_: pytest.fail("read"))
    for rest in (b'"metadata": [' + b"0," * 10_000_000 + b"0]", b'"logit_bias": {' + b'"1":1,' * 200_000 + b'"2":1}'):
        body = b'{"messages": [{"role": "user", "content": "hi"}], ' + rest + b"}"
        answer = httpx.post(f"{server.url}/v1/chat/completions", content=body, timeout=60)
        assert answer.status_code == 400 and b'"code": "too_many"' in answer.content


def test_a_decompression_bomb_ends_early(server_with) -> None:
    quiet = wav(np.zeros(16_000 * 120, dtype=np.float32), kind="FLAC")  # a few kilobytes
    with server_with(max_audio_seconds=10) as server:
        answer = chat(server, {"messages": [user(quiet)]})
        assert answer.status_code == 400 and "clips before" not in answer.text
        answer = chat(server, {"messages": [user(spoken(), spoken(seconds=9.5))]})
        assert answer.status_code == 400
        assert "the clips before it took 1.0 s of the 10 s of a request" in answer.json()["error"]["message"]


def test_a_full_queue_says_when_to_come_back(server_with) -> None:
    with server_with(queue=2, max_batch=1) as server:

        async def crowd() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
                body = {"messages": [user("hello")], "max_tokens": 64}
                return await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for _ in range(16)))

        answers = asyncio.run(crowd())
        statuses = sorted(answer.status_code for answer in answers)
        assert set(statuses) == {200, 429} and statuses.count(200) >= 2
        assert all(int(a.headers["retry-after"]) >= 1 for a in answers if a.status_code == 429)
        assert chat(server, {"messages": [user("hello")]}).status_code == 200


def test_a_deadline_ends_a_request(server_with, monkeypatch) -> None:
    with server_with(deadline=0.5) as server:
        step = Decoder.step
        monkeypatch.setattr(Decoder, "step", lambda decoder: time.sleep(0.1) or step(decoder))
        answer = chat(server, {"messages": [user("hello")]})  # 64 tokens: 6 s of writing
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "deadline_exceeded"


def test_a_deadline_holds_while_the_model_is_held_up(server_with, listener, monkeypatch) -> None:
    with server_with(deadline=0.5) as server:
        monkeypatch.setattr(listener, "embed_audio", lambda *args, **named: time.sleep(4) or [])
        began = time.monotonic()
        assert chat(server, {"messages": [user(spoken())]}).status_code == 504
        assert time.monotonic() - began < 3.5


def test_nobody_waits_in_the_queue_beyond_the_deadline(listener) -> None:
    reports: list[object] = []
    scheduler = Scheduler(listener, Limits(batch=1))
    message = {"role": "user", "parts": ["hello"]}
    decoding = replace(listener.decoding, max_new_tokens=64)
    first = Job([message], decoding, lambda report: None, deadline=time.monotonic() + 60)
    late = Job([message], decoding, reports.append, deadline=time.monotonic() - 1)
    scheduler.submit(first)
    scheduler._turn()
    scheduler.submit(late)
    scheduler._turn()
    assert first.key in scheduler._running, "the only seat is taken"
    assert isinstance(reports[0], Failed) and reports[0].error.status == 504


def test_the_queue_is_bounded_in_speech_too(listener) -> None:
    scheduler = Scheduler(listener, Limits(queue=2))
    for _ in range(2):  # a minute at most may wait, but one recording always
        clip = np.zeros(16_000 * 61, dtype=np.float32)
        job = Job([{"role": "user", "parts": [clip]}], listener.decoding, lambda report: None, deadline=math.inf)
        if not scheduler._waiting:
            scheduler.submit(job)
    with pytest.raises(ApiError) as refusal:
        scheduler.submit(job)
    assert refusal.value.status == 429 and refusal.value.retry_after


def test_long_recordings_are_heard_one_by_one_and_apart_from_short_ones(listener) -> None:
    scheduler = Scheduler(listener, Limits())
    for seconds in (10, 50, 200, 5):
        clip = np.zeros(16_000 * seconds, dtype=np.float32)
        scheduler.submit(
            Job([{"role": "user", "parts": [clip]}], listener.decoding, lambda report: None, deadline=math.inf)
        )
    heard = []
    for long in (False, False, True, True):
        jobs = scheduler.hearing.next(long)
        heard.append([round(job.seconds) for job in jobs])
        for job in jobs:
            job.hearing = True
    assert heard == [[10, 5], [], [50], [200]]


def test_a_client_that_leaves_frees_its_place(server: Running) -> None:
    with (
        server.http() as http,
        http.stream(
            "POST", "/v1/chat/completions", json={"messages": [user("hello")], "stream": True, "max_tokens": 64}
        ) as answer,
    ):
        next(answer.iter_lines())
    scheduler = server.app.state.scheduler
    end = time.monotonic() + 5
    while scheduler._running and time.monotonic() < end:
        time.sleep(0.01)
    assert not scheduler._running


def fetch(url: str, seconds: float = 20.0) -> bytes:
    return asyncio.run(remote_audio.fetch(url, most_bytes=10, end=time.monotonic() + seconds))


def test_private_addresses_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("127.0.0.1", "localhost", "10.0.0.1", "169.254.169.254", "[::1]", "0.0.0.0"):
        with pytest.raises(ApiError, match="public"):
            fetch(f"http://{host}/a.wav")
    for inside in ("::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "::127.0.0.1", "fec0::1", "ff02::1"):
        with pytest.raises(ApiError, match="public"):  # a private address in an IPv6 one's clothes
            fetch(f"http://[{inside}]/a.wav")
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, 80)) for each in ("93.184.216.34", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **named: found)
    with pytest.raises(ApiError, match="public"):  # one of its addresses is private: rebinding
        fetch("http://rebound.example/a.wav")


def test_a_file_that_only_drips_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def here(host: str, port: int) -> str:
        return "127.0.0.1"

    monkeypatch.setattr(remote_audio, "public_address", here)
    with socket.create_server(("127.0.0.1", 0)) as door:

        def drip() -> None:
            with contextlib.suppress(OSError):
                caller, _ = door.accept()
                for byte in b"HTTP/1.1 200 OK\r\n" * 20:
                    caller.send(bytes([byte]))
                    time.sleep(0.1)

        threading.Thread(target=drip, daemon=True).start()
        began = time.monotonic()
        with pytest.raises(ApiError, match="deadline"):
            url = f"http://drip.example:{door.getsockname()[1]}/a.wav"
            fetch(url, seconds=0.5)
        assert time.monotonic() - began < 5
    with pytest.raises(ApiError, match="deadline"):
        fetch("http://late.example/a.wav", seconds=0.0)


def test_a_language_that_the_recogniser_does_not_know_is_refused(server: Running) -> None:
    asked = SharedRecogniser(None, server.listener)

    class Strict:
        multilingual = True

        def supports_language(self, language: str) -> bool:
            return True

        def transcribe_clip(self, clip: np.ndarray, language: str) -> str:
            raise ValueError(f"{language!r} is not a valid language code")

    asked._loaded = Strict()  # type: ignore[assignment]
    with pytest.raises(ApiError, match="language 'english'") as refused:
        asyncio.run(asked.transcribe(np.zeros(16_000, dtype=np.float32), "english", 5.0))
    assert refused.value.status == 400


def test_beyond_this_machine_only_with_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BLSP_API_KEY", raising=False)
    with pytest.raises(SystemExit, match="BLSP_API_KEY"):
        check_exposure(ServeSettings(host="0.0.0.0"))
    check_exposure(ServeSettings(host="0.0.0.0", insecure=True))
    monkeypatch.setenv("BLSP_API_KEY", "secret")
    check_exposure(ServeSettings(host="0.0.0.0"))


def test_a_port_that_is_taken_is_said_before_anything_is_loaded() -> None:
    with reserve("127.0.0.1", 0) as first:
        first.listen()
        with pytest.raises(SystemExit, match="--port"):
            reserve("127.0.0.1", first.getsockname()[1])
    with pytest.raises(SystemExit, match="--host"):
        reserve("no.such.host.invalid", 8000)


def test_a_failing_model_is_reported_and_the_next_request_answered(server: Running, monkeypatch) -> None:
    def fail(*args: object, **named: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(server.listener, "embed_audio", fail)
        answer = chat(server, {"messages": [user(spoken())]})
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal_error"
    assert chat(server, {"messages": [user("hello")]}).status_code == 200


def test_a_request_that_breaks_the_layout_takes_no_other_with_it(server: Running, monkeypatch) -> None:
    lay_out = scheduler_module.lay_out

    def fail_on_poison(listener: object, messages: list) -> object:
        if "poison" in str(messages):
            raise RuntimeError("a defect")
        return lay_out(listener, messages)

    monkeypatch.setattr(scheduler_module, "lay_out", fail_on_poison)
    long = {"messages": [user("hello")], "max_tokens": 64, "stream": True}
    with server.http() as http, http.stream("POST", "/v1/chat/completions", json=long) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert chat(server, {"messages": [user("poison")]}).status_code == 500
        assert [line for line in lines if line][-1] == "data: [DONE]"


def test_the_recogniser_keeps_no_crowd_and_no_deadline_waits(server: Running, monkeypatch) -> None:
    asked = SharedRecogniser(None, server.listener)
    monkeypatch.setattr(asked, "_transcribe", lambda clip, language: time.sleep(0.3) or "heard")
    clip = np.zeros(16_000, dtype=np.float32)

    async def crowd() -> list[object]:
        return await asyncio.gather(*(asked.transcribe(clip, "en", 0.5) for _ in range(20)), return_exceptions=True)

    answers = asyncio.run(crowd())
    statuses = [each.status if isinstance(each, ApiError) else each for each in answers]
    assert statuses.count("heard") == 1 and statuses.count(429) == 11 and statuses.count(504) == 8
