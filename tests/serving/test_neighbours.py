"""No client waits because of another one's requests."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from serving.conftest import Running, spoken, user, wav
from support.tiny_models import speech_like

from blsp.inference import conversation
from blsp.inference.listener import Listener
from blsp.llm import decoding, prompt
from blsp.llm.decoding import Decoding
from blsp.model import grounded, speech_encoder
from blsp.serving import scheduler as scheduler_module
from blsp.serving.errors import ApiError
from blsp.serving.fair_queue import FairQueue
from blsp.serving.job import Done, Failed, Job, Report
from blsp.serving.scheduler import LONGEST_PIECE, PIECE_SECONDS, SHORTEST_PIECE, Limits, Scheduler
from blsp.settings import ServeSettings, SettingsError

MEGABYTE = "hello " * 170_000
TINY_CLIP = wav(np.zeros(160, dtype=np.float32))  # 10 ms
ONE_SAMPLE = wav(np.zeros(1, dtype=np.float32))


def in_turns(count: int, *parts: str | bytes) -> list[dict[str, Any]]:
    """`count` messages of user and assistant in turn; the user's hold `parts`."""
    return [user(*parts) if number % 2 == 0 else {"role": "assistant", "content": "Yes."} for number in range(count)]


CROWDS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "1 MB of text": ([user(MEGABYTE)], "context_length_exceeded"),
    "3 MB of text": ([user(MEGABYTE * 3)], "context_length_exceeded"),
    "1 MB of text in a system message": (
        [{"role": "system", "content": MEGABYTE}, user("hi")],
        "context_length_exceeded",
    ),
    "5,000 parts of text": ([user(*["hello"] * 5000)], "too_many"),
    "5,000 clips of 10 ms": ([user(*[TINY_CLIP] * 5000)], "too_many"),
    "20,000 clips of one sample": ([user(*[ONE_SAMPLE] * 20_000)], "too_many"),
    "511 turns with clips": (in_turns(511, TINY_CLIP), "too_many"),
    "5,001 turns": (in_turns(5001, "hello"), "too_many"),
}


@pytest.mark.parametrize("case", CROWDS)
def test_a_crowd_is_refused_before_anything_is_tokenised_or_decoded(
    server: Running, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages, code = CROWDS[case]
    for module in (conversation, prompt):  # neither is reached
        monkeypatch.setattr(module, "render", lambda *_: pytest.fail("laid out"))
    answer = server.http().post("/v1/chat/completions", json={"messages": messages})
    error = answer.json()["error"]
    assert answer.status_code == 400 and (error["param"], error["code"]) == ("messages", code)
    assert len(error["message"]) < 200


def test_as_much_as_is_taken_is_answered(server: Running) -> None:
    for messages in ([user(*["hello"] * 512)], [user(*[ONE_SAMPLE] * 128)], [user(*[TINY_CLIP] * 128, "hello")],
                     in_turns(255, spoken(seconds=0.02))):  # fmt: skip
        answer = server.http().post("/v1/chat/completions", json={"messages": messages, "max_tokens": 2})
        assert answer.status_code == 200, answer.text


def test_a_text_of_too_many_tokens_is_not_embedded(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "embed", lambda *_: pytest.fail("embedded"))
    text = "\N{HEADPHONE}" * 16_000  # below the bound on characters, far above the context
    answer = server.http().post("/v1/chat/completions", json={"messages": [user(text)]})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"


# --- the queue ------------------------------------------------------------------------------------------------


def job_of(client: str, *parts: Any, tokens: int = 3, report: Any = None, seconds: float = math.inf) -> Job:
    """A job that answers with `tokens` tokens, and its reports in a list of its own."""
    message = {"role": "user", "parts": list(parts or ("hello",))}
    reports: list[Report] = []
    deadline = time.monotonic() + seconds
    job = Job([message], Decoding(max_new_tokens=tokens), report or reports.append, deadline=deadline, client=client)
    job.seen = reports  # type: ignore[attr-defined]
    return job


def test_clients_take_turns() -> None:
    queue: FairQueue[Job] = FairQueue(64)
    jobs = [job_of(client) for client in "aaaabc"]
    for job in jobs:
        queue.add(job)
    served = []
    while len(queue):
        job = next(iter(queue))
        queue.take(job)
        served.append(job)
    assert [job.client for job in served] == list("abcaaa")
    assert [job for job in served if job.client == "a"] == jobs[:4], "of one client, in the order of arrival"


def test_a_short_request_waits_for_two_others_of_a_client_that_queues_60(listener: Listener) -> None:
    scheduler = Scheduler(listener, Limits(batch=1))
    ended: list[str] = []

    def note(client: str) -> Any:
        return lambda report: ended.append(client) if isinstance(report, Done | Failed) else None

    for _ in range(60):
        scheduler.submit(job_of("many", report=note("many")))
    scheduler._turn()  # the first one runs
    scheduler.submit(job_of("one", report=note("one")))
    while "one" not in ended:
        scheduler._turn()
    assert len(ended) <= 3, ended


def test_a_full_queue_is_shared_by_clients(listener: Listener) -> None:
    scheduler = Scheduler(listener, Limits(queue=4))
    many = [job_of("many") for _ in range(4)]
    for job in many:
        scheduler.submit(job)
    with pytest.raises(ApiError, match="too many") as refused:
        scheduler.submit(job_of("many"))
    assert refused.value.status == 429 and refused.value.retry_after
    for _ in range(2):  # the newest ones of the other client give way, until both hold half
        scheduler.submit(job_of("one"))
    with pytest.raises(ApiError, match="too many"):
        scheduler.submit(job_of("one"))
    assert [bool(job.seen) for job in many] == [False, False, True, True]  # type: ignore[attr-defined]
    (report,) = many[3].seen  # type: ignore[attr-defined]
    assert isinstance(report, Failed) and report.error.code == "queue_full"
    with pytest.raises(ApiError, match="too many"):
        scheduler.check_room("one")
    scheduler.check_room("another")


def test_speech_counts_in_a_clients_share_of_the_queue(listener: Listener) -> None:
    scheduler = Scheduler(listener, Limits(queue=4))
    scheduler.submit(job_of("long", np.zeros(16_000 * 110, dtype=np.float32)))
    scheduler.submit(job_of("one", np.zeros(16_000 * 20, dtype=np.float32)))
    assert [job.client for job in scheduler._waiting] == ["one"]


# --- long recordings and long prompts ---------------------------------------------------------------------------


@pytest.fixture
def held_up(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Recordings of more than 30 s are not heard before this event is set."""
    go_on, embed_audio = threading.Event(), listener.embed_audio

    def wait_for_long_ones(audios: Sequence[Any], **options: Any) -> Any:
        if any(len(audio) > 30 * 16_000 for audio in audios):
            assert go_on.wait(60)
        return embed_audio(audios, **options)

    monkeypatch.setattr(listener, "embed_audio", wait_for_long_ones)
    yield go_on
    go_on.set()


def patiently(condition: Callable[[], Any]) -> bool:
    """Whether the condition comes true within a minute."""
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(condition())


def ending(job: Job) -> Report | None:
    """The last report of a job that has ended."""
    seen: list[Report] = job.seen  # type: ignore[attr-defined]
    return seen[-1] if seen and isinstance(seen[-1], Done | Failed) else None


def test_a_long_recording_holds_up_nobody_and_its_deadline_is_its_own(
    listener: Listener, held_up: threading.Event
) -> None:
    scheduler = Scheduler(listener, Limits())
    scheduler.start()
    long = job_of("long", speech_like(31.0, 1), "hello", seconds=math.inf)
    late = job_of("long", speech_like(31.0, 2), "hello", seconds=0.3)
    others = [job_of("one"), job_of("two", speech_like(1.0, 3)), job_of("three", speech_like(1.0, 4))]
    others[2].readout = True
    for job in (long, late, *others):
        scheduler.submit(job)
    assert patiently(lambda: all(map(ending, (late, *others))))
    assert all(isinstance(ending(job), Done) for job in others) and ending(long) is None
    report = ending(late)
    assert isinstance(report, Failed) and report.error.code == "deadline_exceeded"
    held_up.set()
    assert patiently(lambda: ending(long)) and isinstance(ending(long), Done)
    scheduler.stop()


def test_a_long_prompt_comes_in_by_pieces_between_the_steps_of_others(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[int] = []
    run = decoding.run_after_prefix

    def noting(llm: Any, prefix: Any, embeds: Any, **options: Any) -> Any:
        widths.append(embeds.shape[1])
        return run(llm, prefix, embeds, **options)

    def answer(piece: int) -> list[int]:
        monkeypatch.setattr(Scheduler, "_set_piece", lambda *_: None)
        monkeypatch.setattr(scheduler_module, "SHORTEST_PIECE", piece)
        widths.clear()
        scheduler = Scheduler(listener, Limits())
        stream, long, short = job_of("a", tokens=64), job_of("b", "hello world " * 100, tokens=8), job_of("c")
        scheduler.submit(stream)
        scheduler._turn()
        scheduler.submit(long)
        scheduler._turn()
        scheduler.submit(short)  # passes the long one
        while not (ending(long) and ending(short)):
            before = len(stream.ids)
            scheduler._turn()
            assert len(stream.ids) == before + 1 or ending(stream), "a token at every turn"
            assert piece > 96 or short.ids or not long.ids, "the short one passes the long one"
        return long.ids

    monkeypatch.setattr(decoding, "run_after_prefix", noting)
    whole = answer(100_000)
    assert max(widths) > 400
    assert answer(96) == whole
    assert max(widths) <= 96 and len(widths) > 5


def test_a_piece_is_as_long_as_running_answers_may_wait(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds that a position takes: first 1/128, then 1/512, then 1."""
    widths, pace, now = [], iter([1 / 128] * 8 + [1 / 512] * 3 + [1.0] * 100), [0.0]
    begin = decoding.Decoder.begin

    def slow_begin(decoder: Any, request: Any, positions: int) -> Any:
        widths.append(positions)
        now[0] += positions * next(pace)
        return begin(decoder, request, positions)

    monkeypatch.setattr(decoding.Decoder, "begin", slow_begin)
    monkeypatch.setattr(scheduler_module.time, "monotonic", lambda: now[0])
    scheduler = Scheduler(listener, Limits())
    job = job_of("a", "hello world " * 400)
    scheduler.submit(job)
    while not ending(job):
        scheduler._turn()
    of_slow = int(128 * PIECE_SECONDS)
    assert widths[0] == SHORTEST_PIECE and widths[1:9] == [of_slow] * 8
    assert widths[9:12] == [4 * of_slow] * 3 and set(widths[12:]) == {SHORTEST_PIECE}
    scheduler._set_piece(SHORTEST_PIECE, 0.0)
    assert scheduler._piece == LONGEST_PIECE


def test_short_prompts_do_not_cut_the_next_one(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass takes 50 ms, whether it has 5 positions or 40: 40 of them say that 200 fit."""
    joined, cut, now = [], [], [0.0]
    join, begin = decoding.Decoder.join, decoding.Decoder.begin

    def slow_join(decoder: Any, requests: Any) -> Any:
        joined.append(sum(len(request.embeds) for request in requests))
        now[0] += 0.05
        return join(decoder, requests)

    def noting_begin(decoder: Any, request: Any, positions: int) -> Any:
        cut.append(positions)
        return begin(decoder, request, positions)

    monkeypatch.setattr(decoding.Decoder, "join", slow_join)
    monkeypatch.setattr(decoding.Decoder, "begin", noting_begin)
    monkeypatch.setattr(scheduler_module.time, "monotonic", lambda: now[0])
    scheduler = Scheduler(listener, Limits())
    scheduler._set_piece(40, 0.05)
    for text in ("hi", "hello", "hello world " * 20):
        job = job_of(text, text, tokens=1)
        scheduler.submit(job)
        while not ending(job):
            scheduler._turn()
    assert joined[2] > 5 * joined[1] and not cut, (joined, cut)


def test_a_short_prompt_that_passes_a_long_one_does_not_lengthen_its_pieces(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Far into a long prompt a position takes longer than at the beginning of a short one: here 1/64 s, and nothing."""
    widths, now = [], [0.0]
    begin = decoding.Decoder.begin

    def slow_begin(decoder: Any, request: Any, positions: int) -> Any:
        widths.append(positions)
        now[0] += positions / 64
        return begin(decoder, request, positions)

    monkeypatch.setattr(decoding.Decoder, "begin", slow_begin)
    monkeypatch.setattr(scheduler_module.time, "monotonic", lambda: now[0])
    scheduler = Scheduler(listener, Limits())
    long, short = job_of("a", "hello world " * 100), job_of("b", "hi", tokens=1)
    for job in (long, short):
        scheduler.submit(job)
        scheduler._turn()
        scheduler._turn()
    while not ending(long):
        scheduler._turn()
    assert ending(short) and len(widths) > 5 and set(widths) == {round(64 * PIECE_SECONDS)}


@pytest.mark.parametrize(("owner", "name"), [(speech_encoder, "_encode_window"), (grounded.GroundedAdapter, "logits")])
def test_nobody_hears_for_clients_that_have_left(
    listener: Listener, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    """The work ends before the next operation on tensors, in the encoder and in the adapter."""
    scheduler = Scheduler(listener, Limits())
    job = job_of("one", speech_like(95.0, 1))
    whole, calls = getattr(owner, name), []

    def leave_after_two(*args: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) == 2:
            job.cancel()
        return whole(*args, **options)

    monkeypatch.setattr(speech_encoder, "WINDOWS_AT_A_TIME", 1)
    monkeypatch.setattr(owner, name, leave_after_two)
    scheduler.hearing.hear([job])
    assert job.heard is None and job.failure is None and len(calls) == 2
    assert torch.is_grad_enabled(), "what `no_grad` has set, it has set back"


def test_a_long_read_out_in_pieces_is_the_same(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = speech_like(31.0, 5)
    (pieces,) = listener.embed_audio([clip])
    monkeypatch.setattr(grounded, "PIECE", 100_000)
    (whole,) = listener.embed_audio([clip])
    assert pieces.token_ids == whole.token_ids
    assert torch.allclose(pieces.vectors, whole.vectors, atol=1e-6)


# --- kept key/values --------------------------------------------------------------------------------------------


def test_kept_prefixes_are_shared_within_one_key_alone(server_with: Callable[..., Any]) -> None:
    question = [user("the capital of a country that nobody else has asked about")]

    def reused(key: str, **options: Any) -> int:
        answer = server.client(key).chat.completions.create(
            model="tiny", messages=question, max_completion_tokens=2, **options
        )
        return int(answer.usage.prompt_tokens_details.cached_tokens)

    with server_with(api_key=("ann=first", "bob=second", "third")) as server:
        assert reused("first") == 0 and reused("first") > 20
        assert reused("second") == 0 and reused("third") == 0, "another key's"
        assert reused("first", extra_body={"prompt_cache_key": "ann's user"}) == 0
        assert reused("first", extra_body={"prompt_cache_key": "ann's user"}) > 20
        assert reused("second", extra_body={"prompt_cache_key": "ann's user"}) == 0
        for wrong in ("ann", "first second", "ann=first"):
            headers = {"authorization": f"Bearer {wrong}"}
            assert server.http(headers=headers).get("/v1/models").status_code == 401
        metrics = server.http(headers={"authorization": "Bearer third"}).get("/metrics").text
        assert "reused" not in metrics and "cached" not in metrics


def test_keys_and_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ServeSettings(api_key=("ann=first", "c2Vjcg==", "b=x=y")).keys == {
        "ann": "first", "key-2": "c2Vjcg==", "b": "x=y",
    }  # fmt: skip
    monkeypatch.setenv("BLSP_API_KEY", "ann=first bob=second")
    assert ServeSettings().keys == {"ann": "first", "bob": "second"}
    assert ServeSettings(api_key=("secret",)).keys == {"key-1": "secret"}
    for wrong in (("a=x", "a=y"), ("a=x", "b=x"), ("",)):
        with pytest.raises(SettingsError, match="--api-key"):
            ServeSettings(api_key=wrong)
