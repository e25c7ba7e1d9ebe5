"""The steps of the tour, without its models: a finished one is shown again, a changed one runs again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blsp.settings import SettingsError, TourSettings
from blsp.tour import Stop, TourError, divergence_text, plan, read_manifest, run_command, tour, training_rows, visit

SPEECH = Path(__file__).parents[1] / "examples" / "speech"


def test_a_finished_stop_is_shown_again_and_a_changed_one_walked_again(tmp_path: Path) -> None:
    looked: list[int] = []

    def stop(*commands: tuple[str, ...]) -> Stop:
        return Stop("a stop", "why", "seconds", commands, lambda: f"seen {looked.append(1) or len(looked)}")

    assert visit(stop(), tmp_path, [["train", "--out", "a"]]) == "seen 1"
    assert visit(stop(), tmp_path, [["train", "--out", "a"]]).endswith("seen 1")
    assert visit(stop(), tmp_path, [["train", "--out", "b"]]) == "seen 2"  # another adapter, so seen anew
    assert visit(stop(("--help",)), tmp_path, [["train", "--out", "b"], ["--help"]]) == "seen 3"


def test_a_failing_command_ends_the_tour_with_its_words() -> None:
    with pytest.raises(TourError, match=r"blsp encode --manifest nowhere\.jsonl"):
        run_command(["encode", "--manifest", "nowhere.jsonl", "--audio-model", "nowhere", "--cache", "nowhere"])


def test_a_folder_without_recordings_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"train\.jsonl"):
        tour(TourSettings(out=tmp_path / "out", speech=tmp_path))


def test_every_command_of_the_tour_parses() -> None:
    from blsp.cli import parse

    for stop in plan(TourSettings(speech=SPEECH, cold=True)):
        for name, *flags in stop.commands:
            parse(name, flags)


def test_rows_kept_back_are_not_shown_as_trained_on() -> None:
    rows = read_manifest(SPEECH / "train.jsonl")
    trained = training_rows(SPEECH / "train.jsonl", 24)
    assert 0 < len(rows) - len(trained) <= 24  # a tenth of all at most
    assert all(Path(row["audio"]).exists() for row in trained)


def test_divergence_is_told_from_first_to_last_probe(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    rows = [{"train_kl": 2.0, "held_out_kl": 3.0}, {"loss": 1.0}, {"train_kl": 0.5, "held_out_kl": 2.5}]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    told = divergence_text(metrics)
    assert "2.000 →   0.500" in told and "3.000 →   2.500" in told
