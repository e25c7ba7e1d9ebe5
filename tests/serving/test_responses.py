"""Responses API: OpenAI's own client gets the same answers as with chat; unsupported fields are named."""

from __future__ import annotations

from typing import Any

import pytest
from serving.conftest import Running, audio_part, spoken, user

from blsp.serving import responses

MODEL = "tiny"
SCHEMA = {"type": "json_schema", "name": "city", "schema": {"type": "object"}, "strict": True}
OPTIONS: dict[str, Any] = {"model": MODEL, "max_output_tokens": 12}


def by_chat(server: Running, *messages: dict[str, Any]) -> str:
    answer = server.client().chat.completions.create(model=MODEL, messages=list(messages), max_completion_tokens=12)
    return str(answer.choices[0].message.content)


def spoken_input(clip: bytes) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "input_text", "text": "Answer this."}, audio_part(clip)]}]


def test_the_answer_is_that_of_chat(server: Running) -> None:
    clip = spoken(1)
    client = server.client()
    system = {"role": "system", "content": "Be short."}
    written = client.responses.create(input="Hello", instructions="Be short.", **OPTIONS)
    assert written.output_text == by_chat(server, system, {"role": "user", "content": "Hello"})
    heard = client.responses.create(input=spoken_input(clip), **OPTIONS)
    assert heard.output_text == by_chat(server, user("Answer this.", clip))
    assert heard.usage.total_tokens == heard.usage.input_tokens + heard.usage.output_tokens
    assert heard.status == "incomplete" and heard.incomplete_details.reason == "max_output_tokens"


def test_an_answer_is_the_next_requests_input(server: Running) -> None:
    first = server.client().responses.create(input="Hello", **OPTIONS)
    items: list[Any] = [{"role": "user", "content": "Hello"}, *(item.to_dict() for item in first.output)]
    items.append({"type": "message", "role": "user", "content": "And then?"})
    second = server.client().responses.create(input=items, **OPTIONS)
    turns = [("user", "Hello"), ("assistant", first.output_text), ("user", "And then?")]
    assert second.output_text == by_chat(server, *({"role": role, "content": text} for role, text in turns))


def test_a_stream_is_the_same_answer_in_openais_events(server: Running) -> None:
    whole = server.client().responses.create(input="Hello", **OPTIONS)
    events = list(server.client().responses.create(input="Hello", stream=True, **OPTIONS))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    others = [event.type.removeprefix("response.") for event in events if not event.type.endswith("delta")]
    assert others[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert others[4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].response.output_text == whole.output_text


@pytest.mark.parametrize(
    "body, param, said",
    [
        ({}, "input", "is missing"),
        ({"input": 7}, "input", "list of messages"),
        ({"input": [7]}, "input[0]", "object"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].type", "'function_call'"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type",
            "input_image",
        ),
        ({"input": [{"role": "root", "content": "x"}], "instructions": "Be short."}, "input[0].role", "must be"),
        ({"input": "x" * 600_000, "instructions": "Be short."}, "input", "characters"),
        ({"input": "Hello", "instructions": ["x"]}, "instructions", "must be text"),
        ({"input": "Hello", "max_output_tokens": 0}, "max_output_tokens", "at least 1"),
        ({"input": "Hello", "temperature": 9}, "temperature", "at most 2"),
        ({"input": "Hello", "store": True}, "store", "not supported"),
        ({"input": "Hello", "previous_response_id": "resp_1"}, "previous_response_id", "not supported"),
        ({"input": "Hello", "max_output_tokens": True}, "max_output_tokens", "must be a whole number"),
        ({"input": "Hello", "store": 0}, "store", "not supported"),
        ({"input": "Hello", "text": {"format": {"type": "json_object"}}}, "text.format", "not supported"),
        ({"input": "Hello", "text": {"format": SCHEMA}}, "text.format", "not supported"),
        ({"input": "Hello", "text": {"format": {"type": "xml"}}}, "text.format.type", "must be"),
        ({"input": "Hello", "text": {"format": "json"}}, "text.format", "must be an object"),
        ({"input": "Hello", "text": "json"}, "text", "must be an object"),
        ({"input": "Hello", "text": {"verbosity": "low"}}, "text.verbosity", "not supported"),
        ({"input": "Hello", "response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"input": "Hello", "tools": [{"type": "web_search"}]}, "tools", "not supported"),
        ({"input": "Hello", "top_k": 3}, "top_k", "not supported"),
    ],
)
def test_what_is_not_taken_is_named_as_the_client_wrote_it(
    server: Running, body: dict[str, Any], param: str, said: str
) -> None:
    answer = server.http().post("/v1/responses", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and error["message"].startswith(f"{param}: ") and said in error["message"]
    assert error["code"]


def test_null_is_left_out(server: Running) -> None:
    body = dict.fromkeys(("instructions", "store", "stream", "tools", "temperature", "previous_response_id", "text"))
    assert server.http().post("/v1/responses", json={"input": "Hello", "max_output_tokens": 1, **body}).is_success
    assert server.http().post("/v1/responses", content='{"input": "Hello", "max_output_tokens": 1}').is_success


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("metadata", '{"a": NaN}'),
        ("metadata", '{"a": "\\ud800"}'),
        ("metadata", '{"a": 1}'),
        ("metadata", '["a"]'),
        ("text", '{"format": {"type": "text", "x": "\\ud800"}}'),
        ("instructions", '"\\ud800"'),
    ],
)
def test_what_the_answer_could_not_repeat_is_refused(server: Running, field: str, text: str) -> None:
    for stream in ("true", "false"):
        content = f'{{"input": "Hello", "max_output_tokens": 1, "stream": {stream}, "{field}": {text}}}'
        answer = server.http().post("/v1/responses", content=content)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["param"] == field and error["message"].startswith(f"{field}: ")


def test_of_a_plain_text_format_only_the_type_is_repeated(server: Running) -> None:
    body = {"input": "Hello", "max_output_tokens": 1, "metadata": {"a": "b"}}
    answer = server.http().post("/v1/responses", json={**body, "text": {"format": {"type": "text", "x": 7}}}).json()
    assert answer["text"] == {"format": {"type": "text"}} and answer["metadata"] == {"a": "b"}


def test_a_defect_is_openais_error_object_and_counted_once(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(responses, "_finished", fail)
    asked = {"input": "Hello", "max_output_tokens": 1}
    for body, status in ((asked, 500), (asked | {"stream": True}, 200)):
        before = counted(server)
        answer = server.http().post("/v1/responses", json=body)
        assert answer.status_code == status and "RuntimeError" in answer.text and "a defect" not in answer.text
        assert counted(server) == {**before, "500": before.get("500", 0) + 1}
        if status == 500:
            assert answer.json()["error"]["type"] == "server_error"


def counted(server: Running) -> dict[str, float]:
    """Requests to this route, by status."""
    lines = server.http().get("/metrics").text.splitlines()
    ours = [line for line in lines if line.startswith('blsp_requests_total{route="responses"')]
    return {line.split('status="')[1].split('"')[0]: float(line.split()[-1]) for line in ours}
