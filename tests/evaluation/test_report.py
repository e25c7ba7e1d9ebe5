"""What a person reads: figures in their units, tables that line up, and no claim where there is no evidence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from blsp.data.manifest import Utterance
from blsp.evaluation.bootstrap import mean_figure
from blsp.evaluation.judge import Bench, judge
from blsp.evaluation.report import write_report
from blsp.evaluation.results import TaskResult, evidence
from blsp.evaluation.scoring import Score
from blsp.evaluation.tables import change, shown, table, with_interval
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
    assert (evidence(result) is None) == is_evidence


def test_divergence_against_scores_over_checkpoints(
    bench: Callable[..., Bench], suite: Suite, tmp_path: Path
) -> None:
    results = judge(bench(), suite)
    write_report(results, tmp_path / "step-100")
    write_report(results, tmp_path / "step-200", compare=(tmp_path / "step-100",))
    report = (tmp_path / "step-200" / "report.md").read_text()
    assert "divergence_against_scores.png" in report
    assert (tmp_path / "step-200" / "divergence_against_scores.png").stat().st_size > 5000


def test_a_report_is_the_same_twice(bench: Callable[..., Bench], suite: Suite, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_report(judge(bench(), suite), tmp_path / name)
    for file in (
        "samples.jsonl",
        "scores.png",
        "layers.png",
        "instructions.png",
        "divergence_by_position.png",
    ):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    first, second = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("a", "b"))
    assert first["tasks"] == second["tasks"] and first["alignment"] == second["alignment"]
