"""Index of a manifest's rows: the first byte of each row, and a check that their keys are unique.

In:  a JSONL file, and the names of the fields that together must be unique.
Out: `NAME.idx` beside it, an SQLite database that is made once, and again when the file changes.
Try: `index = open_index(Path("train.jsonl"), ("id",)); len(index), index.starts(0, 3)`
Flow: **row_index.py** → `manifest.py` reads rows with it. Memory does not grow with the file.

    source (stamp, rows, bytes)      one row: which version of the file, and its length
    rows (row, start, key)           a row's number, its first byte, a digest of its key

An index is written atomically and never changed, so any number of processes may read it without locks. If the folder
cannot be written, the index is a temporary file.
"""

import hashlib
import heapq
import json
import os
import sqlite3
import tempfile
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

from blsp.data.files import BYTE_ORDER_MARK, ManifestError, parse_row, read_ends, show, write_atomically

INDEX_SUFFIX = ".idx"
FORMAT = 2  # 1 was not a database
LONGEST_LINE = 64 << 20  # bytes; a file without newlines must not be read into memory
FIRST_REPEATED = """
    SELECT MIN(row), second FROM rows JOIN (
        SELECT key AS twice, row AS second FROM (
            SELECT key, row, ROW_NUMBER() OVER (PARTITION BY key ORDER BY row) AS nth FROM rows
        ) WHERE nth = 2 ORDER BY row LIMIT 1
    ) ON key = twice
"""


class RowIndex:
    """The rows of one file, in the file's order, from 0."""

    def __init__(self, path: Path, key: tuple[str, ...], table: sqlite3.Connection, rows: int, size: int) -> None:
        self.path, self.key, self.size = path, key, size  # size in bytes
        self._table, self._rows = table, rows
        self._turn = threading.Lock()  # threads that run one statement at once get each other's rows

    def __len__(self) -> int:
        return self._rows

    def starts(self, first: int, last: int) -> list[int]:
        """First byte of each existing row from `first` to `last` (excluded)."""
        query = "SELECT start FROM rows WHERE row >= ? AND row < ? ORDER BY row"
        with self._turn:
            return [start for (start,) in self._table.execute(query, (first, last))]

    def keys(self, number: int) -> Iterator[tuple[bytes, int, int]]:
        """(digest of the key, `number`, row), sorted; for one thread."""
        for key, row in self._table.execute("SELECT key, row FROM rows ORDER BY key"):
            yield key, number, row

    def where(self, row: int) -> str:
        """FILE:LINE of a row, for messages; reads the file up to it."""
        (left,), line = self.starts(row, row + 1), 1
        with open(self.path, "rb") as file:
            while left and (block := file.read(min(left, 1 << 20))):
                line += block.count(b"\n")
                left -= len(block)
        return f"{self.path}:{line}"

    def refusal(self, row: int, first: "RowIndex", first_row: int) -> ManifestError:
        """The error about a row whose key another row has already."""
        (start,) = self.starts(row, row + 1)
        with open(self.path, "rb") as file:
            file.seek(start)
            values = key_values(parse_row(file.readline(), ""), self.key)
        shown = ", ".join(f'"{name}" {value!r}' for name, value in zip(self.key, values, strict=True))
        return ManifestError(f"{self.where(row)}: {shown} is in {first.where(first_row)} already; it must be unique")


def open_index(path: Path, key: tuple[str, ...]) -> RowIndex:
    """The index beside `path`, made if it is missing or stale; raises ManifestError for keys that occur twice."""
    beside = index_path(path)
    try:
        stamp = _stamp(path, key)
        index = _load(beside, path, key, stamp)
        if index is None:
            try:
                with write_atomically(beside) as database:
                    _build(database, path, key, stamp)
                index = _load(beside, path, key, stamp)
            except (OSError, sqlite3.OperationalError):
                pass  # the folder cannot be written
        return index or _temporary(path, key, stamp)
    except (OSError, sqlite3.Error) as error:
        raise ManifestError(f"{path}: cannot be read ({error})") from error


def index_path(path: Path) -> Path:
    """The path of a manifest's index. The index stays valid if both are renamed."""
    return path.with_name(path.name + INDEX_SUFFIX)


def _stamp(path: Path, key: tuple[str, ...]) -> str:
    """A text that identifies this version of the file: size, time, and a checksum of its two ends."""
    size, ends = read_ends(path)
    if not size:
        raise ManifestError(f"{path}: is empty; a manifest needs at least one row")
    return json.dumps([FORMAT, size, path.stat().st_mtime_ns, zlib.crc32(ends), key])


def _load(database: Path, path: Path, key: tuple[str, ...], stamp: str) -> RowIndex | None:
    """The index in `database`, or None if it is missing, damaged, or of another version of the file."""
    try:
        uri = f"file:{quote(os.fspath(database.absolute()))}?mode=ro&immutable=1"
        table = sqlite3.connect(uri, uri=True, check_same_thread=False)  # RowIndex lets threads take turns
        ((pages,),) = table.execute("PRAGMA page_count")
        ((page_bytes,),) = table.execute("PRAGMA page_size")
        ((begun, rows, size),) = table.execute("SELECT stamp, rows, bytes FROM source")
        if begun != stamp or database.stat().st_size != pages * page_bytes:
            return None
        table.execute(f"PRAGMA mmap_size = {2**31 - 65_536}")  # read the system's pages, also after a fork
    except (OSError, ValueError, sqlite3.Error):  # missing, damaged, or of another format
        return None
    return RowIndex(path, key, table, rows, size)


def _temporary(path: Path, key: tuple[str, ...], stamp: str) -> RowIndex:
    """An index in a temporary file, which is removed as soon as it is open."""
    with tempfile.TemporaryDirectory(prefix="blsp-", ignore_cleanup_errors=True) as folder:
        database = Path(folder) / "rows.idx"
        _build(database, path, key, stamp)
        index = _load(database, path, key, stamp)
    if index is None:
        raise ManifestError(f"{path}: its index cannot be read again in the temporary folder; is a disk full?")
    return index


def _build(database: Path, path: Path, key: tuple[str, ...], stamp: str) -> None:
    """Scan the file and write its index; refuse a key that occurs twice."""
    with closing(sqlite3.connect(database, isolation_level=None)) as table:
        # A half-written index is never read, so it needs no journal. Sorting uses temporary files.
        for setting in ("journal_mode = OFF", "synchronous = OFF", "temp_store = FILE", "cache_size = -8000"):
            table.execute(f"PRAGMA {setting}")
        table.execute("BEGIN")
        table.execute("CREATE TABLE source (stamp TEXT, rows INTEGER, bytes INTEGER)")
        table.execute("CREATE TABLE rows (row INTEGER PRIMARY KEY, start INTEGER, key BLOB)")
        size = path.stat().st_size
        rows = _scan(path, key, size)
        count = table.executemany("INSERT INTO rows VALUES (?, ?, ?)", rows).rowcount
        if count < 1:
            raise ManifestError(f"{path}: holds blank lines only; a manifest needs at least one row")
        if _stamp(path, key) != stamp:
            raise ManifestError(f"{path}: changed while it was being indexed; wait until its writer has finished")
        try:
            table.execute("CREATE UNIQUE INDEX keys ON rows (key)")  # an external sort: flat memory
        except sqlite3.IntegrityError:
            index = RowIndex(path, key, table, count, size)
            first, second = table.execute(FIRST_REPEATED).fetchone()
            raise index.refusal(second, index, first) from None
        table.execute("INSERT INTO source VALUES (?, ?, ?)", (stamp, count, size))
        table.execute("COMMIT")


def _scan(path: Path, key: tuple[str, ...], size: int) -> Iterator[tuple[int, int, bytes]]:
    """(number, first byte, digest of the key) of each row in the first `size` bytes of a file that may grow."""
    number, start, line = 0, 0, 0
    with open(path, "rb") as file:
        while start < size and (raw := file.readline(LONGEST_LINE)):
            line += 1
            if len(raw) == LONGEST_LINE:
                raise ManifestError(f"{path}: a line is longer than {LONGEST_LINE >> 20} MB; is this JSONL?")
            row = raw.removeprefix(BYTE_ORDER_MARK) if start == 0 else raw
            if row.strip():
                try:
                    yield number, start + len(raw) - len(row), _key_digest(parse_row(row, ""), key)
                except ManifestError as error:
                    raise ManifestError(f"{path}:{line}{error}") from None
                number += 1
            start += len(raw)


def key_values(row: dict[str, Any], key: tuple[str, ...]) -> list[str]:
    """The values of a row's key; fields other than "id" may be missing."""
    values = []
    for name in key:
        value = row.get(name)
        if value is None and name != "id":
            value = ""
        if not isinstance(value, str) or (name == "id" and not value):
            raise ManifestError(f': "{name}" must be a string that is not empty, not {show(value)}')
        values.append(value)
    return values


def _key_digest(row: dict[str, Any], key: tuple[str, ...]) -> bytes:
    """16 bytes that are equal for equal keys."""
    values = key_values(row, key)
    text = values[0] if len(values) == 1 else json.dumps(values)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def refuse_shared_keys(indexes: Sequence[RowIndex]) -> None:
    """Raise ManifestError if two files hold the same key, by merging their sorted keys."""
    before: tuple[bytes, int, int] = (b"", 0, 0)
    for entry in heapq.merge(*(index.keys(number) for number, index in enumerate(indexes))):
        if entry[0] == before[0]:
            (_, first_file, first_row), (_, file, row) = before, entry
            raise indexes[file].refusal(row, indexes[first_file], first_row)
        before = entry
