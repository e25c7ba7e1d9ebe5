"""The features' files: flat float16 shards with an index of fixed-size records, each written by one process.

    NAME.f16   frames of E float16 numbers, clip after clip
    NAME.idx   32 bytes a clip: key (16), offset in bytes (8), frames (4), crc32 of the clip's bytes (4)
    NAME.ok    size and time of both at which every record's checksum was found right, and which were not

A record is written after its bytes, so a killed writer leaves at most bytes without a record or a torn last
record: both are passed over. A shard that changed since its .ok file is read once and checked; damaged
entries are left out of the table, so `blsp encode` makes them again.

Flow:  features.py reads and writes through this.

Letters: T encoder frames of a clip, E encoder width.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from blsp.features.sorted_table import KEY, Table, halves, merged_table, read_log

RECORD = np.dtype([*KEY, ("offset", "<u8"), ("frames", "<u4"), ("crc", "<u4")])
PLACED = np.dtype([*RECORD.descr, ("shard", "<u4")])  # in the merged table
SHARD_BYTES = 8 << 30  # a writer begins another shard after so many
CHECKERS = 4  # shards that are read side by side when they are checked


@dataclass(frozen=True)
class State:
    """What a shard's files looked like when they were checked."""

    bytes: int
    time: int  # nanoseconds
    records: int
    damaged: list[int]  # numbers of the records whose bytes are not what was written


class ShardWriter:
    """Appends clips to shards of its own until closed; every added clip outlives a kill."""

    def __init__(self, folder: Path, width: int, rank: int, on_add: Callable[[bytes], None]) -> None:
        self.folder, self.width, self.rank = folder, width, rank
        self._on_add = on_add
        self._data: BinaryIO | None = None
        self._index: BinaryIO | None = None
        self._offset = 0

    def add(self, key: bytes, states: np.ndarray) -> None:
        """Write one clip's features (T, E) float16 under its key."""
        if states.ndim != 2 or states.shape[1] != self.width or not len(states) or states.dtype != np.float16:
            raise ValueError(
                f"features are (T, {self.width}) float16 here, not {states.shape} {states.dtype}"
            )
        if self._data is None or self._index is None:
            name = f"{self.rank:04}-{time.time_ns():x}-{os.getpid():x}"
            self._data = open(self.folder / f"{name}.f16", "xb", buffering=0)  # noqa: SIM115
            self._index = open(self.folder / f"{name}.idx", "xb", buffering=0)  # noqa: SIM115
            self._offset = 0
        content = np.ascontiguousarray(states).view(np.uint8).reshape(-1).data
        _write_all(self._data, content)
        high, low = halves([key])
        record = np.array([(high[0], low[0], self._offset, len(states), zlib.crc32(content))], dtype=RECORD)
        _write_all(self._index, record.tobytes())
        self._offset += len(content)
        self._on_add(key)
        if self._offset >= SHARD_BYTES:
            self.seal()

    def seal(self) -> None:
        """Close the shard and note that it is whole; the next clip begins another."""
        if self._data is None or self._index is None:
            return
        self._data.close()
        self._index.close()
        path = Path(self._data.name)
        _note(path, _look(path, []))
        self._data = self._index = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seal()


def _write_all(file: BinaryIO, content: bytes | memoryview) -> None:
    written = file.write(content)
    if written != len(content):
        raise OSError(f"{file.name}: {written} of {len(content)} bytes were written; is the disk full?")


def _look(path: Path, damaged: list[int]) -> State:
    records = path.with_suffix(".idx").stat().st_size // RECORD.itemsize
    stat = path.stat()
    return State(stat.st_size, stat.st_mtime_ns, records, damaged)


def _note(path: Path, state: State) -> None:
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial")
    partial.write_text(json.dumps(asdict(state)))
    os.replace(partial, path.with_suffix(".ok"))


def forget_check(path: Path) -> None:
    """Have the shard checked when the cache is opened next."""
    path.with_suffix(".ok").unlink(missing_ok=True)


def open_shards(folder: Path, width: int) -> tuple[list[Path], Table]:
    """All shards, checked where they changed, and the table of their sound entries (see PLACED)."""
    paths = sorted(path for path in folder.glob("*.f16") if path.with_suffix(".idx").exists())
    with ThreadPoolExecutor(CHECKERS) as pool:
        states = list(pool.map(lambda path: _check(path, width), paths))
    looks = [[path.name, *asdict(state).values()] for path, state in zip(paths, states, strict=True)]
    return paths, merged_table(folder, "index", lambda: _sound_records(paths, states), PLACED, looks)


def _check(path: Path, width: int) -> State:
    """The shard's state; its checksums are compared unless that was done for these very files."""
    now = _look(path, [])
    noted = path.with_suffix(".ok")
    if noted.exists():
        known = State(**json.loads(noted.read_text()))
        if (known.bytes, known.time, known.records) == (now.bytes, now.time, now.records):
            return known
    records = read_log(path.with_suffix(".idx"), RECORD)[: now.records]
    data = np.memmap(path, dtype=np.uint8, mode="r") if now.bytes else np.zeros(0, dtype=np.uint8)
    damaged = [number for number, record in enumerate(records) if not is_sound(data, record, width)]
    state = State(now.bytes, now.time, now.records, damaged)
    if os.access(path.parent, os.W_OK):
        _note(path, state)
    return state


def is_sound(data: np.ndarray, record: np.void, width: int) -> bool:
    """Whether the record's bytes are in the shard `data` (bytes,) and are those that were written."""
    begin = int(record["offset"])
    end = begin + int(record["frames"]) * width * 2
    return begin < end <= len(data) and zlib.crc32(data[begin:end].data) == record["crc"]


def _sound_records(paths: list[Path], states: list[State]) -> Iterator[np.ndarray]:
    """A shard's sound records with the shard's number, shard after shard."""
    for number, (path, state) in enumerate(zip(paths, states, strict=True)):
        records = np.delete(read_log(path.with_suffix(".idx"), RECORD)[: state.records], state.damaged)
        placed = np.empty(len(records), dtype=PLACED)
        for field in RECORD.names or ():
            placed[field] = records[field]
        placed["shard"] = number
        yield placed
