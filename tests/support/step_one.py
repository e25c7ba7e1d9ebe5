"""Reading the files of step 1, and running it in a process that can be killed."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

from blsp.continuation.writer import write_continuations
from blsp.settings import ContinueSettings


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_header(out: Path) -> dict[str, Any]:
    return json.loads(Path(f"{out}.meta.json").read_text(encoding="utf-8"))


def products(out: Path) -> dict[str, bytes]:
    """Every file that belongs to `out`, by its name after `out`'s; the offset index aside."""
    files = [path for path in sorted(out.parent.rglob("*")) if path.is_file() and path.suffix != ".idx"]
    prefix = str(out)
    return {str(path)[len(prefix) :]: path.read_bytes() for path in files if str(path).startswith(prefix)}


def in_a_process(settings: ContinueSettings, before: Callable[[], None] | None = None) -> ForkProcess:
    """Start step 1 in a forked process (nothing is imported again), without its output."""

    def run() -> None:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        if before:
            before()
        write_continuations(settings)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process
