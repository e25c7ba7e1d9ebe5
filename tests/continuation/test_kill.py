"""Step 1, killed at any moment and started again, writes the same bytes (contract: continuations)."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.full_disk import run_with_room
from support.step_one import in_a_process, products

from blsp.continuation.writer import write_continuations
from blsp.settings import ContinueSettings

Settings = Callable[..., ContinueSettings]
KILLS = 10
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.truncate", "shutil.rmtree"}  # of the file system


def run_to_the_end(settings: ContinueSettings) -> float:
    """Seconds that it took."""
    begun = time.monotonic()
    process = in_a_process(settings)
    process.join(120)
    assert process.exitcode == 0
    return time.monotonic() - begun


@pytest.fixture
def uninterrupted(tmp_path: Path, settings: Settings) -> tuple[dict[str, bytes], float]:
    """What an undisturbed run writes, and the seconds it takes."""
    seconds = run_to_the_end(settings(tmp_path / "whole.jsonl", top_k=4))
    return products(tmp_path / "whole.jsonl"), seconds


def test_ten_kills_at_random_moments_change_nothing(
    tmp_path: Path, settings: Settings, uninterrupted: tuple[dict[str, bytes], float]
) -> None:
    whole, seconds = uninterrupted
    draw, killed, finished = random.Random(0), 0, 0
    while killed < KILLS:
        out = tmp_path / f"out-{finished}.jsonl"  # a run that outlives its kill is followed by a fresh one
        process = in_a_process(settings(out, top_k=4))
        process.join(draw.uniform(0.05, 0.4) * seconds)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:
            assert products(out) == whole
            finished += 1
    run_to_the_end(settings(out, top_k=4))
    assert products(out) == whole


def die_at(prefix: str, number: int, seen: Path) -> Callable[[], None]:
    """A process's own death just before its `number`-th change of files whose path begins with `prefix`."""

    def watch() -> None:
        count = [0]

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            writes = event == "open" and int(str(arguments[2] or 0)) & (os.O_WRONLY | os.O_RDWR)
            if (writes or event in CHANGES) and str(arguments[0]).startswith(prefix):
                count[0] += 1
                if count[0] == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                os.utime(seen, (count[0], count[0]))

        sys.addaudithook(hook)

    return watch


def test_death_before_a_change_of_the_file_system_changes_nothing(
    tmp_path: Path, settings: Settings, uninterrupted: tuple[dict[str, bytes], float]
) -> None:
    """Not at random: before openings, renamings and removals from the job's first to its last."""
    whole, _ = uninterrupted
    seen = tmp_path / "seen"
    seen.touch()
    process = in_a_process(settings(tmp_path / "count.jsonl", top_k=4), die_at(str(tmp_path / "count"), 0, seen))
    process.join(120)
    changes = int(seen.stat().st_mtime)
    assert process.exitcode == 0 and changes > 20
    for number in range(1, changes + 1, 4):
        out = tmp_path / f"death-{number}.jsonl"
        process = in_a_process(settings(out, top_k=4), die_at(str(out), number, seen))
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        run_to_the_end(settings(out, top_k=4))
        assert products(out) == whole, f"after death before change {number}"


def test_a_full_disk_is_named_and_the_same_command_goes_on(tmp_path: Path, settings: Settings) -> None:
    job = settings(tmp_path / "out.jsonl", top_k=64)  # the answers are larger than the plan
    refused = set()
    for room in (60_000, 150_000):
        if error := run_with_room(lambda: write_continuations(job), room, tmp_path / "told"):
            assert error.startswith(f"DiskFullError: {tmp_path}") and "bytes are free; make room" in error
            refused.add(error.split(": no room")[0].rpartition("/")[2])
    assert refused == {"part-00000.jsonl"}
    write_continuations(job)
    write_continuations(replace(job, out=tmp_path / "whole.jsonl"))
    assert products(job.out) == products(tmp_path / "whole.jsonl")
