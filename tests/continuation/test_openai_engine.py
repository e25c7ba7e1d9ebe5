"""Any OpenAI-compatible URL, however it misbehaves: no row is lost, none is asked for ever."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import httpx
import pytest
from support.misbehaving_server import misbehaving_server
from support.step_one import products, read_header, read_rows
from transformers import AutoTokenizer

from blsp.continuation import openai_engine
from blsp.continuation.engines import Prompt
from blsp.continuation.openai_engine import EngineError, OpenAIEngine, user_message
from blsp.continuation.writer import write_continuations
from blsp.llm.decoding import Decoding
from blsp.llm.prompt import prompt_template, transcript_ids
from blsp.settings import ContinueSettings

Settings = Callable[..., ContinueSettings]
BROKEN = ["{", "[]", "null", '{"choices": []}', '{"choices": [{"message": {"content": 7}, "finish_reason": "stop"}]}']


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_engine, "FIRST_PAUSE", 0.01)


def prompts(count: int) -> list[list[Prompt]]:
    return [[Prompt(key, "Repeat:", "instruction-first", f"words {key}")] for key in range(count)]


def engine(url: str, **more: object) -> OpenAIEngine:
    return replace(OpenAIEngine(url, "tiny", Decoding(), timeout=4.0, in_flight=8), **more)  # type: ignore[arg-type]


def test_every_misdeed_is_survived_and_no_row_is_lost() -> None:
    misdeeds = ["429", "429 0", "500", "502", "503", "hang", "drop", *BROKEN, "429 nonsense", "529"]
    with misbehaving_server(misdeeds) as server:
        written = [written for batch in engine(server.url).write(prompts(40)) for written in batch]
    assert sorted(each.key for each in written) == list(range(40))
    assert all(each.text == f"You said: Repeat: words {each.key}" for each in written)
    assert len(server.asked) >= 40 + len(misdeeds)


def test_retry_after_is_honoured() -> None:
    with misbehaving_server(["429 1"]) as server:
        list(engine(server.url).write(prompts(1)))
    assert server.at[1] - server.at[0] >= 1.0


def test_a_long_retry_after_is_cut_to_two_minutes_and_a_date_is_left() -> None:
    def pause(**headers: str) -> str:
        reply = httpx.Response(429, headers={name.replace("_", "-"): value for name, value in headers.items()})
        openai_engine._set_pause(reply, attempt=3)
        return reply.headers["Retry-After"]

    in_a_minute = format_datetime(datetime.now(UTC) + timedelta(seconds=60))
    assert pause(Retry_After="2.5") == "2.5" and pause(Retry_After="7200") == "120"
    assert pause(Retry_After=in_a_minute) == in_a_minute and pause(Retry_After="soon") == "soon"
    assert 4 <= float(pause()) / openai_engine.FIRST_PAUSE <= 8


def test_a_server_that_sends_a_byte_now_and_then_is_not_waited_for() -> None:
    with misbehaving_server(["drip"]) as server:
        ((written,),) = engine(server.url, timeout=1.0).write(prompts(1))
    assert written.text == "You said: Repeat: words 0" and len(server.asked) == 2
    assert server.at[1] - server.at[0] < 4


def test_half_a_surrogate_pair_is_refused_and_not_the_end_of_the_job() -> None:
    broken = '{"choices": [{"message": {"content": "a \\ud800"}, "finish_reason": "stop"}]}'
    with misbehaving_server([broken]) as server:
        written = [answer for answers in engine(server.url, in_flight=1).write(prompts(2)) for answer in answers]
    assert [answer.refused is None for answer in written] == [False, True]


def test_requests_are_in_flight_together_and_no_more_than_allowed() -> None:
    with misbehaving_server([], pause=0.3) as server:
        assert len(list(engine(server.url, in_flight=16, timeout=60.0).write(prompts(48)))) == 48
    assert 8 <= server.most_together <= 16


def test_many_requests_share_no_large_pool() -> None:
    """httpx looks through a whole pool at each request: with one pool, 512 in flight were slower than 64."""
    with misbehaving_server([], pause=2.0) as server:
        answers = list(engine(server.url, in_flight=100, timeout=60.0).write(prompts(150)))
    assert len(answers) == 150 and 64 < server.most_together <= 100


def test_prompts_are_taken_as_requests_are_answered() -> None:
    taken = []

    def source():  # type: ignore[no-untyped-def]
        for batch in prompts(50):
            taken.append(batch)
            yield batch

    with misbehaving_server([]) as server:
        answers = engine(server.url, in_flight=4).write(source())
        next(answers)
        assert len(taken) <= 8
        answers.close()


@pytest.mark.parametrize("misdeed", ["500", "hang", "drop", "{", "429"])
def test_the_last_of_several_failures_is_told(misdeed: str) -> None:
    with misbehaving_server([misdeed] * 3) as server, pytest.raises(EngineError, match="in 3 attempts"):
        list(engine(server.url, attempts=3, timeout=0.3).write(prompts(1)))


@pytest.mark.parametrize("misdeed", ["400", "401", "404", "422"])
def test_a_refusal_is_not_repeated(misdeed: str) -> None:
    with misbehaving_server([misdeed]) as server:
        with pytest.raises(EngineError, match=f"failure {misdeed}"):
            list(engine(server.url).write(prompts(1)))
        assert len(server.asked) == 1


def test_a_server_that_is_not_there_is_told() -> None:
    with pytest.raises(EngineError, match="in 2 attempts"):
        list(engine("http://127.0.0.1:9/v1", attempts=2).write(prompts(1)))
    with pytest.raises(EngineError, match="not a web address"):
        list(engine("localhost/v1").write(prompts(1)))


def test_what_is_asked() -> None:
    with misbehaving_server([], extra={"finish_reason": "length"}) as server:
        body = {"return_token_ids": True, "top_p": None}
        asking = engine(server.url, body=body, api_key="secret", decoding=Decoding(max_new_tokens=7))
        ((written,),) = asking.write(prompts(1))
    (request,) = server.asked
    assert request["max_tokens"] == 7 and request["temperature"] == 0.0 and request["return_token_ids"] is True
    assert "top_p" not in request and server.keys == {"Bearer secret"}
    assert written.finish == "length" and written.ids is None
    assert "secret" not in repr(asking)


def test_the_words_are_those_of_the_local_route(stopping_llm: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stopping_llm)
    for order in ("speech-first", "instruction-first"):
        frame = prompt_template(tokenizer, "Please repeat:", order)  # type: ignore[arg-type]
        local = [*frame.prefix_ids, *transcript_ids(tokenizer, "hello world"), *frame.suffix_ids]
        message = {"role": "user", "content": user_message("Please repeat:", order, "hello world")}  # type: ignore[arg-type]
        remote = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(local) == remote


def test_step_one_behind_a_url(tmp_path: Path, settings: Settings) -> None:
    """Rows as ever, in input order; ids only where the server returns them."""
    with misbehaving_server(["500", "drop", "429"]) as server:
        write_continuations(settings(tmp_path / "out.jsonl", engine_url=server.url, behaviours="repeat"))
    rows = read_rows(tmp_path / "out.jsonl")
    assert len(rows) == 2 * 37 and rows[0]["id"] == "r0" and rows[-1]["id"] == "own"
    assert all("continuation_ids" not in row for row in rows if row["id"] != "silence")
    spoken = [row for row in rows if row["id"] != "silence"]
    for row in spoken:
        words = user_message(row["instruction"], row["order"], row["text"])
        assert row["continuation"] == f"You said: {words}"
    header = read_header(tmp_path / "out.jsonl")
    assert header["engine"]["name"] == "openai" and header["llm_sha256"] is None
    assert header["server"] == {"url": server.url}


def test_returned_token_ids_are_kept_without_the_end(tmp_path: Path, settings: Settings) -> None:
    with misbehaving_server([], extra={"token_ids": [50, 51, 2]}) as server:
        write_continuations(settings(tmp_path / "out.jsonl", engine_url=server.url, behaviours="repeat"))
    assert read_rows(tmp_path / "out.jsonl")[0]["continuation_ids"] == [50, 51]


def test_what_a_server_refuses_to_answer_is_left_out_with_the_reason(tmp_path: Path, settings: Settings) -> None:
    with misbehaving_server([], extra={"finish_reason": "content_filter"}) as server:
        write_continuations(settings(tmp_path / "out.jsonl", engine_url=server.url, behaviours="repeat"))
    assert [row["id"] for row in read_rows(tmp_path / "out.jsonl")] == ["silence"] * 2
    assert "content_filter" in Path(f"{tmp_path / 'out.jsonl'}.skipped.jsonl").read_text()


def test_a_job_goes_on_at_another_address_where_it_stopped(tmp_path: Path, settings: Settings) -> None:
    out, more = tmp_path / "out.jsonl", {"behaviours": "repeat", "retries": 0, "concurrency": 4}
    with misbehaving_server([], pause=0.01) as server:
        server.misdeeds = []
        server.answer = failing_after(server.answer, 20)  # type: ignore[method-assign]
        with pytest.raises(EngineError, match="Finished rows are kept"):
            write_continuations(settings(out, engine_url=server.url, **more))
        assert not out.exists()
    with misbehaving_server([]) as second:
        write_continuations(settings(out, engine_url=second.url, **more))
    assert len(second.asked) <= 42 - 20 + 4
    with misbehaving_server([]) as third:
        write_continuations(settings(tmp_path / "whole.jsonl", engine_url=third.url, **more))
    assert products(out)[""] == products(tmp_path / "whole.jsonl")[""]


def failing_after(answer: Callable[[dict], dict], count: int) -> Callable[[dict], dict]:
    """`answer` for the first `count` requests, then replies without choices."""
    left = [count]

    def failing(body: dict) -> dict:
        left[0] -= 1
        return answer(body) if left[0] >= 0 else {"error": json.dumps("gone")}

    return failing
