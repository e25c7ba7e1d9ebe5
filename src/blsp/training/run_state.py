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

import fcntl
import json
import os
import platform
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from blsp.distributed import Runtime, barrier, sum_across
from blsp.settings import TrainSettings
from blsp.training.curves import draw

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


FREE = frozenset(
    {"out", "save_every", "save_minutes", "keep", "resume_inexact"}
)  # may change when a run goes on
NOT_WRITTEN = frozenset({"config", "stages"})


def as_flags(settings: TrainSettings) -> dict[str, Any]:
    """The settings as a YAML mapping of flags; what is left out at the command line is left out here."""
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    plain = {name: _plain(value) for name, value in values.items() if name not in NOT_WRITTEN}
    return {name: value for name, value in plain.items() if value is not None and value != []}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def begin_folder(settings: TrainSettings, runtime: Runtime) -> None:
    """Write ``settings.yaml``; in a folder that was begun with other settings, refuse (`ResumeError`)."""
    if runtime.rank == 0:
        settings.out.mkdir(parents=True, exist_ok=True)
        if newest_complete(settings.out / "checkpoints") is not None:
            _refuse_other_settings(settings)
        elif (settings.out / "settings.yaml").exists():  # nothing learnt yet: what a killed start left goes
            for name in ("rows.npy", "held_out.npy", "table.json", "vocabulary.json", "metrics.jsonl"):
                (settings.out / name).unlink(missing_ok=True)
            shutil.rmtree(settings.out / "checkpoints", ignore_errors=True)
        write_text(settings.out / "settings.yaml", _dump(as_flags(settings)))
    barrier(runtime)


@contextmanager
def claimed(folder: Path, runtime: Runtime) -> Iterator[None]:
    """Keep a second run out of the folder for as long as this one lasts; a killed one leaves nothing behind."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as lock:
        if runtime.rank == 0:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ResumeError(
                    f"{folder}: another process is training here; wait for it, stop it, or choose another --out"
                ) from error
        yield


def _refuse_other_settings(settings: TrainSettings) -> None:
    path = settings.out / "settings.yaml"
    if not path.exists():
        return
    begun, now = yaml.safe_load(path.read_text(encoding="utf-8")), as_flags(settings)
    names = [name for name in {**begun, **now} if name not in FREE and begun.get(name) != now.get(name)]
    if names:
        told = ", ".join(f"{name} {begun.get(name)} -> {now.get(name)}" for name in names)
        raise ResumeError(
            f"{settings.out}: was begun with other settings ({told}). Give the ones it was begun with, or "
            f"begin a new run with another --out (--init-from {settings.out}/adapter builds on this one)"
        )


def _dump(flags: dict[str, Any]) -> str:
    return yaml.safe_dump(flags, sort_keys=False, allow_unicode=True)


def is_finished(settings: TrainSettings) -> bool:
    """Whether the run has written its adapter; one that was made with other settings is refused."""
    if not (settings.out / "adapter" / "config.json").exists():
        return False
    _refuse_other_settings(settings)
    return True


def finish_stages(settings: TrainSettings) -> None:
    """The last stage's adapter, all stages' metrics and one picture, in the folder of the whole recipe."""
    last = settings.stages[-1].out / "adapter"
    fresh = settings.out / ".adapter.writing"
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(last, fresh)
    shutil.rmtree(settings.out / "adapter", ignore_errors=True)
    fresh.rename(settings.out / "adapter")
    lines, before = [], 0
    for stage in settings.stages:
        rows = [
            json.loads(line)
            for line in (stage.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        lines += [
            json.dumps(row | {"step": row["step"] + before, "stage": stage.out.name}) + "\n" for row in rows
        ]
        before += rows[-1]["step"]
    write_text(settings.out / "metrics.jsonl", "".join(lines))
    draw(settings.out / "metrics.jsonl", settings.out / "curves.png")
    stages = [{"name": stage.out.name} | _without(as_flags(stage), "out") for stage in settings.stages]
    write_text(settings.out / "settings.yaml", _dump({"out": str(settings.out), "stages": stages}))
    print(f"{settings.out}: all {len(stages)} stages are finished; the adapter is {settings.out / 'adapter'}")


def _without(flags: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in flags.items() if key != name}


@contextmanager
def deterministic() -> Iterator[None]:
    """Only algorithms that give the same bits each time, while a run lasts."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA's first product is made
    switches: Any = torch.utils.deterministic
    before, filling = torch.are_deterministic_algorithms_enabled(), switches.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    switches.fill_uninitialized_memory = False  # we read no uninitialised memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        switches.fill_uninitialized_memory = filling


class StopSignal:
    """Hears SIGTERM and Ctrl-C while a run lasts: the step under way is finished and saved first.

    A second Ctrl-C leaves at once.
    """

    def __init__(self) -> None:
        self.asked = False
        self._interrupted = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if (
            threading.current_thread() is threading.main_thread()
        ):  # others cannot have handlers, nor need them
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, _: object) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        self.asked = True

    def agree(self, runtime: Runtime) -> None:
        """All ranks leave when one is asked to."""
        if runtime.world > 1:
            self.asked = bool(sum_across(torch.tensor(float(self.asked)), runtime).item())

    def raise_if_interrupted(self) -> None:
        """After saving: SIGTERM leaves with 0, Ctrl-C as an interruption."""
        if self._interrupted:
            raise KeyboardInterrupt
