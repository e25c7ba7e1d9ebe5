"""The verdict at the end of a run, the warnings at its start, and the picture with the verdict."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure

from blsp.settings import TrainSettings
from blsp.training import reporting, verdict


def _sums(own: float, exchanged: float, clips: int = 12, noise: float = 0.1) -> np.ndarray:
    """(clips, 3): so many nats a token with own and with exchanged speech, ten tokens a clip."""
    spread = 1 + noise * np.random.default_rng(0).standard_normal((clips // 2, 2))
    spread = np.concatenate([spread, spread[:, ::-1]])  # so that chance favours neither
    return np.column_stack([10 * np.array([own, exchanged]) * spread, np.full(clips, 10.0)])


@pytest.mark.parametrize(
    "own, exchanged, finding",
    [
        (0.05, 0.5, "it listens"),
        (0.40, 0.5, "it begins to listen"),
        (0.42, 0.42, "it does not listen yet"),
        (0.60, 0.5, "it does not listen yet"),
    ],
)
def test_the_finding_is_own_against_exchanged(own: float, exchanged: float, finding: str) -> None:
    found = verdict.compare(_sums(own, exchanged), "Give it more.")
    assert found.finding == finding and found.clips == 12
    assert found.own == pytest.approx(own, rel=0.1) and found.exchanged == pytest.approx(exchanged, rel=0.1)
    assert ("Give it more." in str(found)) == (finding != "it listens")


def test_a_few_clips_that_disagree_are_no_evidence() -> None:
    sums = np.array([[1.0, 9.0, 10.0], [9.0, 8.0, 10.0], [9.0, 6.0, 10.0]])
    found = verdict.compare(sums, "")
    assert found.own < found.exchanged and found.finding == "it does not listen yet"


def test_clips_weigh_by_their_tokens() -> None:
    found = verdict.compare(np.array([[1.0, 2.0, 1.0], [1.0, 20.0, 9.0]]), "")
    assert (found.own, found.exchanged) == (0.2, 2.2)


def test_a_verdict_is_read_back(tmp_path: Path) -> None:
    found = verdict.compare(_sums(0.05, 0.5), "")
    found.write(tmp_path)
    read = verdict.Verdict.read(tmp_path)
    assert read is not None and replace(read, difference=tuple(read.difference)) == found
    assert verdict.Verdict.read(tmp_path / "other") is None


def _run(batch_size: int, steps: int, rows: int, init_from: tuple[str, ...] = ()) -> SimpleNamespace:
    settings = TrainSettings(
        data=("x",), out=Path("x"), audio_model="a", llm="l", adapter="conv", loss="ce", batch_size=batch_size
    )
    return SimpleNamespace(
        settings=replace(settings, init_from=init_from), steps=steps, order=SimpleNamespace(per_epoch=rows)
    )


def test_short_runs_and_large_batches_are_warned_of() -> None:
    assert verdict.warnings(_run(16, 200, 4000)) == []
    large, short = verdict.warnings(_run(768, 1, 117))
    assert "--batch-size 768" in large and "117 rows" in large and "such as 14" in large
    assert "1 steps: too few for a fresh adapter" in short
    (adapted,) = verdict.warnings(_run(16, 24, 117, ("models/blsp-tiny",)))
    assert "enough for an adapter that listens already" in adapted


def test_smoothing_is_not_pulled_to_the_first_value_or_to_zero() -> None:
    assert reporting.smoothed([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert reporting.smoothed([10.0, 0.0])[1] == pytest.approx(10 * 0.9 / 1.9)


def test_the_picture_holds_all_points_the_stages_and_the_verdict(tmp_path: Path, monkeypatch) -> None:
    rows = [{"step": n, "stage": "first", "loss": 60.0 / n, "lr": 1e-3, "held_out_wer": 1.4} for n in range(1, 9)]
    rows += [
        {"step": n, "stage": "second", "loss": 0.4, "lr": 1e-4, "held_out_kl": 0.3, "held_out_kl_shuffled": 0.9}
        for n in range(9, 12)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: figures.append(self) or save(self, *args, **kw))
    reporting.draw(tmp_path / "metrics.jsonl", tmp_path / "curves.png", "It listens. As it should.")
    (figure,) = figures
    assert "It listens" in figure.get_suptitle()
    panels = [axis for axis in figure.axes if axis.get_title()]
    assert [axis.get_title() for axis in panels] == [
        "training loss",
        "divergence from the text route, nats per token",
        "word error rate of the read-out or of the nearest tokens",
    ]
    for axis in panels:
        assert [text.get_text().strip() for text in axis.texts] == ["first", "second"]
        bottom, top = axis.get_ylim()
        for line in axis.lines[:-1]:  # the last one is where the second stage begins
            assert all(bottom <= value <= top for value in line.get_ydata())
