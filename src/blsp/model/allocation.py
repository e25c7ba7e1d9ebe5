"""Memory on a CPU: what a freed tensor leaves behind is kept for the next one, in large pages.

In:  nothing. Out: the process' allocator is set; True where that was possible.
Try: `keep_freed_memory()` before the first tensor is made
Flow: training/loop.py calls it first on a CPU, and so do the benchmarks: a step that gives gigabytes of
      activations back to the system and asks for them again has every page zeroed again, one fault for
      each 4 kB: a sixth of its time (docs/log.md, 2026-11-24). The server, whose tensors are small and of every
      length, gives back instead what lies free between others (`give_back_freed_memory`). No number changes.
"""

from __future__ import annotations

import ctypes
import os
import platform

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # mallopt's names for them (malloc.h of glibc)
NEVER = 2**31 - 1  # bytes at the heap's end that may lie free
GROWTH = 2**26  # bytes by which the heap grows at least
LARGEST_KEPT = 2**30  # bytes: larger blocks come from the system and go back to it


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed, and torch ask for huge pages; elsewhere nothing happens: False.

    The resident size then stays where the largest step has brought it. torch reads its switch once, with its
    first tensor.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    libc = ctypes.CDLL(None)
    wanted = {MMAP_THRESHOLD: LARGEST_KEPT, TRIM_THRESHOLD: NEVER, TOP_PAD: GROWTH}
    return all([libc.mallopt(name, value) == 1 for name, value in wanted.items()])


def give_back_freed_memory() -> bool:
    """Let glibc return free pages to the system, those between pages in use too; elsewhere False."""
    if platform.libc_ver()[0] != "glibc":
        return False
    ctypes.CDLL(None).malloc_trim(0)
    return True
