"""A run's folder and the process around it: begun, gone on with, left, finished.

In:  `TrainSettings` and the place. Out: ``settings.yaml`` checked or written; stages put together at their
     end.
Try: ``is_finished(settings)``
Flow: training/loop.py opens and closes a run with these.

``settings.yaml`` holds the resolved flags and can be given back to ``blsp train --config``.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml

from blsp.model.distributed import Place, barrier, sum_across
from blsp.settings import TrainSettings
from blsp.training.curves import draw
from blsp.training.run_state import ResumeError, newest_complete, write_text

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


def begin_folder(settings: TrainSettings, place: Place) -> None:
    """Write ``settings.yaml``; in a folder that was begun with other settings, refuse (`ResumeError`)."""
    if place.rank == 0:
        settings.out.mkdir(parents=True, exist_ok=True)
        if newest_complete(settings.out / "checkpoints") is not None:
            _refuse_other_settings(settings)
        elif (settings.out / "settings.yaml").exists():  # nothing learnt yet: what a killed start left goes
            for name in ("rows.npy", "held_out.npy", "table.json", "vocabulary.json", "metrics.jsonl"):
                (settings.out / name).unlink(missing_ok=True)
            shutil.rmtree(settings.out / "checkpoints", ignore_errors=True)
        write_text(settings.out / "settings.yaml", _dump(as_flags(settings)))
    barrier(place)


@contextmanager
def claimed(folder: Path, place: Place) -> Iterator[None]:
    """Keep a second run out of the folder for as long as this one lasts; a killed one leaves nothing behind."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as lock:
        if place.rank == 0:
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


class Leaving:
    """Hears SIGTERM and Ctrl-C while a run lasts: the step under way is finished and saved first.

    A second Ctrl-C leaves at once.
    """

    def __init__(self) -> None:
        self.asked = False
        self._interrupted = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Leaving:
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

    def agree(self, place: Place) -> None:
        """All ranks leave when one is asked to."""
        if place.world > 1:
            self.asked = bool(sum_across(torch.tensor(float(self.asked)), place).item())

    def raise_if_interrupted(self) -> None:
        """After saving: SIGTERM leaves with 0, Ctrl-C as an interruption."""
        if self._interrupted:
            raise KeyboardInterrupt
