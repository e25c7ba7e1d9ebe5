"""Checkpoints count only if they are complete, and store what resuming needs."""

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training_examples import write_data

from blsp import cli
from blsp.data.files import DiskFullError
from blsp.data.jobs import JobError
from blsp.distributed import Runtime
from blsp.settings import TrainSettings
from blsp.training import loop
from blsp.training.run_state import (
    Checkpoint,
    Progress,
    add_to_window,
    begin_folder,
    check_environment,
    complete_checkpoints,
    cut_metrics,
    empty_window,
    environment,
    load_checkpoint,
    newest_complete,
    save_checkpoint,
)

HERE = Runtime(torch.device("cpu"), torch.float32)


def _save(folder: Path, step: int, keep: int = 2) -> Path:
    weights = {"w": torch.full((2, 3), float(step)), "s": torch.tensor(1.5)}
    optimiser = torch.optim.AdamW([torch.nn.Parameter(weights["w"])], lr=0.1)
    progress = Progress(step=step, samples=8 * step, seconds=0.1 * step)
    checkpoint = Checkpoint(progress, environment(HERE), weights, {}, optimiser.state_dict())
    return save_checkpoint(folder, checkpoint, keep)


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    stored = load_checkpoint(_save(tmp_path, 3))
    assert stored.progress == Progress(step=3, samples=24, seconds=0.1 * 3)
    assert torch.equal(stored.adapter["w"], torch.full((2, 3), 3.0))
    assert stored.environment == environment(HERE)
    assert stored.average == {}


def test_the_newest_complete_one_counts_and_old_ones_go(tmp_path: Path) -> None:
    assert newest_complete(tmp_path) is None
    for step in (2, 4, 10):
        _save(tmp_path, step)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-4", "step-10"]
    torn = tmp_path / "step-12"
    torn.mkdir()
    (torn / "adapter.safetensors").write_bytes(b"half")
    assert newest_complete(tmp_path) == tmp_path / "step-10"
    assert newest_complete(_save(tmp_path, 12).parent) == torn


@pytest.mark.parametrize(
    "full",
    [
        *("training.run_state.Path.mkdir", "training.run_state.save_file", "training.run_state.torch.save"),
        *("training.run_state.Path.write_text", "data.files.flush_to_disk"),
    ],
)
def test_a_full_disk_is_named_and_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch, full: str) -> None:
    older = _save(tmp_path, 2)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        monkeypatch.context() as patch,
        pytest.raises(DiskFullError, match=r"step-4: no room .* 28 bytes are") as error,
    ):
        patch.setattr(f"blsp.{full}", fail)
        _save(tmp_path, 4)
    assert error.value.path == tmp_path / "step-4"
    assert list(tmp_path.iterdir()) == [older] == complete_checkpoints(tmp_path)
    assert newest_complete(_save(tmp_path, 4).parent) == tmp_path / "step-4"


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    cut_metrics(path, 5)  # nothing there: nothing to do
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 5, 10)) + '{"step": 15, "lo')
    cut_metrics(path, 5)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 5]


def test_another_machine_is_refused_by_name(tmp_path: Path) -> None:
    here = environment(HERE)
    check_environment(here, here, tmp_path, inexact=False)
    other = here | {"threads": 64, "torch": "9.9"}
    with pytest.raises(JobError, match=r"torch was .*threads was .*--resume-inexact"):
        check_environment(here, other, tmp_path, inexact=False)
    check_environment(here, other, tmp_path, inexact=True)


def test_the_window_of_a_metrics_line_adds_up_and_empties() -> None:
    progress = Progress(step=7)
    for loss in (1.0, 2.0):
        progress = add_to_window(progress, loss, positions=10, padding=1, norm=2.0)
    assert (progress.window_steps, progress.window_loss, progress.window_padding) == (2, 3.0, 2)
    assert empty_window(progress) == replace(Progress(), step=7)


def test_another_number_of_processes_goes_on_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = environment(HERE)
    check_environment(here | {"processes": 8}, here, tmp_path, inexact=False)
    assert "continues with 1 processes after 8" in capsys.readouterr().err


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    """Nothing that was measured for another loss is kept; what lies beside it and is of other runs stays."""
    settings = TrainSettings(("rows.jsonl",), tmp_path / "run", "whisper", "llm", "grounded", loss="ctc")
    begin_folder(settings, HERE)
    names = ("table.json", "validation/x/table.json", "validation/x/rows.npy", "no_speech/no_speech.jsonl")
    measured = [tmp_path / "run" / name for name in names]
    skipped = [tmp_path / f"run{rank}.skipped.jsonl" for rank in ("", ".rank1", ".rank12")]
    others = [tmp_path / name for name in ("run-2.skipped.jsonl", "other.rank1.skipped.jsonl")]
    for path in (*measured, *skipped, *others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}\n")
    begin_folder(replace(settings, loss="ce"), HERE)
    assert not any(path.exists() for path in (*measured, *skipped, tmp_path / "run" / "validation"))
    assert all(path.exists() for path in others)
    assert "loss: ce" in (tmp_path / "run" / "settings.yaml").read_text()


def test_a_run_with_a_checkpoint_keeps_what_it_measured(tmp_path: Path) -> None:
    settings = TrainSettings(("rows.jsonl",), tmp_path / "run", "whisper", "llm", "grounded", loss="ctc")
    begin_folder(settings, HERE)
    _save(tmp_path / "run" / "checkpoints", 2)
    kept = [tmp_path / name for name in ("run/table.json", "run/validation/table.json", "run.skipped.jsonl")]
    (tmp_path / "run" / "validation").mkdir()
    for path in kept:
        path.write_text("{}\n")
    begin_folder(settings, HERE)
    assert all(path.exists() for path in kept)


@pytest.mark.parametrize("wanted", [True, False])
def test_only_a_deterministic_run_forbids_other_algorithms(
    wanted: bool, tmp_path: Path, tiny_llm: Any, tiny_whisper: str, monkeypatch: Any
) -> None:
    """`--no-deterministic` leaves torch's switch as it is; without the flag it is on in each step, and off after."""
    seen, learn = [], loop.learn

    def noted(*arguments: Any) -> None:
        seen.append(torch.are_deterministic_algorithms_enabled())
        learn(*arguments)

    monkeypatch.setattr(loop, "learn", noted)
    data = str(write_data(tmp_path / "data", rows=6))
    command = ["train", "--data", data, "--out", str(tmp_path / "run"), "--loss", "ce", "--adapter", "conv"]
    command += ["--audio-model", tiny_whisper, "--llm", tiny_llm("llama"), "--steps", "2", "--device", "cpu"]
    assert cli.main([*command, *([] if wanted else ["--no-deterministic"])]) == 0
    assert seen == [wanted, wanted]
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_run_does_not_go_on_with_other_algorithms(tmp_path: Path, tiny_llm: Any, tiny_whisper: str) -> None:
    settings = TrainSettings(
        data=(str(write_data(tmp_path / "data", rows=6)),),
        out=tmp_path / "run",
        audio_model=tiny_whisper,
        llm=tiny_llm("llama"),
        adapter="conv",
        loss="ce",
        steps=2,
    )
    loop.train(settings)
    with pytest.raises(JobError, match="deterministic"):
        loop.train(replace(settings, deterministic=False))
