"""Nobody is held up by a neighbour: what one client sends keeps no other one waiting."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest
from serving.conftest import Running, spoken, user, wav

from blsp.inference import conversation
from blsp.inference.listener import Listener
from blsp.llm import prompt
from blsp.llm.decoding import Decoding
from blsp.serving.fair_queue import FairQueue
from blsp.serving.refusals import ApiError
from blsp.serving.scheduler import Done, Failed, Job, Limits, Report, Scheduler

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
    decoding = Decoding(max_new_tokens=tokens)
    message = {"role": "user", "parts": list(parts or ("hello",))}
    reports: list[Report] = []
    deadline = time.monotonic() + seconds
    job = Job([message], decoding, report or reports.append, deadline=deadline, client=client)
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
