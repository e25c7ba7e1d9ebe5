"""JSONL in and out: one JSON object a line, checked on the way in, whole or absent on the way out.

    >>> for line, row in read_rows("train.jsonl"): ...
    >>> with RowLog("out.jsonl") as log: log.append({"id": "a"})
    >>> with SkippedLog("out.jsonl") as skipped: skipped.add("b", "b.wav", "no such file")

Below the manifest (`manifest.py`): nothing here knows what an utterance is. Whatever is wrong with a line
is a `ManifestError` that names the file, the line and the way out. `RowLog` and `SkippedLog` are how the
long jobs write, so that a killed run goes on where it stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

SKIPPED_SUFFIX = ".skipped.jsonl"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class ManifestError(ValueError):
    """A manifest or one of its rows is not usable; the message names the file, the line and the way out."""


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


DECODER = json.JSONDecoder(
    parse_constant=_refuse_constant
)  # one for all rows: json.loads would make one a row


def read_rows(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, JSON object) of every row of one file, streaming; blank lines are passed over."""
    try:
        with open(path, "rb") as lines:
            for number, raw in enumerate(lines, start=1):
                if number == 1:
                    raw = raw.removeprefix(BYTE_ORDER_MARK)
                if raw.strip():
                    yield number, parse_row(raw, f"{os.fspath(path)}:{number}")
    except (OSError, ValueError) as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError(f"{os.fspath(path)!r}: cannot be read ({error})") from error


def parse_row(raw: bytes, where: str) -> dict[str, Any]:
    """One line of JSONL as a JSON object; anything else is a `ManifestError` that begins with `where`."""
    try:
        text = raw.decode("utf-8")
        row = DECODER.decode(text)
        if "\\u" in text:
            json.dumps(row, ensure_ascii=False).encode(
                "utf-8"
            )  # half of a surrogate pair cannot be written again
    except UnicodeDecodeError as error:
        raise ManifestError(
            f"{where}: is not UTF-8 (byte {error.start}); convert the file to UTF-8"
        ) from error
    except UnicodeEncodeError as error:
        raise ManifestError(
            f"{where}: holds half of a surrogate pair (\\ud800…); write the character whole"
        ) from error
    except json.JSONDecodeError as error:
        torn = (
            ""
            if raw.endswith(b"\n")
            else "; the file ends in the middle of this row: remove it or write it again"
        )
        raise ManifestError(f"{where}: is not JSON ({error.msg} at column {error.colno}){torn}") from error
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{where}: is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise ManifestError(f"{where}: must be a JSON object {{...}}, not {show(row)}")
    return row


def show(value: Any) -> str:
    """A value as messages print it: short."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def dump_row(row: dict[str, Any], where: str) -> bytes:
    """One line of JSONL, newline included."""
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise ManifestError(
            f"{where}: the row {show(row.get('id'))} cannot be written as JSON ({error})"
        ) from error


class RowLog:
    """An append-only JSONL file of a job that may be killed: opening it cuts off a torn last line."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file = open(self.path, "ab+", buffering=0)  # noqa: SIM115 (lives as long as the log)
        self._cut_torn_line()

    def append(self, row: dict[str, Any]) -> None:
        """Write one whole line, in one call to the system."""
        line = dump_row(row, str(self.path))
        written = self._file.write(line)
        if written != len(line):
            raise OSError(f"{self.path}: only {written} of {len(line)} bytes were written; is the disk full?")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> RowLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _cut_torn_line(self) -> None:
        """Shorten the file to the end of its last newline."""
        end = size = self._file.seek(0, os.SEEK_END)
        while end > 0:
            begin = max(0, end - 65_536)
            self._file.seek(begin)
            newline = self._file.read(end - begin).rfind(b"\n")
            if newline >= 0:
                end = begin + newline + 1
                break
            end = begin
        if end < size:
            self._file.truncate(end)


class SkippedLog:
    """What a job left out and why: `<out>.skipped.jsonl`, one row an id, made when the first is skipped."""

    def __init__(self, out_path: str | os.PathLike[str]) -> None:
        self.path = Path(f"{os.fspath(out_path)}{SKIPPED_SUFFIX}")
        self._log: RowLog | None = None
        self._seen: set[int] = set()  # hashes of ids: a skip list may be long
        if self.path.exists():
            self._log = RowLog(self.path)
            self._seen = {hash(str(row.get("id"))) for _, row in read_rows(self.path)}

    @property
    def count(self) -> int:
        """Rows in the list, those of earlier runs included."""
        return len(self._seen)

    def __contains__(self, id: str) -> bool:
        return hash(id) in self._seen

    def add(self, id: str, audio: str, reason: str) -> None:
        """Note that the row was left out; an id that is in the list already is not added again."""
        if id in self:
            return
        if self._log is None:
            self._log = RowLog(self.path)
        self._log.append({"id": id, "audio": audio, "reason": reason})
        self._seen.add(hash(id))

    def close(self) -> None:
        if self._log is not None:
            self._log.close()

    def __enter__(self) -> SkippedLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
