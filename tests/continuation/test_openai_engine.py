"""Any OpenAI-compatible URL, with any failure: no row is lost, and no row is asked without end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from support.misbehaving_server import misbehaving_server
from support.step_one import products, read_header, read_rows
from transformers import AutoTokenizer

from blsp.continuation.engines import Prompt, Written
from blsp.continuation.openai_engine import OpenAIEngine, user_message
from blsp.continuation.writer import write_continuations
from blsp.data.jobs import JobError
from blsp.data.manifest import Utterance, write_manifest
from blsp.llm import servers
from blsp.llm.decoding import Decoding
from blsp.llm.prompt import prompt_template, transcript_ids
from blsp.llm.servers import ServerError, pause_before
from blsp.settings import ContinueSettings

Settings = Callable[..., ContinueSettings]
BROKEN = ["{", "[]", "null", '{"choices": []}', '{"choices": [{"message": {"content": 7}, "finish_reason": "stop"}]}']


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "FIRST_PAUSE", 0.01)


def prompts(count: int) -> list[list[Prompt]]:
    return [[Prompt(key, "Repeat:", "instruction-first", f"words {key}")] for key in range(count)]


def engine(*urls: str, **more: object) -> OpenAIEngine:
    return replace(OpenAIEngine(urls, "tiny", Decoding(), timeout=4.0, in_flight=8), **more)  # type: ignore[arg-type]


def all_written(engine: OpenAIEngine, count: int) -> list[Written]:
    return [written for batch in engine.write(prompts(count)) for written in batch]


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


def test_a_long_retry_after_is_cut_to_two_minutes_and_a_date_is_read() -> None:
    in_a_minute = format_datetime(datetime.now(UTC) + timedelta(seconds=60))
    assert pause_before(3, "2.5") == 2.5 and pause_before(3, "7200") == 120
    assert 55 < pause_before(3, in_a_minute) <= 60
    for nothing in (None, "soon", "", "-3"):
        assert 4 <= pause_before(3, nothing) / servers.FIRST_PAUSE <= 8


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


def test_hundreds_of_requests_are_in_flight_at_each_of_several_servers() -> None:
    with misbehaving_server([], pause=2.0) as one, misbehaving_server([], pause=2.0) as other:
        written = all_written(engine(one.url, other.url, in_flight=100, timeout=60.0), 250)
    assert len(written) == 250 and 64 < one.most_together <= 100 and 64 < other.most_together <= 100


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


@pytest.mark.parametrize("misdeed", ["500", "504", "hang", "drop", "{"])
def test_a_prompt_that_fails_each_time_is_refused_and_the_others_are_answered(misdeed: str) -> None:
    with misbehaving_server([misdeed] * 3) as server:
        written = all_written(engine(server.url, retries=2, timeout=0.5, in_flight=1), 3)
    assert [answer.refused is None for answer in written] == [False, True, True]
    assert "no answer in 3 attempts" in str(written[0].refused) and len(server.asked) == 5


@pytest.mark.parametrize("misdeed", ["400", "413", "422"])
def test_a_refusal_is_not_repeated(misdeed: str) -> None:
    with misbehaving_server([misdeed]) as server:
        written = all_written(engine(server.url, in_flight=1), 2)
    assert f"failure {misdeed}" in str(written[0].refused) and written[1].refused is None
    assert len(server.asked) == 2


@pytest.mark.parametrize("misdeed", ["401", "403", "404"])
def test_a_wrong_key_or_address_stops_the_job(misdeed: str) -> None:
    with misbehaving_server([misdeed]) as server:
        with pytest.raises(ServerError, match=f"failure {misdeed}"):
            all_written(engine(server.url), 1)
        assert len(server.asked) == 1


@pytest.mark.parametrize("misdeed", ["429", "502", "503"])
def test_a_full_or_absent_server_costs_no_prompt_its_retries(misdeed: str) -> None:
    with misbehaving_server([misdeed] * 6) as server:
        assert all(answer.refused is None for answer in all_written(engine(server.url, retries=0), 3))


def test_a_server_that_is_not_there_is_told() -> None:
    with pytest.raises(ServerError, match=r"no answer for 0\.\d minutes.*Connect"):
        all_written(engine("http://127.0.0.1:9/v1", retry_minutes=0.001), 1)
    with pytest.raises(ServerError, match="not a web address"):
        all_written(engine("localhost/v1"), 1)


def test_a_restart_is_waited_for() -> None:
    """The server goes in the middle, and comes back at the same address: each prompt is answered all the same."""
    with misbehaving_server([], pause=0.05) as server:
        port = int(server.url.split(":")[2].split("/")[0])
        answers = engine(server.url, in_flight=4, retries=1).write(prompts(40))
        written = [next(answers) for _ in range(8)]
    restarted = threading.Timer(1.0, lambda: stack.enter_context(misbehaving_server([], port=port)))
    with ExitStack() as stack:
        restarted.start()
        written += list(answers)
        restarted.join()
    assert sorted(answer.key for batch in written for answer in batch) == list(range(40))
    assert all(answer.refused is None for batch in written for answer in batch)


def test_the_prompts_of_a_server_that_dies_go_to_the_others() -> None:
    with misbehaving_server([], pause=0.05) as other:
        with misbehaving_server([], pause=0.05) as dying:
            answers = engine(dying.url, other.url, in_flight=4, retries=1).write(prompts(60))
            written = [next(answers) for _ in range(10)]
        written += list(answers)
    assert sorted(answer.key for batch in written for answer in batch) == list(range(60))
    assert all(answer.refused is None for batch in written for answer in batch)
    assert dying.asked and len(other.asked) >= 40


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
        write_continuations(settings(tmp_path / "out.jsonl", engine_url=(server.url,), behaviours="repeat"))
    rows = read_rows(tmp_path / "out.jsonl")
    assert len(rows) == 2 * 37 and rows[0]["id"] == "r0" and rows[-1]["id"] == "own"
    assert all("continuation_ids" not in row for row in rows if row["id"] != "silence")
    spoken = [row for row in rows if row["id"] != "silence"]
    for row in spoken:
        words = user_message(row["instruction"], row["order"], row["text"])
        assert row["continuation"] == f"You said: {words}"
    header = read_header(tmp_path / "out.jsonl")
    assert header["engine"]["name"] == "openai" and header["llm_sha256"] is None
    assert header["server"] == {"urls": [server.url]}


def test_returned_token_ids_are_kept_without_the_end(tmp_path: Path, settings: Settings) -> None:
    with misbehaving_server([], extra={"token_ids": [50, 51, 2]}) as server:
        write_continuations(settings(tmp_path / "out.jsonl", engine_url=(server.url,), behaviours="repeat"))
    assert read_rows(tmp_path / "out.jsonl")[0]["continuation_ids"] == [50, 51]


def test_what_a_server_refuses_to_answer_is_left_out_with_the_reason(tmp_path: Path, settings: Settings) -> None:
    out = tmp_path / "out.jsonl"
    with misbehaving_server([], extra={"finish_reason": "content_filter"}) as server:
        write_continuations(settings(out, engine_url=(server.url,), behaviours="repeat", max_failures=1.0))
    assert [row["id"] for row in read_rows(out)] == ["silence"] * 2
    assert "content_filter" in Path(f"{out}.skipped.jsonl").read_text()


def test_a_poisoned_prompt_is_left_out_by_name_and_the_job_ends(tmp_path: Path, settings: Settings) -> None:
    """One prompt is always refused, another always fails: two rows go to the skip list, all others are there."""
    out = tmp_path / "out.jsonl"
    with misbehaving_server([], pause=0.01) as server:
        server.poison = {"seven again again again": "400", "how many days again": "500"}
        write_continuations(settings(out, engine_url=(server.url,), behaviours="repeat", retries=1))
    skipped = {row["id"]: row["reason"] for row in read_rows(Path(f"{out}.skipped.jsonl"))}
    texts = {row["id"]: row["text"] for row in read_rows(tmp_path / "in.jsonl")}
    poisoned = {id for id, text in texts.items() if text in server.poison}
    assert poisoned and poisoned == {id for id, reason in skipped.items() if "failure" in reason}
    assert {row["id"] for row in read_rows(out)} == set(texts) - set(skipped)


def test_too_many_refusals_stop_the_job_and_are_asked_again(tmp_path: Path, settings: Settings) -> None:
    out = tmp_path / "out.jsonl"
    with misbehaving_server(["400"] * 11) as server:
        with pytest.raises(JobError, match=r"11 prompts cannot be answered.*row 'r\d+': .*failure 400"):
            write_continuations(settings(out, engine_url=(server.url,), behaviours="repeat", concurrency=1))
        assert not out.exists()
        write_continuations(settings(out, engine_url=(server.url,), behaviours="repeat", concurrency=1))
    assert "failure" not in Path(f"{out}.skipped.jsonl").read_text() and len(read_rows(out)) == 2 * 37


def test_a_job_without_any_answer_fails(tmp_path: Path, settings: Settings) -> None:
    manifest = tmp_path / "two.jsonl"
    write_manifest(manifest, [Utterance(id=f"r{i}", audio=f"{i}.wav", text="hello") for i in range(2)])
    with misbehaving_server(["400"] * 4) as server, pytest.raises(JobError, match="no prompt was answered"):
        write_continuations(settings(tmp_path / "out.jsonl", engine_url=(server.url,), manifest=str(manifest)))


def test_a_job_goes_on_at_another_address_where_it_stopped(tmp_path: Path, settings: Settings) -> None:
    out, more = tmp_path / "out.jsonl", {"behaviours": "repeat", "retry_minutes": 0, "concurrency": 4}
    with misbehaving_server([], pause=0.01) as server:
        server.misdeeds = ["answer"] * 20 + ["503"] * 100
        with pytest.raises(ServerError, match="Finished rows are kept"):
            write_continuations(settings(out, engine_url=(server.url,), **more))
        assert not out.exists()
    with misbehaving_server([]) as second:
        write_continuations(settings(out, engine_url=(second.url,), **more))
    assert len(second.asked) <= 42 - 20 + 4
    with misbehaving_server([]) as third:
        write_continuations(settings(tmp_path / "whole.jsonl", engine_url=(third.url,), **more))
    assert products(out)[""] == products(tmp_path / "whole.jsonl")[""]
