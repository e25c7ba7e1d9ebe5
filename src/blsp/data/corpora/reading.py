"""What the corpus readers share: what to read, what was left out, and what to say when something is missing.

    >>> LIBRISPEECH = Corpus("LibriSpeech", "https://www.openslr.org/12")
    >>> folder = LIBRISPEECH.need(Path("/data/LibriSpeech") / "dev-clean")
    CorpusError: /data/LibriSpeech/dev-clean: missing; is --root the folder of LibriSpeech? It is had from ...

In and out: paths and lines. Used by every reader beside this file; `preparation.py` calls those.
"""

from __future__ import annotations

import csv
import os
import re
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blsp.data.manifest import Utterance

# languages that a corpus spells in a way of its own -> ISO 639-1
SPELLINGS = {"cmn": "zh", "english": "en", "german": "de", "french": "fr", "spanish": "es", "italian": "it"}
SPELLINGS |= {"chinese": "zh", "mandarin": "zh", "japanese": "ja", "russian": "ru", "portuguese": "pt"}


class CorpusError(ValueError):
    """A corpus is not laid out as published; the message names the path and where the corpus is had from."""


@dataclass(frozen=True)
class Wanted:
    """What to read."""

    root: str
    split: str
    language: str | None
    target_language: str | None
    made_audio: Path
    """Where a reader may write audio that exists as no file of its own."""
    text_field: str | None = None
    reference_field: str | None = None
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
    """A row that was left out; what stands before the first colon of the reason is counted."""

    id: str
    audio: str
    reason: str


Row = Utterance | Dropped
Read = Iterator[Row]


@dataclass(frozen=True)
class Corpus:
    """A published corpus: what people call it, and the page it is had from."""

    name: str
    page: str

    def need(self, *candidates: Path) -> Path:
        """The first candidate that exists; a `CorpusError` about the first one if none does."""
        for path in candidates:
            if path.exists():
                return path
        raise CorpusError(f"{candidates[0]}: missing; {self._remedy()}")

    def need_split(self, path: Path, split: str, known: Iterable[str]) -> Path:
        """`path`, which is the split's own; the message lists the splits that there are."""
        if path.exists():
            return path
        there = ", ".join(known)
        hint = f"{self.name} has no part {split!r} here; it has {there}; " if there else ""
        raise CorpusError(f"{path}: missing; {hint}{self._remedy()}")

    def broken(self, path: Path, line: int, reason: str) -> CorpusError:
        return CorpusError(f"{path}:{line}: {reason}; this is not {self.name} as published at {self.page}")

    def _remedy(self) -> str:
        return f"is --root the folder of {self.name}? It is had from {self.page}"


def iso(language: str | None) -> str | None:
    """zh-CN, zh_cn, cmn_hans_cn, Chinese -> zh; codes that have no ISO 639-1 stay as they are."""
    if not language:
        return None
    short = re.split(r"[-_]", language.lower())[0]
    return SPELLINGS.get(short, short)


def heard(id: str, audio: Path | str, text: str, *, tags: Iterable[str] = (), **fields: Any) -> Row:
    """The utterance, or why it is none: `tags` are words of the transcript that are no speech."""
    ignored = set(tags)
    words = [word for word in text.split() if word not in ignored]
    if not any(letter.isalnum() for word in words for letter in word):
        reason = f"tags only: {text.strip()}" if text.strip() else "no transcript"
        return Dropped(id, str(audio), reason)
    length = fields.get("duration")
    if length is not None and not length > 0:
        return Dropped(id, str(audio), f"no length: {length} s")
    given = {name: value for name, value in fields.items() if value is not None}
    return Utterance(id=id, audio=str(audio), text=" ".join(words) if ignored else text.strip(), **given)


def read_lines(path: Path, corpus: Corpus) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of a text file, without its end; streaming."""
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                yield number, line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path}: is not UTF-8 ({error.reason}); {corpus.name} is published in UTF-8"
        ) from error


def read_table(
    path: Path, corpus: Corpus, columns: Iterable[str], names: list[str] | None = None
) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, row) of a tab-separated table without quoting, which must have these `columns`.

    The header gives the names, unless the table has none and `names` does.
    """
    lines = read_lines(path, corpus)
    if names is None:
        names = next(lines, (1, ""))[1].split("\t")
        missing = sorted(set(columns) - set(names))
        if missing:
            raise corpus.broken(path, 1, f"no column {', '.join(missing)}")
    for number, line in lines:
        if line:
            cells = line.split("\t")
            if len(cells) < len(names):
                cells += [""] * (len(names) - len(cells))  # editors drop empty cells at the end of a line
            yield number, dict(zip(names, cells, strict=False))


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


def number(text: object, path: Path, line: int, corpus: Corpus) -> float:
    """A finite number of seconds, not below 0."""
    try:
        value = float(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        value = -1.0
    if not 0 <= value < 1e9:
        raise corpus.broken(path, line, f"{text!r} is no time in seconds")
    return round(value, 6)


def folders_in(path: Path) -> list[str]:
    """The names of the folders in a folder, sorted."""
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir()) if path.is_dir() else []


class Lookup:
    """A table of strings on disk, for joins whose other side does not fit in memory."""

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        self._file = tempfile.NamedTemporaryFile(prefix="blsp-", suffix=".sqlite")  # noqa: SIM115 (closed below)
        self._table = sqlite3.connect(self._file.name)
        self._table.execute("PRAGMA synchronous=OFF")
        self._table.execute("PRAGMA journal_mode=OFF")
        self._table.execute("CREATE TABLE pairs (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID")
        with self._table:
            self._table.executemany("INSERT OR REPLACE INTO pairs VALUES (?, ?)", pairs)

    def get(self, name: str) -> str | None:
        found = self._table.execute("SELECT value FROM pairs WHERE name = ?", (name,)).fetchone()
        return found[0] if found else None

    def __enter__(self) -> Lookup:
        return self

    def __exit__(self, *_: object) -> None:
        self._table.close()
        self._file.close()
