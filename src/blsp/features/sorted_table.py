"""A table of fixed-size records on disk, sorted by a 16-byte key, searched without being read into memory.

Writers append records to logs of their own and need no locks; a reader merges the logs, once, into a table
whose name is a hash of what was merged, so a table is never out of date. Ten million records cost a reader
some page cache and no memory of its own: the merge deals records into buckets by their key's first bits and
sorts one bucket at a time.

    >>> table = merged_table(folder, "index", lambda: map(read, logs), dtype, looks=["a.idx", 320])
    >>> table.find([key])              # (m,) int64, -1 where there is none

Flow:  feature_shards.py (where a clip's features lie) and content_hashes.py (a file's hash) both keep one.

Letters: n records, m keys that are looked up.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

KEY = [("high", "<u8"), ("low", "<u8")]  # how every record begins: the key's two halves
CHUNK = 1 << 18  # records in memory at a time
BUCKET = 1 << 16  # records that are sorted at a time, on average
SUFFIX = ".sorted"


@dataclass(frozen=True)
class Table:
    """Records in the order of their keys; both arrays are memory-mapped."""

    high: np.ndarray  # (n,) the keys' first halves, side by side for the binary search
    records: np.ndarray  # (n,)

    def __len__(self) -> int:
        return len(self.high)

    def find(self, keys: Sequence[bytes]) -> np.ndarray:
        """(m,) int64: each key's place in the table, or -1."""
        high, low = halves(keys)
        places = np.searchsorted(self.high, high)
        found = np.full(len(high), -1, dtype=np.int64)
        open_ = np.arange(len(high))
        while len(open_):  # a second round only where two keys share 64 bits
            open_ = open_[places[open_] < len(self)]
            open_ = open_[self.high[places[open_]] == high[open_]]
            same = self.records["low"][places[open_]] == low[open_]
            found[open_[same]] = places[open_[same]]
            open_ = open_[~same]
            places[open_] += 1
        return found


def halves(keys: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Keys of 16 bytes as two arrays (m,) uint64."""
    pairs = np.frombuffer(b"".join(keys), dtype="<u8").reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def read_log(path: Path, dtype: np.dtype) -> np.ndarray:
    """The whole records of a log, memory-mapped; a torn last one does not count."""
    count = path.stat().st_size // dtype.itemsize
    return np.memmap(path, dtype=dtype, mode="r", shape=(count,)) if count else np.zeros(0, dtype=dtype)


def merged_table(
    folder: Path, name: str, logs: Callable[[], Iterable[np.ndarray]], dtype: np.dtype, looks: list[Any]
) -> Table:
    """The table of all records that `logs()` yields, array after array, each time it is called.

    It is made unless the one of just these `looks` (names and sizes of the logs) is there. Of equal keys one
    stays. Where the folder may not be written the table goes to the system's folder for temporary files.
    """
    digest = hashlib.blake2b(json.dumps([str(dtype.descr), looks]).encode(), digest_size=16).hexdigest()
    path = folder / f"{name}-{digest}{SUFFIX}"
    if path.exists():
        return open_table(path, dtype)
    if not os.access(folder, os.W_OK):
        path = Path(tempfile.gettempdir()) / f"blsp-{path.name}"
        warnings.warn(f"{folder} cannot be written; its index goes to {path}", stacklevel=2)
        if path.exists():
            return open_table(path, dtype)
    _write_table(path, logs, dtype)
    table = open_table(path, dtype)
    for outdated in folder.glob(f"{name}-*{SUFFIX}"):
        if outdated.name != path.name and path.parent == folder:
            outdated.unlink(missing_ok=True)  # who has it open keeps it
    return table


def open_table(path: Path, dtype: np.dtype) -> Table:
    count = path.stat().st_size // (8 + dtype.itemsize)
    if not count:
        return Table(np.zeros(0, dtype="<u8"), np.zeros(0, dtype=dtype))
    high = np.memmap(path, dtype="<u8", mode="r", shape=(count,))
    return Table(high, np.memmap(path, dtype=dtype, mode="r", shape=(count,), offset=8 * count))


def _write_table(path: Path, logs: Callable[[], Iterable[np.ndarray]], dtype: np.dtype) -> None:
    """All keys' first halves, then all records, in the order of the keys."""
    total = sum(map(len, logs()))
    scratch_path = path.with_name(f".{path.name}.{os.getpid()}.scratch")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as out:
            if total:
                scratch = np.memmap(scratch_path, dtype=dtype, mode="w+", shape=(total,))
                kept = _sort_buckets(scratch, _deal(scratch, logs))
                for column in (scratch["high"][:kept], scratch[:kept]):
                    for chunk in _chunks(column):
                        out.write(chunk.tobytes())
        os.replace(partial, path)
    finally:
        scratch_path.unlink(missing_ok=True)
        partial.unlink(missing_ok=True)


def _chunks(log: np.ndarray) -> Iterator[np.ndarray]:
    for begin in range(0, len(log), CHUNK):
        yield np.asarray(log[begin : begin + CHUNK])


def _deal(scratch: np.ndarray, logs: Callable[[], Iterable[np.ndarray]]) -> np.ndarray:
    """Put every record into its bucket's stretch of `scratch`; return the stretches' ends."""
    bits = max(0, (len(scratch) // BUCKET).bit_length())
    shift = np.uint64(63 - bits)  # in two steps: a shift by 64 is not defined

    def bucket_of(chunk: np.ndarray) -> np.ndarray:
        return (chunk["high"] >> shift >> np.uint64(1)).astype(np.int64)

    counts = np.zeros(1 << bits, dtype=np.int64)
    for chunk in (chunk for log in logs() for chunk in _chunks(log)):
        counts += np.bincount(bucket_of(chunk), minlength=len(counts))
    ends = np.cumsum(counts)
    free = ends - counts
    for chunk in (chunk for log in logs() for chunk in _chunks(log)):
        buckets = bucket_of(chunk)
        order = np.argsort(buckets, kind="stable")
        chunk, buckets = chunk[order], buckets[order]
        present, begins = np.unique(buckets, return_index=True)
        for bucket, begin, end in zip(present, begins, [*begins[1:], len(chunk)], strict=True):
            scratch[free[bucket] : free[bucket] + end - begin] = chunk[begin:end]
            free[bucket] += end - begin
    return ends


def _sort_buckets(scratch: np.ndarray, ends: np.ndarray) -> int:
    """Sort each bucket and close the gaps that equal keys leave; return how many records are left."""
    kept = 0
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        bucket = np.array(scratch[begin:end])
        bucket = bucket[np.lexsort((bucket["low"], bucket["high"]))]
        if len(bucket):
            new = (bucket["high"][1:] != bucket["high"][:-1]) | (bucket["low"][1:] != bucket["low"][:-1])
            bucket = bucket[np.concatenate([[True], new])]
        scratch[kept : kept + len(bucket)] = bucket
        kept += len(bucket)
    return kept
