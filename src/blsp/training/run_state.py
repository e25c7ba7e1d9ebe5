"""Everything a killed run needs to go on, to the bit.

In:  the adapter, the optimiser, the running average and how far the run has come.
Out: ``checkpoints/step-N/``, complete only when its ``state.json`` exists; the newest complete one read back.
Try: ``newest_complete(Path("runs/x/checkpoints"))``
Flow: training/loop.py saves here every so many steps and starts from here; what is drawn at random in a step
      (data order, augmentation, dropout) is a function of (seed, step), so no generator's state has to be
      kept.

A run goes on exactly only on the same kind of machine: versions, device, number of threads and of processes
are stored, and a run that finds others refuses (`ResumeError`) unless told that close is good enough.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

STATE = "state.json"


class ResumeError(RuntimeError):
    """The run folder and this process do not fit; the message names both values and the way out."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come. `window_*`: what has been added up since the last line of metrics.jsonl."""

    step: int = 0
    samples: int = 0
    audio_seconds: float = 0.0
    seconds: float = 0.0
    averaged: int = 0  # steps whose weights are in the running average
    window_steps: int = 0
    window_loss: float = 0.0
    window_positions: int = 0  # of the LLM's sequences (frames for ctc), padding included
    window_padding: int = 0  # those of them that are padding


def environment(world: int, device: str) -> dict[str, Any]:
    """What must be equal for two runs to be equal to the bit."""
    return {
        "blsp": version("blsp"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": device,
        "threads": torch.get_num_threads(),
        "processes": world,
    }


def check_environment(stored: dict[str, Any], here: dict[str, Any], folder: Path, inexact: bool) -> None:
    """Raise `ResumeError` where `here` differs from what the checkpoint was made with, unless `inexact`."""
    changed = [
        f"{name} {stored.get(name)} -> {value}" for name, value in here.items() if stored.get(name) != value
    ]
    if changed and not inexact:
        raise ResumeError(
            f"{folder}: cannot go on to the bit, because of other: {', '.join(changed)}. Restore them "
            "(OMP_NUM_THREADS sets the threads), or "
            "pass --resume-inexact to go on with results that are close but not equal"
        )


def save_checkpoint(
    folder: Path,
    progress: Progress,
    adapter: dict[str, Tensor],
    average: dict[str, Tensor],
    optimiser: dict[str, Any],
    here: dict[str, Any],
    keep: int,
) -> Path:
    """Write ``folder/step-N`` and remove all but the newest `keep`; `state.json` comes last and makes it
    count.
    """
    target = folder / f"step-{progress.step}"
    if target.exists():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in adapter.items()}, target / "adapter.safetensors")
    if average:
        save_file(average, target / "average.safetensors")
    torch.save(optimiser, target / "optimizer.pt")
    for file in target.iterdir():
        _flush(file)
    state = {"progress": asdict(progress), "environment": here}
    write_text(target / STATE, json.dumps(state, indent=2) + "\n")
    for old in complete_checkpoints(folder)[:-keep]:
        (old / STATE).unlink()  # first, so that a half-removed one does not count
        shutil.rmtree(old)
    return target


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint as read back."""

    folder: Path
    progress: Progress
    environment: dict[str, Any]
    adapter: dict[str, Tensor]
    average: dict[str, Tensor]
    optimiser: dict[str, Any]


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a complete checkpoint onto the CPU."""
    state = json.loads((folder / STATE).read_text())
    averages = folder / "average.safetensors"
    return Checkpoint(
        folder,
        Progress(**state["progress"]),
        state["environment"],
        load_file(folder / "adapter.safetensors"),
        load_file(averages) if averages.exists() else {},
        torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True),
    )


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that count, oldest first."""
    found = (path for path in folder.glob("step-*") if path.name[5:].isdigit() and (path / STATE).exists())
    return sorted(found, key=lambda path: int(path.name[5:]))


def newest_complete(folder: Path) -> Path | None:
    """The checkpoint to go on from, if any."""
    found = complete_checkpoints(folder)
    return found[-1] if found else None


def cut_metrics(path: Path, step: int) -> None:
    """Drop the lines of ``metrics.jsonl`` after `step`, and a torn last one: those steps come again."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    if len(kept) != len(lines):
        write_text(path, "".join(kept))


def add_to_window(progress: Progress, loss: float, positions: int, padding: int) -> Progress:
    """One more step in the window of the next metrics line."""
    return replace(
        progress,
        window_steps=progress.window_steps + 1,
        window_loss=progress.window_loss + loss,
        window_positions=progress.window_positions + positions,
        window_padding=progress.window_padding + padding,
    )


def empty_window(progress: Progress) -> Progress:
    """The window after its line was written."""
    return replace(progress, window_steps=0, window_loss=0.0, window_positions=0, window_padding=0)


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name, flush to the disk, rename."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with open(partial, "w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    os.replace(partial, path)


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
