"""A disk that is full: work in a process whose files may not grow beyond some bytes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path


def run_with_room(work: Callable[[], object], largest: int, told: Path) -> str:
    """Do `work` in a forked process whose files hold at most `largest` bytes; its error, "" where it ended well.

    The system refuses to write on as it does on a full disk, with another error number (as FAT does at 4 GB).
    """

    def limited() -> None:
        import resource

        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        os.dup2(devnull, 2)
        told.write_text("")
        message = told.open("r+")  # opened before the limit holds; the message is short
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
        try:
            work()
        except Exception as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            message.write(f"{type(error).__name__}: {error}")
            message.flush()
            os._exit(1)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=limited)
    process.start()
    process.join(120)
    assert process.exitcode in (0, 1), process.exitcode
    return told.read_text()
