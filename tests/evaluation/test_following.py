"""Instruction following: figures of a collapsed and of a deaf adapter; intervals by speaker."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from support.speech_copies import shuffled, transcripts_as_speech

from blsp.data.manifest import Utterance
from blsp.evaluation.alignment import Alignment, Comparison
from blsp.evaluation.answers import Answer, Answers
from blsp.evaluation.bootstrap import (
    SHARE,
    Figure,
    drawn_units,
    draws,
    grouped,
    interval,
    mean_figure,
    ratio,
    relative_gap,
    widening,
)
from blsp.evaluation.following import judge_following
from blsp.evaluation.judge import Evaluation, judge
from blsp.evaluation.results import Results, TaskResult
from blsp.evaluation.scoring import Score
from blsp.evaluation.tasks import Suite, Task
from blsp.inference.listener import Listener

WORDS = {"a": "the black cat sat", "b": "rain falls in April", "c": "seven ships left port"}
TEXT: dict[str, Answers] = {
    "continue": {
        clip: Answer(f"Then {words} again and a long story began", "stop", ()) for clip, words in WORDS.items()
    },
    "repeat": {clip: Answer(words, "stop", ()) for clip, words in WORDS.items()},
    "answer": {clip: Answer(f"I do not know, sorry: {words[::-1]}", "stop", ()) for clip, words in WORDS.items()},
}


def _figures(speech: dict[str, Answers]) -> dict:
    return judge_following(TEXT, speech, WORDS).figures(np.arange(len(WORDS)), samples=50, seed=0)


def test_the_text_routes_own_answers_follow() -> None:
    figures = _figures(TEXT)
    assert figures["instruction_following"] == 1.0 and figures["instruction_following_ci"] == [1.0, 1.0]
    assert figures["instruction_following_shuffled"] < 1.0


def test_a_collapsed_adapter_repeats_whatever_is_asked() -> None:
    figures = _figures({asked: TEXT["repeat"] for asked in TEXT})
    assert figures["instruction_following"] == pytest.approx(1 / 3)
    assert all(shares["repeat"] == 1.0 for shares in figures["nearest_answer"].values())


def test_an_empty_answer_follows_nothing() -> None:
    silent = {clip: Answer("", "stop", ()) for clip in WORDS}
    assert _figures({asked: silent for asked in TEXT})["instruction_following"] == 0.0


def test_one_text_answer_to_two_instructions_tells_nothing() -> None:
    text = TEXT | {"answer": TEXT["repeat"]}
    nearest = judge_following(text, text, WORDS).nearest
    assert len(nearest["continue"]) == 3 and not nearest["repeat"] and not nearest["answer"]


def test_the_exchanged_answer_is_of_another_text() -> None:
    """Clips a and d are of one text; d's answers to it must not stand for those of another clip."""
    both = {asked: {"a": answers["a"], "d": answers["a"], "b": answers["b"]} for asked, answers in TEXT.items()}
    found = judge_following(both, both, {clip: WORDS[{"d": "a"}.get(clip, clip)] for clip in "adb"})
    only = judge_following(TEXT, TEXT, {clip: WORDS[clip] for clip in "ab"})
    for asked in TEXT:
        assert found.exchanged[asked]["a"] == found.exchanged[asked]["d"] == only.exchanged[asked]["a"]
    assert found.exchanged != found.nearest


def test_the_alignment_analysis_holds_it(
    evaluation_of: Callable[..., Evaluation], suite: Suite, listener: Listener
) -> None:
    only = Suite("alignment", (), suite.alignment)
    right = judge(evaluation_of(speech=transcripts_as_speech(listener)), only).to_json()["alignment"]
    wrong = judge(evaluation_of(speech=shuffled(transcripts_as_speech(listener))), only).to_json()["alignment"]
    assert right["instruction_following"] == 1.0 > wrong["instruction_following"]


# --- intervals by speaker -------------------------------------------------------------------------------------
def test_speakers_are_drawn_as_a_whole_where_there_are_enough() -> None:
    speakers = [f"s{number % 5}" for number in range(50)]
    values = np.array([float(number % 5) for number in range(50)])  # a speaker's utterances are all alike
    figure = Figure(np.stack([values, np.ones(50)], axis=1), ratio)
    units = drawn_units(speakers)
    whole = grouped(figure, units)
    assert whole.point() == figure.point() and len(whole.statistics) == 5
    low, high = interval(whole, draws(5, 1000, seed=0))
    single_low, single_high = interval(figure, draws(50, 1000, seed=0))
    assert high - low > 2 * (single_high - single_low)


def test_intervals_over_few_speakers_hold_the_true_figure() -> None:
    """Of 400 draws of 6 speakers, each with a mean of its own, about 95 % have the true mean in the interval."""
    generator, speakers = np.random.default_rng(0), [f"s{number % 6}" for number in range(60)]
    rows, units = draws(6, 300, seed=0), drawn_units(speakers)
    held = {1.0: 0, widening(speakers): 0}
    for _ in range(400):
        values = generator.normal(10, 1, 6)[units] + generator.normal(0, 0.5, 60)
        figure = grouped(mean_figure(values), units)
        for factor in held:
            low, high = interval(figure, rows, factor)
            held[factor] += low <= 10 <= high
    without, widened = (count / 400 for count in held.values())
    assert without < 0.88 and 0.925 <= widened <= 0.97


@pytest.mark.parametrize("count, factor", [(4, 1.0), (5, 1.583), (6, 1.437), (9, 1.248), (31, 1.059), (1000, 1.0005)])
def test_intervals_are_widened_by_students_t(count: int, factor: float) -> None:
    assert widening([str(number) for number in range(count)]) == pytest.approx(factor, abs=1e-3)
    assert widening([None, *map(str, range(count))]) == 1.0


def test_a_widened_interval_stays_within_what_is_possible() -> None:
    rows = draws(5, 200, seed=0)
    right = mean_figure(np.array([1.0, 1.0, 1.0, 0.0, 1.0]), SHARE)
    assert interval(right, rows, 1.583)[1] == 1.0 and 0.0 <= interval(right, rows, 1.583)[0] < interval(right, rows)[0]
    wrong = mean_figure(1 - right.statistics[:, 0], SHARE)
    percent, (low, high) = relative_gap(wrong, right, rows, 1.583)
    assert low == -100 < percent < relative_gap(wrong, right, rows)[1][1] < high


def test_results_and_alignment_are_widened_alike() -> None:
    """Each figure of five speakers with one clip each is wider than over five clips of unknown speakers."""
    score, rows = Score(), [Utterance(f"{number}", "", "hi", speaker=f"s{number}") for number in range(5)]
    score.add_mean("accuracy", rows, [0.4, 0.5, 0.6, 0.5, 0.45])
    other = copy.deepcopy(score)
    other.add_mean("accuracy", rows, [0.5, 0.5, 0.7, 0.4, 0.5])
    comparison = [Comparison((kl,), (kl < 0.5,), {"cascade": 0.5}) for kl in (0.4, 0.5, 0.6, 0.5, 0.45)]
    found = []
    for asked in (rows, [replace(row, speaker=None) for row in rows]):
        task = TaskResult(Task("t", "sqa", "m"), asked, scores={"text": other, "speech": score})
        results = Results("s", 200, 0, [task]).to_json()
        alignment = Alignment({"repeat": dict(enumerate(comparison))}, [row.speaker for row in asked]).figures(200, 0)
        bounds = results["tasks"]["t"]["speech"]["accuracy_ci"], results["gaps"]["t"]["accuracy"]["speech_vs_text_ci"]
        found.append([*bounds, alignment["kl_ci"], alignment["kl_minus_cascade_ci"]])
    for (low, high), (single_low, single_high) in zip(*found, strict=True):
        assert high - low == pytest.approx(1.583 * (single_high - single_low), rel=1e-3)


@pytest.mark.parametrize("speakers", [["a"] * 6, ["a", "b", "c", "d"] * 2, ["a", "b", "c", "d", "e", None]])
def test_few_or_unknown_speakers_leave_the_utterances(speakers: list[str | None]) -> None:
    assert drawn_units(speakers).tolist() == list(range(len(speakers)))
