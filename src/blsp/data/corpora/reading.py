"""Parts that all corpus readers use: the request, files and tables with clear error messages, rows.

In:  a `ReadRequest`; paths of files as a corpus publishes them.
Out: lines and table rows; `Utterance` or `Dropped`; a `CorpusError` that says where the corpus can be fetched.
Try: `Corpus("LibriSpeech", "https://www.openslr.org/12").need(Path("/data/LibriSpeech/dev-clean"))`
Flow: data/corpora/ — used by every reader; `data/prepare.py` calls the readers.
"""

from __future__ import annotations

import csv
import os
import re
import sqlite3
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from blsp.data.files import BYTE_ORDER_MARK, ManifestError, parse_row
from blsp.data.manifest import Utterance

# names of languages in some corpora -> ISO 639-1
SPELLINGS = {"cmn": "zh", "english": "en", "german": "de", "french": "fr", "spanish": "es", "italian": "it"}
SPELLINGS |= {"chinese": "zh", "mandarin": "zh", "japanese": "ja", "russian": "ru", "portuguese": "pt"}


class CorpusError(ValueError):
    """A corpus is not laid out as published; the message names the path and where to fetch the corpus."""


@dataclass(frozen=True)
class ReadRequest:
    """What a reader should read; the fields are flags of `blsp prepare`."""

    root: str
    split: str
    language: str | None
    target_language: str | None
    made_audio: Path
    """The folder for audio that a reader makes."""
    audio_column: str | None = None
    text_column: str | None = None
    reference_column: str | None = None
    subset: str | None = None
    limit: int | None = None
    seed: int = 0

    @property
    def folder(self) -> Path:
        return Path(self.root).absolute()

    @property
    def splits(self) -> list[str]:
        return [split.strip() for split in self.split.split(",") if split.strip()]


@dataclass(frozen=True)
class Dropped:
    """A row that was left out; rows are counted by the part of the reason before its first colon."""

    id: str
    audio: str
    reason: str


Row = Utterance | Dropped
Rows = Iterator[Row]


@dataclass(frozen=True)
class Corpus:
    """A published corpus: its name, and the page where it can be downloaded."""

    name: str
    page: str

    def root(self, request: ReadRequest, inner: str) -> Path:
        """The folder `--root`, or its subfolder `inner` (created by unpacking the archive) if it exists."""
        root = self.need(request.folder)
        return root / inner if (root / inner).is_dir() else root

    def need(self, *candidates: Path) -> Path:
        """The first candidate that exists; a `CorpusError` about the first one if none does."""
        for path in candidates:
            if path.exists():
                return path
        raise CorpusError(f"{candidates[0]}: missing; {self._remedy()}")

    def need_split(self, path: Path, split: str, known: Iterable[str]) -> Path:
        """`path`, which belongs to the split; if it does not exist, a `CorpusError` lists the splits that do."""
        if path.exists():
            return path
        there = ", ".join(known)
        hint = f"{self.name} has no part {split!r} here; it has {there}; " if there else ""
        raise CorpusError(f"{path}: missing; {hint}{self._remedy()}")

    def broken(self, path: Path, line: int, reason: str) -> CorpusError:
        return CorpusError(f"{path}:{line}: {reason}; this is not {self.name} as published at {self.page}")

    def _remedy(self) -> str:
        return f"is --root the folder of {self.name}? Fetch it from {self.page}"

    def seconds(self, text: object, path: Path, line: int) -> float:
        """A finite number of seconds, not below 0."""
        try:
            value = float(text)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            value = -1.0
        if not 0 <= value < 1e9:
            raise self.broken(path, line, f"{text!r} is not a time in seconds")
        return round(value, 6)

    def times(self, begin: object, end: object, path: Path, line: int) -> dict[str, float]:
        """`start` and `duration` of a segment from `begin` to `end`."""
        start = self.seconds(begin, path, line)
        return {"start": start, "duration": round(self.seconds(end, path, line) - start, 6)}


def iso(language: str | None) -> str | None:
    """zh-CN, zh_cn, cmn_hans_cn, Chinese -> zh; codes without an ISO 639-1 code do not change."""
    if not language:
        return None
    short = re.split(r"[-_]", language.lower())[0]
    return SPELLINGS.get(short, short)


def make_row(id: str, audio: Path | str, text: str, *, tags: Iterable[str] = (), **fields: Any) -> Row:
    """The utterance, or `Dropped` with the reason. tags: words of the transcript that are not speech.

    A clip that is marked as `no_speech` needs no transcript.
    """
    ignored = set(tags)
    words = [word for word in text.split() if word not in ignored]
    silent = fields.get("extra", {}).get("no_speech")
    if not silent and not any(letter.isalnum() for word in words for letter in word):
        reason = f"tags only: {text.strip()}" if text.strip() else "no transcript"
        return Dropped(id, str(audio), reason)
    length = fields.get("duration")
    if length is not None and not length > 0:
        return Dropped(id, str(audio), f"no length: {length} s")
    given = {name: value for name, value in fields.items() if value is not None}
    return Utterance(id=id, audio=str(audio), text=" ".join(words) if ignored else text.strip(), **given)


def read_lines(path: Path, corpus: Corpus) -> Iterator[tuple[int, str]]:
    """(number from 1, line without its end) of a text file, one at a time."""
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                yield number, line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}: is not UTF-8 ({error.reason}); {corpus.name} is published in UTF-8") from error


def read_table(
    path: Path, corpus: Corpus, columns: Iterable[str], names: list[str] | None = None
) -> Iterator[tuple[int, dict[str, str] | Dropped]]:
    """(line number, row) of a tab-separated table without quoting, which must have these `columns`.

    names: of all columns, if the table has no header. A row with a line break or a tab in a cell is `Dropped` once,
    even if it has several lines.
    """
    columns, lines = list(columns), read_lines(path, corpus)
    if names is None:
        names = next(lines, (1, ""))[1].split("\t")
        missing = sorted(set(columns) - set(names))
        if missing:
            raise corpus.broken(path, 1, f"no column {', '.join(missing)}")
    least = 1 + max((names.index(column) for column in columns or names), default=0)
    for first, last, cells in _whole_rows(lines, len(names)):
        where = f"{path.name}:{first}" if first == last else f"{path.name}:{first}-{last}"
        if first < last or len(cells) < least or any(cells[len(names) :]):
            yield first, Dropped(where, "", f"broken row: a line break or a tab in a cell of {path}, line {first}")
        else:
            cells += [""] * (len(names) - len(cells))  # editors remove empty cells at the end of a line
            yield first, dict(zip(names, cells, strict=False))


def _whole_rows(lines: Iterable[tuple[int, str]], width: int) -> Iterator[tuple[int, int, list[str]]]:
    r"""(first line, last line, cells) of each row; the lines of a row with a line break in a cell are joined.

    In a table of `width` 4, "a\tb\tone" and "sentence\t2" are one row: both are incomplete, and together they have
    3 + 2 - 1 = 4 cells. Lines whose last cells an editor removed have more than half of the cells, so two of them are
    too long for one row.
    """
    held: tuple[int, int, list[str]] | None = None  # a line with too few cells, and the lines joined to it
    for number, line in lines:
        if not line:
            continue
        cells = line.split("\t")
        if held is not None:
            first, _, begun = held
            if len(cells) < width and len(begun) + len(cells) - 1 <= width:
                held = first, number, [*begun[:-1], f"{begun[-1]} {cells[0]}", *cells[1:]]
                continue
            yield held
            held = None
        if len(cells) < width:
            held = number, number, cells
        else:
            yield number, number, cells
    if held is not None:
        yield held


def read_csv(path: Path, corpus: Corpus, columns: Iterable[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(row number from 2, row) of a comma-separated table with quoting and a header; missing cells are empty."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, restval="", strict=True)
            missing = sorted(set(columns) - set(reader.fieldnames or []))
            if missing:
                raise corpus.broken(path, 1, f"no column {', '.join(missing)}")
            yield from enumerate(reader, start=2)
    except (csv.Error, UnicodeDecodeError) as error:
        raise CorpusError(f"{path}: cannot be read ({error}); fetch {corpus.name} again") from error


def read_objects(path: Path | str) -> Iterator[tuple[int, dict[str, Any] | Dropped]]:
    """(line number, object) of a .jsonl or .jsonl.gz file or URL; `Dropped` instead of a broken line."""
    name = str(path).rpartition("/")[2]
    try:
        with fsspec.open(str(path), "rb", compression="infer") as lines:
            for line, raw in enumerate(lines, start=1):
                raw = raw.removeprefix(BYTE_ORDER_MARK) if line == 1 else raw
                if line == 1 and raw.lstrip().startswith(b"["):
                    raise CorpusError(f"{path}: is a JSON array; write one object a line: jq -c '.[]' {name}")
                where = f"{name}:{line}"
                try:
                    if raw.strip():
                        yield line, parse_row(raw, where)
                except ManifestError as error:
                    yield line, Dropped(where, "", f"broken row: {str(error).removeprefix(where + ': ')}")
    except (OSError, EOFError, zlib.error) as error:
        raise CorpusError(str(error) if str(path) in str(error) else f"{path}: damaged ({error})") from error


def subfolders(path: Path) -> list[str]:
    """The names of the folders in a folder, sorted."""
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir()) if path.is_dir() else []


def stems(folder: Path, pattern: str) -> list[str]:
    """The names, without suffix, of the files that match, sorted."""
    return [path.stem for path in sorted(folder.glob(pattern))]


class Lookup:
    """A table of strings on disk, for joins whose other side does not fit in memory."""

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        self._table = sqlite3.connect("")  # a temporary file
        self._table.execute("CREATE TABLE pairs (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID")
        self._table.executemany("INSERT OR REPLACE INTO pairs VALUES (?, ?)", pairs)

    def get(self, name: str) -> str | None:
        pair = self._table.execute("SELECT value FROM pairs WHERE name = ?", (name,)).fetchone()
        return pair[0] if pair else None

    def __enter__(self) -> Lookup:
        return self

    def __exit__(self, *_: object) -> None:
        self._table.close()
