"""Figures of a long run: speed and gradient in metrics.jsonl, validation files, trackers, a trace."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training_examples import write_data

from blsp.distributed import find_runtime
from blsp.settings import SettingsError, TrainSettings
from blsp.training import loop, reporting
from blsp.training.probes import validation_sources
from blsp.training.run_state import Progress
from blsp.training.tracking import CLOCKED, Trackers, layer_weights, product_flops, speed
from blsp.weights.folder import WeightsNotFoundError


@pytest.fixture
def train(tmp_path: Path, tiny_llm, tiny_whisper, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Three steps of a tiny run; the lines of its metrics.jsonl."""
    monkeypatch.setattr(reporting, "draw", lambda *_: None)
    data = write_data(tmp_path / "data", rows=8)

    def run(loss: str = "ce", **changes: Any) -> list[dict[str, Any]]:
        settings = TrainSettings(
            data=(str(data),),
            out=tmp_path / "run",
            audio_model=tiny_whisper,
            llm=tiny_llm("llama"),
            adapter="grounded" if loss == "ctc" else "conv",
            loss=loss,
            batch_size=4,
            steps=5,
            log_every=1,
            probe_every=3,
            dtype="float32",
            **changes,
        )
        loop.train(settings)
        return [json.loads(line) for line in (settings.out / "metrics.jsonl").read_text().splitlines()]

    return run


def test_a_validation_file_has_probes_of_its_own(train, tmp_path: Path) -> None:
    other = write_data(tmp_path / "other", rows=5)
    rows = train(val_data=(f"clean={other}", f"again={other}"))
    probed = [row for row in rows if "clean_kl" in row]
    assert [row["step"] for row in probed] == [1, 3, 5]
    assert all(row["clean_kl"] == row["again_kl"] > 0 and "train_kl" in row for row in probed)
    assert all(set(CLOCKED) <= set(row) and row["grad_norm"] > 0 < row["positions_per_second"] for row in rows)


def test_the_trace_and_the_tracker(train, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    rows = train(profile=2, log_to=("tensorboard",))
    assert json.loads((tmp_path / "run/trace.json").read_text())["traceEvents"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folders = {path.parent for path in (tmp_path / "run").rglob("events.out.*")}
    read = [EventAccumulator(str(folder)).Reload() for folder in folders]  # one folder holds the settings
    (events,) = [found for found in read if "loss" in found.Tags()["scalars"]]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([row["loss"] for row in rows], rel=1e-5)


@pytest.mark.parametrize(("adapter", "loss"), [("conv", "ce"), ("grounded", "ctc")])  # one with a read-out, too
def test_a_dry_run_tells_rows_time_and_memory_and_writes_nothing(
    tmp_path: Path, tiny_llm, tiny_whisper, capsys: pytest.CaptureFixture[str], adapter: str, loss: str
) -> None:
    data, out = write_data(tmp_path / "data", rows=8), tmp_path / "run"
    parts = {"audio_model": tiny_whisper, "llm": tiny_llm("llama"), "adapter": adapter, "loss": loss}
    loop.train(
        TrainSettings(data=(str(data),), out=out, batch_size=4, steps=100, dtype="float32", dry_run=True, **parts)
    )
    told = capsys.readouterr().out
    assert "100 steps of" in told and "hours" in told and "GB of memory" in told
    assert not out.exists() and not list(tmp_path.glob("*dry-run*"))


def _staged(tmp_path: Path, tiny_llm, tiny_whisper, init_from: tuple[str, ...]) -> TrainSettings:
    """A dry run of two stages in a folder that does not exist yet; the second begins where the first ends."""
    data = str(write_data(tmp_path / "data", rows=8))
    (tmp_path / "data" / "0.wav").write_bytes(b"not audio")
    out = tmp_path / "runs" / "staged"
    parts = {"audio_model": tiny_whisper, "llm": tiny_llm("llama"), "adapter": "conv", "loss": "ce"}
    whole = TrainSettings(data=(data,), out=out, batch_size=4, steps=9, dtype="float32", dry_run=True, **parts)
    first = replace(whole, out=out / "stages" / "first", init_from=init_from)
    second = replace(whole, out=out / "stages" / "second", init_from=(str(first.out / "adapter"),))
    return replace(whole, stages=(first, second))


def test_a_dry_run_of_stages_leaves_nothing_behind(tmp_path: Path, tiny_llm, tiny_whisper, capsys) -> None:
    loop.train(_staged(tmp_path, tiny_llm, tiny_whisper, ()))
    told = capsys.readouterr().out
    assert "stages/first: 7 rows, 1 left out; 9 steps" in told and "stages/second: 7 rows" in told
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_dry_run_refuses_a_wrong_start_and_leaves_nothing_behind(tmp_path: Path, tiny_llm, tiny_whisper) -> None:
    with pytest.raises(WeightsNotFoundError, match="no-adapter"):
        loop.train(_staged(tmp_path, tiny_llm, tiny_whisper, (str(tmp_path / "no-adapter"),)))
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_speed_is_counted_work_over_time() -> None:
    before = Progress(seconds=10.0, audio_seconds=100.0)
    now = Progress(seconds=12.0, audio_seconds=7300.0, window_positions=1100, window_padding=100)
    figures = speed(5, before, now, device_flops=40_000.0)
    assert (figures["positions_per_second"], figures["audio_hours_per_hour"]) == (500.0, 3600.0)
    assert (figures["flops"], figures["flops_fraction"]) == (4 * 5 * 500, 0.25)
    assert "flops" not in speed(0, before, now, 1.0)
    assert product_flops(find_runtime("cpu")) > 1e8


def test_the_first_line_after_a_checkpoint_counts_the_work_since_it() -> None:
    before = Progress(seconds=90.0, window_positions=9500, window_padding=500)
    now = Progress(seconds=100.0, window_positions=10600, window_padding=600)
    assert speed(0, before, now, 1.0)["positions_per_second"] == 100.0


def test_only_the_layers_are_counted(pair_of) -> None:
    llm = pair_of()[0].model.language_model
    assert layer_weights(llm) == sum(p.numel() for p in llm.layers.parameters())
    assert layer_weights(torch.nn.Linear(2, 2)) == 0


@pytest.mark.parametrize("flag", ["clean", "train=x.jsonl", "a b=x.jsonl", "=x.jsonl"])
def test_a_wrong_validation_flag_is_named(flag: str) -> None:
    with pytest.raises(SettingsError, match="NAME=FILE"):
        validation_sources((flag,))


def test_a_validation_pattern_of_several_files_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text('{"id": "x", "audio": "x.wav", "text": "x"}\n')
    assert list(validation_sources((f"dev={tmp_path}/a*.jsonl",))) == ["dev"]
    with pytest.raises(SettingsError, match=r"--val-data dev=.*: matches 2 files; name one"):
        validation_sources((f"dev={tmp_path}/*.jsonl",))


def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import tracking

    class Absent:
        requires_logging_directory = False

        def __init__(self, name: str) -> None:
            raise ModuleNotFoundError("No module named 'wandb'")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Absent)
    with pytest.raises(SettingsError, match="pip install wandb"):
        Trackers(("wandb",), tmp_path, {}, find_runtime("cpu"))
