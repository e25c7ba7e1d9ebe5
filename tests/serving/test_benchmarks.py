"""A twentieth of the load and robustness benchmarks of the server, on the tiny model."""

from __future__ import annotations

import asyncio

import pytest
from conftest import Running

from benchmarks.serve_load import answer_alone
from benchmarks.serve_robustness import attack, by_schemathesis
from benchmarks.support.attacks import CASES
from benchmarks.support.neighbours import Case, Target
from benchmarks.support.odd_hosts import odd_names
from benchmarks.support.serving import crowd, recordings, spoken_question

WORDS = "Please repeat the following words:"
ROOM = 3.0  # other tests take the cores in turn here; the benchmark holds the bounds themselves


@pytest.mark.parametrize("clients", [4, 16])
def test_each_client_gets_the_answer_it_would_get_alone(server: Running, clients: int) -> None:
    clips = recordings(12)
    alone = [answer_alone(server.listener, clip, WORDS, new_tokens=12) for clip in clips]
    questions = [spoken_question(clip, WORDS) for clip in clips]
    served = asyncio.run(crowd(server.url, questions, clients, requests=50, new_tokens=12))
    assert [each.status for each in served] == [200] * 50
    assert not [each for each in served if not alone[each.question].agrees(each.text.strip())]
    assert len({each.text for each in served}) > 4, "the answers tell the questions apart"


def test_past_the_queue_clients_are_told_to_come_back(server_with) -> None:
    questions = [spoken_question(clip, WORDS) for clip in recordings(8)]
    with server_with(max_batch=2, queue=4) as server:
        served = asyncio.run(crowd(server.url, questions, clients=32, requests=32, new_tokens=64))
    refused = [each for each in served if each.status == 429]
    assert refused and all(each.retry_after for each in refused)
    assert {each.status for each in served} == {200, 429}


def test_bad_requests_break_nothing(server_with) -> None:
    with server_with(max_upload_mb=2, max_audio_seconds=120, deadline=10) as server:
        figures = attack(server.url, max(recordings(4), key=len), 50)
        assert figures["defects"] == []
        assert by_schemathesis(server.url, examples=5)


@pytest.mark.parametrize("case", [case for case in CASES if case.settings is None], ids=lambda case: case.name)
def test_no_attack_on_a_command_succeeds(case: Case) -> None:
    figures = case.run(Target("", lambda: 0.0, share=0.05))
    assert case.beyond(figures, ROOM) == [], figures


@pytest.mark.parametrize("case", [case for case in CASES if case.settings is not None], ids=lambda case: case.name)
def test_no_client_holds_up_another_one(server_with, case: Case) -> None:
    """A twentieth of each case, on a tiny model that hears and writes fast."""
    with odd_names(), server_with(**case.settings) as server:
        figures = case.run(Target(server.url, lambda: 0.0, share=0.05))
        assert case.beyond(figures, ROOM) == [], figures
