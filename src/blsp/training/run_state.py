"""The run folder: settings, checkpoints, progress; and the signal that stops a run.

In:  the adapter, the optimiser, the running average and the progress of a run.
Out: ``checkpoints/step-N/``, complete only when its ``state.json`` exists; the newest complete one read back.
Try: ``newest_complete(Path("runs/x/checkpoints"))``
Flow: training/loop.py saves with this file every few steps, and resumes from it.

All random numbers of a step are a function of (seed, step), so no generator's state is stored. A resumed run has the
same bits only with the same versions, device, threads and processes. All these are stored. A difference is an
error unless --resume-inexact is given; only the number of processes may differ: the batches are the same (law 5).

    OUT/settings.yaml   the resolved settings         OUT/checkpoints/step-N/adapter.safetensors
    OUT/table.json      facts of the measured rows                           average.safetensors
    OUT/metrics.jsonl   one line a logged step                               optimizer.pt
    OUT/adapter/        the result                                           state.json
"""

import glob
import json
import os
import platform
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from blsp.data.files import read_rows, write_atomically, write_text
from blsp.data.jobs import SKIPPED_SUFFIX, JobError, SkippedLog, differences
from blsp.distributed import Runtime, barrier, sum_across
from blsp.settings import TrainSettings

STATE = "state.json"


# --- progress ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Progress:
    """How far a run has come. `window_*`: sums since the last line of metrics.jsonl."""

    step: int = 0
    samples: int = 0
    audio_seconds: float = 0.0
    seconds: float = 0.0
    averaged: int = 0  # steps whose weights are in the running average
    window_steps: int = 0
    window_loss: float = 0.0
    window_positions: int = 0  # of the LLM's sequences (or encoder frames if it is not run), with padding
    window_padding: int = 0  # the padding among them
    window_norm: float = 0.0  # norms of the gradient before clipping


def add_to_window(progress: Progress, loss: float, positions: int, padding: int, norm: float) -> Progress:
    """Add a step to the window of the next metrics line."""
    return replace(
        progress,
        window_steps=progress.window_steps + 1,
        window_loss=progress.window_loss + loss,
        window_positions=progress.window_positions + positions,
        window_padding=progress.window_padding + padding,
        window_norm=progress.window_norm + norm,
    )


def empty_window(progress: Progress) -> Progress:
    """The window after its line was written."""
    return replace(progress, window_steps=0, window_loss=0.0, window_positions=0, window_padding=0, window_norm=0.0)


# --- checkpoints ------------------------------------------------------------------------------------------
def environment(runtime: Runtime) -> dict[str, Any]:
    """The facts that must be equal for two runs to have the same bits."""
    return {
        "blsp": version("blsp"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": runtime.device.type,
        "threads": torch.get_num_threads(),
        "processes": runtime.world,
    }


def check_environment(stored: dict[str, Any], here: dict[str, Any], folder: Path, inexact: bool) -> None:
    """Raise JobError if `here` differs from the environment of the checkpoint, unless `inexact`.

    Another number of processes, which a launcher may choose, changes only rounding, and only a message is printed.
    """
    if stored.get("processes") != here["processes"]:
        print(
            f"{folder}: continues with {here['processes']} processes after {stored.get('processes')}: the same "
            "batches, summed in another order, so the results are close but not equal to the bit",
            file=sys.stderr,
        )
    changed = differences(stored, here, ignore=("processes",))
    if changed and not inexact:
        raise JobError(
            f"{folder}: cannot continue with the same bits ({changed}). Restore that (OMP_NUM_THREADS sets the "
            "threads), or pass --resume-inexact to continue with results that are close but not equal"
        )


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint. average: empty if there is no running average."""

    progress: Progress
    environment: dict[str, Any]
    adapter: dict[str, Tensor]
    average: dict[str, Tensor]
    optimiser: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write ``folder/step-N``, whole or not at all, and remove all but the newest `keep`."""
    target = folder / f"step-{checkpoint.progress.step}"
    needs = tensor_bytes([checkpoint.adapter, checkpoint.average, checkpoint.optimiser])
    state = {"progress": asdict(checkpoint.progress), "environment": checkpoint.environment}
    with write_atomically(target, through=folder / ".partial", durable=True, needs=needs) as partial:
        partial.mkdir(parents=True)
        adapter = {name: tensor.contiguous() for name, tensor in checkpoint.adapter.items()}
        save_file(adapter, partial / "adapter.safetensors")
        if checkpoint.average:
            save_file(checkpoint.average, partial / "average.safetensors")
        torch.save(checkpoint.optimiser, partial / "optimizer.pt")
        (partial / STATE).write_text(json.dumps(state, indent=2) + "\n")
    for old in complete_checkpoints(folder)[:-keep]:
        (old / STATE).unlink()  # first, so that a half-removed checkpoint does not count as complete
        shutil.rmtree(old)
    return target


def tensor_bytes(value: Any) -> int:
    """The bytes of all tensors in a value made of dicts and lists."""
    if isinstance(value, Tensor):
        return value.nbytes
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(tensor_bytes, values))


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a complete checkpoint onto the CPU."""
    state = json.loads((folder / STATE).read_text())
    averages = folder / "average.safetensors"
    return Checkpoint(
        Progress(**state["progress"]),
        state["environment"],
        load_file(folder / "adapter.safetensors"),
        load_file(averages) if averages.exists() else {},
        torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True),
    )


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    steps = (path for path in folder.glob("step-*") if path.name[5:].isdigit() and (path / STATE).exists())
    return sorted(steps, key=lambda path: int(path.name[5:]))


def newest_complete(folder: Path) -> Path | None:
    """The checkpoint to continue from, if there is one."""
    checkpoints = complete_checkpoints(folder)
    return checkpoints[-1] if checkpoints else None


def cut_metrics(path: Path, step: int) -> None:
    """Drop the lines of ``metrics.jsonl`` after `step`, which are computed again, and an incomplete last line."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    if len(kept) != len(lines):
        write_text(path, "".join(kept), durable=True)


# --- the folder -------------------------------------------------------------------------------------------

MAY_CHANGE = frozenset(
    {
        "out",
        "save_every",
        "save_minutes",
        "keep",
        "resume_inexact",
        "collective_minutes",
        "readers",
        "log_to",
        "profile",
        "dry_run",
    }
)  # settings that may differ when a run is resumed
NOT_WRITTEN = frozenset({"config", "stages"})
FILES_MADE_AT_START = ("rows.npy", "held_out.npy", "table.json", "vocabulary.json", "metrics.jsonl")
FOLDERS_MADE_AT_START = ("checkpoints", "validation", "no_speech")


def as_flags(settings: TrainSettings) -> dict[str, Any]:
    """The settings as a YAML mapping of flags, without those that are None or empty."""
    return _given({field.name: getattr(settings, field.name) for field in fields(settings)})


def _given(values: dict[str, Any]) -> dict[str, Any]:
    plain = {name: _plain(value) for name, value in values.items() if name not in NOT_WRITTEN}
    return {name: value for name, value in plain.items() if value is not None and value != []}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def begin_folder(settings: TrainSettings, runtime: Runtime) -> None:
    """Write ``settings.yaml``; raise JobError if the folder's run was started with other settings."""
    if runtime.rank == 0:
        settings.out.mkdir(parents=True, exist_ok=True)
        if newest_complete(settings.out / "checkpoints") is not None:
            _refuse_other_settings(settings)
        else:
            _remove_beginning(settings.out)
        write_text(settings.out / "settings.yaml", dump_flags(as_flags(settings)), durable=True)
    barrier(runtime)


def _remove_beginning(out: Path) -> None:
    """Remove what a run left that was killed before its first checkpoint: it may begin again with other settings."""
    if (out / "settings.yaml").exists():
        for name in FILES_MADE_AT_START:
            (out / name).unlink(missing_ok=True)
        for name in FOLDERS_MADE_AT_START:
            shutil.rmtree(out / name, ignore_errors=True)
    # they lie beside the folder, so they outlive it
    for path in [Path(f"{out}{SKIPPED_SUFFIX}"), *_skipped_of_other_ranks(out)]:
        path.unlink(missing_ok=True)


def _skipped_of_other_ranks(out: Path) -> list[Path]:
    return sorted(out.parent.glob(f"{glob.escape(out.name)}.rank*{SKIPPED_SUFFIX}"))


def _refuse_other_settings(settings: TrainSettings) -> None:
    path = settings.out / "settings.yaml"
    if not path.exists():
        return
    # a folder of an older version does not have newer flags: assume their defaults
    defaults = {field.name: field.default for field in fields(settings) if field.default is not MISSING}
    begun, now = _given(defaults) | yaml.safe_load(path.read_text(encoding="utf-8")), as_flags(settings)
    changed = differences(begun, dict.fromkeys(begun) | now, MAY_CHANGE)
    if changed:
        raise JobError(
            f"{settings.out}: was started with other settings ({changed}). Give the ones it was started with, or "
            f"start a new run with another --out (--init-from {settings.out}/adapter starts from this adapter)"
        )


def dump_flags(flags: dict[str, Any]) -> str:
    """Flags as YAML."""
    return yaml.safe_dump(flags, sort_keys=False, allow_unicode=True)


def is_finished(settings: TrainSettings) -> bool:
    """Whether the run has written its adapter; raises JobError if it was made with other settings."""
    if not (settings.out / "adapter" / "config.json").exists():
        return False
    _refuse_other_settings(settings)
    return True


def merge_skipped(skipped: SkippedLog, out: Path) -> None:
    """Move the rows of the other ranks' skip lists into the first rank's."""
    for path in _skipped_of_other_ranks(out):
        for _, row in read_rows(path):
            skipped.add(row["id"], row["audio"], row["reason"])
        path.unlink()


# --- during a run -----------------------------------------------------------------------------------------
@contextmanager
def deterministic(wanted: bool = True) -> Iterator[None]:
    """Use only deterministic algorithms while the block runs, if they are `wanted`."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at CUDA's first matrix product
    switches: Any = torch.utils.deterministic
    before, filling = torch.are_deterministic_algorithms_enabled(), switches.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    switches.fill_uninitialized_memory = False  # no uninitialised memory is read
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        switches.fill_uninitialized_memory = filling


class StopSignal:
    """SIGTERM and Ctrl-C during a run: the current step is finished and saved, then the run stops.

    A second Ctrl-C stops at once.
    """

    def __init__(self) -> None:
        self.requested = False
        self._interrupted = False
        self._handlers: dict[int, Any] = {}  # the handlers that were set before

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # other threads cannot have handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self._handlers[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _request(self, number: int, _: object) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        self.requested = True

    def sync(self, runtime: Runtime) -> None:
        """Make all ranks stop if one of them got a signal."""
        if runtime.world > 1:
            self.requested = bool(sum_across(torch.tensor(float(self.requested)), runtime).item())

    def raise_if_interrupted(self) -> None:
        """Raise KeyboardInterrupt after Ctrl-C, but not after SIGTERM; called after saving."""
        if self._interrupted:
            raise KeyboardInterrupt
