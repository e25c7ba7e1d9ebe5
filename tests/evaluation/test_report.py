"""The report: figures in their units, aligned tables, and no claim without evidence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.speech_copies import Parrot

from blsp.data.manifest import Utterance
from blsp.evaluation.bootstrap import mean_figure
from blsp.evaluation.judge import Evaluation, judge
from blsp.evaluation.report import write_report
from blsp.evaluation.results import Results, TaskResult
from blsp.evaluation.scoring import Score
from blsp.evaluation.summary import change, shown, summarise, table, with_interval
from blsp.evaluation.tasks import Suite, Task


def test_figures_are_shown_in_their_units() -> None:
    assert shown("wer", 0.0312) == "3.1 %" and shown("bleu", 14.12) == "14.1" and shown("wer", None) == "n/a"
    assert with_interval("accuracy", 0.5, (0.4, 0.61)) == "50.0 % [40.0–61.0]"
    assert [change(value) for value in (-12.3, 0.2, 3.0, 450.0, float("nan"))] == [
        "−12 %",
        "0 %",
        "+3 %",
        "5.5 ×",
        "n/a",
    ]


def test_tables_line_up_and_cells_cannot_break_them() -> None:
    lines = table(["a", "longer"], [["x | y", "1"], ["two\nlines", "22"]]).splitlines()
    assert len({len(line) for line in lines}) == 1 and "x \\| y" in lines[2] and "two lines" in lines[3]


@pytest.mark.parametrize(
    "kind, chance, value, is_evidence",
    [
        ("sqa", 0.0, 0.5, True), ("sqa", 0.0, 0.49, False), ("slu", 0.1, 0.2, True), ("slu", 0.25, 0.4, False),
        ("asr", 0.0, 0.6, False), ("asr", 0.0, 0.2, True), ("st", 0.0, 2.0, False), ("st", 0.0, 20.0, True),
    ],
)  # fmt: skip
def test_a_task_is_evidence_only_where_the_text_route_can_do_it(
    kind: str, chance: float, value: float, is_evidence: bool
) -> None:
    result = TaskResult(Task("t", kind, "m", chance=chance), [Utterance("a", "", "hi")])
    score = Score()
    score.add(result.metric, result.rows, mean_figure(np.array([value])), [value])
    result.scores["text"] = score
    assert (result.lacks_evidence() is None) == is_evidence


def scored(kind: str, name: str = "", **values: float) -> TaskResult:
    """A task of one question with this main figure on each route."""
    result = TaskResult(Task(name or f"my-{kind}", kind, "m", chance=0.25), [Utterance("a", "", "hi")])
    for route, value in values.items():
        result.scores[route] = Score(counts={"no_speech": 0})
        result.scores[route].add(result.metric, result.rows, mean_figure(np.array([value])), [value])
    return result


def test_the_findings_are_sentences_about_evidence_only() -> None:
    results = Results("s", 10, 0)
    results.tasks = [
        scored("asr", text=0.05, speech=0.3, readout=0.25, recogniser=0.07),
        scored("asr", "too-hard", text=1.4, speech=1.3, readout=0.25),
        scored("sqa", text=0.8, cascade=0.75, speech=0.5),
        scored("slu", text=0.3, speech=0.9),
        scored("no-speech", speech=0.0),
    ]
    repeated, read_out, questions, silence = summarise(results, results.to_json()).splitlines()
    assert "own read-out gets 25.0 % of the words wrong, the cascade's recogniser 7.0 %" in repeated
    assert "repeat the speech, 30.0 %, asked to repeat the text, 5.0 %." in repeated
    assert read_out.endswith("own read-out gets 25.0 % of the words wrong.")  # the LLM cannot repeat: not said
    assert questions == (
        "- **my-sqa**: right on speech in 50.0 % of 1 cases (on text 80.0 %, through the cascade 75.0 %). "
        "Guessing gives 25.0 %."
    )
    assert "it took 1 for speech" in silence
    assert results.to_json()["no_evidence"] == {
        "too-hard": "a WER of 1.40 as text",
        "my-slu": "0.30 as text, below twice chance, 0.50",
    }


def test_a_report_explains_its_columns_and_compares_nothing_with_itself(
    evaluation_of: Callable[..., Evaluation], suite: Suite, tmp_path: Path
) -> None:
    write_report(judge(evaluation_of(), suite), tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert "- **behaviour**: on speech" in report and "**readout**" not in report  # conv reads nothing out
    glance = next(line for line in report.splitlines() if line.startswith("| continuation"))
    assert "chrF to text" in glance and "(itself)" in glance


@pytest.mark.parametrize("routes", [("text",), ("speech",), ("cascade",)])
def test_any_route_alone_makes_a_report(
    evaluation_of: Callable[..., Evaluation], suite: Suite, tmp_path: Path, routes: tuple[str, ...]
) -> None:
    screen = write_report(judge(evaluation_of(routes=routes, recogniser=Parrot()), suite), tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert f" {routes[0]} " in screen and all(f"### {task.name}" in report for task in suite.tasks)
    alignment = json.loads((tmp_path / "results.json").read_text())["alignment"]
    assert bool(alignment) == ("speech" in routes) and "nan" not in report


def test_divergence_against_scores_over_checkpoints(
    evaluation_of: Callable[..., Evaluation], suite: Suite, tmp_path: Path
) -> None:
    results = judge(evaluation_of(), suite)
    write_report(results, tmp_path / "step-100")
    write_report(results, tmp_path / "step-200", compare=(tmp_path / "step-100",))
    report = (tmp_path / "step-200" / "report.md").read_text()
    assert "divergence_against_scores.png" in report
    assert (tmp_path / "step-200" / "divergence_against_scores.png").stat().st_size > 5000


def test_a_report_is_the_same_twice(evaluation_of: Callable[..., Evaluation], suite: Suite, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_report(judge(evaluation_of(), suite), tmp_path / name)
    for file in ("samples.jsonl", "scores.png", "layers.png", "instructions.png", "divergence_by_position.png"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    first, second = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("a", "b"))
    assert first["tasks"] == second["tasks"] and first["alignment"] == second["alignment"]
