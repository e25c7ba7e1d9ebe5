"""JSON Lines in and out: one JSON object a line, checked on the way in.

In:  a file, or the bytes of one line. Out: dictionaries; a `ManifestError` that names file, line and way out.
Try: `for line, row in read_rows("train.jsonl"): ...`
Flow: data/ — below the manifest (`manifest.py`): nothing here knows what an utterance is. `jobs.py` appends.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any, NoReturn

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
