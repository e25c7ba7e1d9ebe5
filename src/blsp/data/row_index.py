"""Where each row of a JSONL file starts, kept beside it, and whether its keys are unique.

    >>> index = open_index(Path("train.jsonl"), key=("id",))
    >>> len(index), index.span(0)                      # rows, (first byte, byte after the last)

`train.jsonl.idx` is a header (format, size and time of the source, a checksum of its two ends, the key),
one uint64 offset a row, and the sorted 64-bit hashes of the keys; it is memory-mapped, remade when the
source changes, and appears whole. The file is read once, in blocks, with numpy: line starts and keys are
found on bytes (`row_keys.py`), JSON is parsed only where a row's bytes leave a doubt. Memory does not grow
with the file: what is long lies in files. Two equal hashes are settled by reading the keys themselves.

Letters: n rows.
"""

from __future__ import annotations

import os
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from blsp.data.jsonl import BYTE_ORDER_MARK, ManifestError, parse_row
from blsp.data.row_keys import hash_keys, key_of

INDEX_SUFFIX = ".idx"
MAGIC = int.from_bytes(b"BLSPIDX1", "little")
HEADER = 64  # bytes: magic, size, mtime, checksum, key, rows, 0, 0 (uint64 each)
BLOCK = 4 << 20  # bytes read at a time
LONGEST_LINE = 64 << 20  # bytes; a file without newlines must not be read into memory
BUCKET = 1 << 20  # hashes compared at a time across files
DUPLICATES_SETTLED = 1000  # equal hashes looked at before reporting


@dataclass(frozen=True)
class RowIndex:
    """The rows of one file: `offsets` (n,) uint64 and `hashes` (n,) uint64, sorted, both memory-mapped."""

    path: Path
    key: tuple[str, ...]
    size: int
    offsets: np.ndarray
    hashes: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets)

    def span(self, row: int) -> tuple[int, int]:
        """First byte of the row and the byte after it (its newline and blank lines that follow included)."""
        end = int(self.offsets[row + 1]) if row + 1 < len(self.offsets) else self.size
        return int(self.offsets[row]), end

    def line_number(self, row: int) -> int:
        """The row's line, from 1; reads the file up to it (for messages)."""
        left, line = int(self.offsets[row]), 1
        with open(self.path, "rb") as file:
            while left > 0 and (block := file.read(min(left, BLOCK))):
                line += block.count(b"\n")
                left -= len(block)
        return line


def open_index(path: Path, key: tuple[str, ...]) -> RowIndex:
    """The index beside `path`, made anew if it is missing or stale; refuses keys that occur twice."""
    try:
        header = _expected_header(path, key)
        index = _load(path, key, header)
        return index if index is not None else _build(path, key, header)
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror or error})") from error


def _expected_header(path: Path, key: tuple[str, ...]) -> list[int]:
    """What the index of the file as it is now begins with (without the number of rows)."""
    status = path.stat()
    if not status.st_size:
        raise ManifestError(f"{path}: is empty; a manifest needs at least one row")
    with open(path, "rb") as file:
        ends = file.read(65_536)
        file.seek(max(0, status.st_size - 65_536))
        ends += file.read(65_536)
    key_sum = zlib.crc32("\0".join(key).encode())
    return [MAGIC, status.st_size, status.st_mtime_ns % 2**64, zlib.crc32(ends), key_sum]


def _load(path: Path, key: tuple[str, ...], header: list[int]) -> RowIndex | None:
    """The index that lies beside the file, or None if there is none that fits it."""
    beside = path.with_name(path.name + INDEX_SUFFIX)
    try:
        with open(beside, "rb") as file:
            found = np.frombuffer(file.read(HEADER), dtype="<u8")
            if len(found) != 8 or found[:5].tolist() != header:
                return None
            rows = int(found[5])
            if os.fstat(file.fileno()).st_size != HEADER + 16 * rows:
                return None
            return _map(file, path, key, header[1], rows)
    except (FileNotFoundError, PermissionError):
        return None


def _map(file: IO[bytes], path: Path, key: tuple[str, ...], size: int, rows: int) -> RowIndex:
    arrays = np.asarray(np.memmap(file, dtype="<u8", mode="r", offset=HEADER, shape=(2, rows)))
    return RowIndex(path, key, size, arrays[0], arrays[1])


def _build(path: Path, key: tuple[str, ...], header: list[int]) -> RowIndex:
    """Scan the file, write its index beside it (or into a temporary file where the folder is read-only)."""
    beside = path.with_name(path.name + INDEX_SUFFIX)
    partial = path.with_name(f".{beside.name}.{os.getpid()}.partial")
    try:
        out = open(partial, "wb+")  # noqa: SIM115 (closed below, on both ways)
    except OSError:
        with tempfile.TemporaryFile() as nameless:
            return _fill(nameless, path, key, header)
    try:
        with out:
            index = _fill(out, path, key, header)
        os.replace(partial, beside)
        return index
    finally:
        partial.unlink(missing_ok=True)


def _fill(out: IO[bytes], path: Path, key: tuple[str, ...], header: list[int]) -> RowIndex:
    """Write header, offsets and sorted hashes to `out`, map them, and refuse a key that occurs twice."""
    rows = 0
    with tempfile.TemporaryFile() as hashes:
        out.seek(HEADER)
        for chunk in scan_rows(path, key):
            chunk.offsets.astype("<u8").tofile(out)
            chunk.hashes.astype("<u8").tofile(hashes)
            rows += len(chunk.offsets)
        if not rows:
            raise ManifestError(f"{path}: holds blank lines only; a manifest needs at least one row")
        if _expected_header(path, key) != header:
            raise ManifestError(
                f"{path}: changed while it was being indexed; wait until its writer has finished"
            )
        hashes.seek(0)
        while block := hashes.read(BLOCK):
            out.write(block)
    out.seek(0)
    out.write(np.array([*header, rows, 0, 0], dtype="<u8").tobytes())
    out.flush()
    unsorted = np.memmap(out, dtype="<u8", mode="r+", offset=HEADER + 8 * rows, shape=(rows,))
    unsorted.sort()  # in place, in the file's own pages: no memory of ours
    unsorted.flush()
    index = _map(out, path, key, header[1], rows)
    _refuse_duplicates([index])
    return index


# --- scanning ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scanned:
    """Some rows of a file: where they start, their key's hash, their line number; (n,) each."""

    offsets: np.ndarray
    hashes: np.ndarray
    lines: np.ndarray


def scan_rows(path: Path, key: tuple[str, ...]) -> Iterator[Scanned]:
    """All rows of the file, some thousand at a time, in bounded memory."""
    place, line = 0, 1
    for data in _whole_lines(path, path.stat().st_size):
        body = data.removeprefix(BYTE_ORDER_MARK) if place == 0 else data
        yield _scan_block(body, place + len(data) - len(body), line, path, key)
        place += len(data)
        line += data.count(b"\n")


def _whole_lines(path: Path, size: int) -> Iterator[bytes]:
    """The file's first `size` bytes (it may be growing) in blocks that end with a newline.

    A last row without a newline is checked, and given one.
    """
    carry = b""
    with open(path, "rb") as file:
        while block := file.read(min(BLOCK, size - file.tell())):
            cut = block.rfind(b"\n") + 1
            if cut:
                yield carry + block[:cut]
                carry = block[cut:]
            else:
                carry += block
            if len(carry) > LONGEST_LINE:
                raise ManifestError(f"{path}: a line is longer than {LONGEST_LINE >> 20} MB; is this JSONL?")
    if carry:
        last = carry.removeprefix(BYTE_ORDER_MARK)
        if last.strip():
            with open(path, "rb") as file:
                line = 1 + sum(1 for piece in file if piece.endswith(b"\n"))
            parse_row(last, f"{path}:{line}")  # a torn last row is refused at once
        yield carry + b"\n"


def _scan_block(data: bytes, place: int, line: int, path: Path, key: tuple[str, ...]) -> Scanned:
    """The rows in `data` (whole lines), which begins at byte `place`, line `line` of the file."""
    buffer = np.frombuffer(data, dtype=np.uint8)
    ends = np.flatnonzero(buffer == 10)  # (n,)
    starts = np.concatenate([[0], ends[:-1] + 1])
    odd = np.flatnonzero(buffer[starts] != ord("{"))  # blank lines, mostly
    blank = [int(i) for i in odd if not data[starts[i] : ends[i]].strip()]
    kept = np.ones(len(starts), dtype=bool)
    kept[blank] = False
    hashes, certain = hash_keys(buffer, starts, ends, key)
    for i in np.flatnonzero(kept & ~certain):
        row = parse_row(data[starts[i] : ends[i] + 1], f"{path}:{line + i}")
        hashes[i] = key_of(row, key, f"{path}:{line + i}")[1]
    lines = line + np.flatnonzero(kept)
    return Scanned((place + starts[kept]).astype(np.uint64), hashes[kept], lines)


# --- uniqueness -------------------------------------------------------------------------------------------


def refuse_shared_keys(indexes: Sequence[RowIndex]) -> None:
    """Refuse keys that occur in two of the files (within each file `open_index` has looked already)."""
    if len(indexes) > 1:
        _refuse_duplicates(indexes)


def _refuse_duplicates(indexes: Sequence[RowIndex]) -> None:
    repeated: list[np.ndarray] = []
    found = 0
    for hashes in _sorted_buckets([index.hashes for index in indexes]):
        twice = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
        repeated.append(twice)
        found += len(twice)
        if found >= DUPLICATES_SETTLED:
            break
    if found:
        _settle(indexes, np.concatenate(repeated)[:DUPLICATES_SETTLED])


def _sorted_buckets(arrays: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """All values of the sorted (n,) uint64 arrays in ascending order, about `BUCKET` at a time; equal ones
    together."""
    buckets = 1 + sum(len(array) for array in arrays) // BUCKET
    edges = np.array([(2**64 // buckets) * i for i in range(1, buckets)], dtype=np.uint64)
    cuts = [np.concatenate([[0], np.searchsorted(array, edges), [len(array)]]) for array in arrays]
    for i in range(buckets):
        bucket = np.concatenate([array[cut[i] : cut[i + 1]] for array, cut in zip(arrays, cuts, strict=True)])
        bucket.sort()
        yield bucket


def _settle(indexes: Sequence[RowIndex], hashes: np.ndarray) -> None:
    """Read the rows behind equal hashes; raise if two keys are really the same."""
    seen: dict[tuple[str, ...], str] = {}
    for index in indexes:
        with open(index.path, "rb") as file:
            for chunk in scan_rows(index.path, index.key):
                for i in np.flatnonzero(np.isin(chunk.hashes, hashes)):
                    where = f"{index.path}:{chunk.lines[i]}"
                    file.seek(int(chunk.offsets[i]))
                    values, _ = key_of(parse_row(file.readline(), where), index.key, where)
                    if values in seen:
                        shown = ", ".join(f'"{n}" {v!r}' for n, v in zip(index.key, values, strict=True))
                        raise ManifestError(
                            f"{where}: {shown} stands at {seen[values]} already; it must be unique"
                        )
                    seen[values] = where
