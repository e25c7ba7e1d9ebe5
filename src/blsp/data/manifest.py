"""Manifests: UTF-8 JSONL files of utterances, of any length, in constant memory.

In:  a file, or a glob such as `parts/*.jsonl`.
Out: its rows by number, each an `Utterance`, the record that all steps share; for a wrong row, a `ManifestError` that
     names the file, the line and what to do.
Try: `rows = Manifest("train.jsonl"); len(rows), rows[0].text, [row.id for row in rows]`
Flow: corpora → **manifest** → continuations, speech features, training, evaluation.

Rows are found through an index beside the file (`train.jsonl.idx`, see `row_index.py`). `write_manifest` writes a file
atomically.
"""

import glob
import os
import weakref
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Self, overload

from blsp.data.addresses import is_url
from blsp.data.files import ManifestError, dump_row, parse_row, read_rows, show, write_atomically
from blsp.data.jobs import SKIPPED_SUFFIX
from blsp.data.row_index import INDEX_SUFFIX, open_index, refuse_shared_keys

ROWS_READ = 256  # rows that are fetched at a time when all are read in order
CONTINUATION_KEY = ("id", "behaviour", "order")  # the fields that together are unique in a continuation file

__all__ = ["CONTINUATION_KEY", "Manifest", "ManifestError", "Utterance", "read_rows", "write_manifest"]


@dataclass(frozen=True)
class Utterance:
    """One recording and what was said in it; a text-only row has `audio == ""`."""

    id: str
    audio: str
    """Path or other address (addresses.py); a `Manifest` makes it absolute."""
    text: str
    """The transcript as given; "" if nothing is said (`extra["no_speech"]`) or the transcript is not known."""
    start: float | None = None
    """Seconds into the file."""
    duration: float | None = None
    """Seconds from `start`."""
    language: str | None = None
    """ISO 639-1."""
    speaker: str | None = None
    reference: str | None = None
    """Target of an evaluation: translation, label or answer."""
    options: tuple[str, ...] | None = None
    """The choices, for a choice task."""
    instruction: str | None = None
    """Replaces the command's instruction for this row."""
    extra: dict[str, Any] = field(default_factory=dict, hash=False)
    """All other fields, unchanged."""

    @property
    def no_speech(self) -> bool:
        """Whether the clip is silence, noise or music, which is answered with a fixed sentence."""
        return bool(self.extra.get("no_speech"))

    def to_json(self) -> dict[str, Any]:
        """The row as a JSON object, without fields that are None, and with the fields of `extra`."""
        row = {name: getattr(self, name) for name in FIELDS if getattr(self, name) is not None}
        if self.options is not None:
            row["options"] = list(self.options)
        return row | {name: value for name, value in self.extra.items() if name not in row}

    @classmethod
    def from_json(cls, row: dict[str, Any], where: str = "row") -> Self:
        """The checked utterance; `where` ("file:line") begins every message."""
        known: dict[str, Any] = {}
        extra: dict[str, Any] = {}
        for name, value in row.items():
            if name not in FIELD_SET:
                extra[name] = value
            elif value is not None:
                known[name] = value
        _check_fields(known, where)
        known.setdefault("audio", "")
        known.setdefault("text", "")
        if "options" in known:
            known["options"] = tuple(known["options"])
        return cls(**known, extra=extra)


FIELDS = tuple(f.name for f in fields(Utterance) if f.name != "extra")
FIELD_SET = frozenset(FIELDS)
NUMBERS = ("start", "duration")
MOST_SECONDS = 1e9  # thirty years: no recording is longer


def _check_fields(row: dict[str, Any], where: str) -> None:
    """Raise ManifestError for values that cannot be an utterance's. row: the known fields that are not null."""
    for name, value in row.items():
        if name in NUMBERS:
            _check_seconds(name, value, where)
        elif name == "options":
            if not isinstance(value, (list, tuple)) or not all(isinstance(option, str) for option in value):
                raise ManifestError(f'{where}: "options" must be a list of strings, not {show(value)}')
        elif not isinstance(value, str):
            raise ManifestError(f'{where}: "{name}" must be a string, not {show(value)}')
    if not row.get("id"):
        raise ManifestError(f'{where}: "id" is missing or empty; every row needs a string of its own')
    if "audio" not in row and "text" not in row and "instruction" not in row:
        raise ManifestError(f'{where}: a row needs "audio" (a path) and "text" (its transcript); both are missing')


def _check_seconds(name: str, value: Any, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ManifestError(f'{where}: "{name}" must be a number of seconds, not {show(value)}')
    if not 0 <= value <= MOST_SECONDS or (name == "duration" and value == 0):  # NaN is refused as well
        least = "more than 0" if name == "duration" else "0 or more"
        raise ManifestError(f'{where}: "{name}" is {show(value)}; it must be {least} seconds')


# --- reading ----------------------------------------------------------------------------------------------
class Manifest(Sequence[Utterance]):
    """The rows of one file or of all files that match a glob (in the order of their names), by number.

    Memory does not grow with the number of rows. `key` names the fields that together must be unique; for a
    continuation file it is `CONTINUATION_KEY`.
    """

    def __init__(self, path: str | os.PathLike[str], key: tuple[str, ...] = ("id",)) -> None:
        self._open(find_manifests(path), key)
        if len(self._indexes) > 1:
            refuse_shared_keys(self._indexes)

    def _open(self, paths: list[Path], key: tuple[str, ...]) -> None:
        self.paths, self.key = paths, key
        self._indexes = [open_index(file, key) for file in paths]
        self._ends = list(accumulate(len(index) for index in self._indexes))  # row after the last, by file
        self._descriptors = [os.open(file, os.O_RDONLY) for file in paths]
        self._closer = weakref.finalize(self, _close_all, self._descriptors)

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, row: int) -> Utterance: ...
    @overload
    def __getitem__(self, row: slice) -> list[Utterance]: ...
    def __getitem__(self, row: int | slice) -> Utterance | list[Utterance]:
        if isinstance(row, slice):
            numbers = range(*row.indices(len(self)))
            if numbers.step == 1 and numbers:
                return list(self._rows(numbers.start, numbers.stop))
            return [self[number] for number in numbers]
        number = row + len(self) if row < 0 else row
        if not 0 <= number < len(self):
            raise IndexError(f"row {row} of a manifest of {len(self)} rows")
        return next(self._rows(number, number + 1))

    def __iter__(self) -> Iterator[Utterance]:
        return self._rows(0, len(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.paths, self.key)

    def _rows(self, first: int, last: int) -> Iterator[Utterance]:
        """Rows `first` to `last` (excluded), some at a time."""
        while first < last:
            file = bisect_right(self._ends, first)
            before = self._ends[file] - len(self._indexes[file])  # rows in earlier files
            until = min(last, self._ends[file], first + ROWS_READ)
            yield from self._read(file, first - before, until - before)
            first = until

    def _read(self, file: int, first: int, last: int) -> Iterator[Utterance]:
        """Rows `first` to `last` (excluded) of one of the files."""
        path, index = self.paths[file], self._indexes[file]
        starts = index.starts(first, last + 1)
        if last == len(index):
            starts.append(index.size)
        raw = os.pread(self._descriptors[file], starts[-1] - starts[0], starts[0])
        for row, (start, end) in enumerate(pairwise(starts), start=first):
            try:
                values = parse_row(raw[start - starts[0] : end - starts[0]], "")
                utterance = Utterance.from_json(resolve_audio(values, path.parent), "")
            except ManifestError as error:  # the line number needs a scan, so it is counted only for an error
                raise ManifestError(f"{index.where(row)}{error}") from None
            yield utterance


def _reopen(paths: list[Path], key: tuple[str, ...]) -> Manifest:
    manifest = Manifest.__new__(Manifest)
    manifest._open(paths, key)
    return manifest


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def find_manifests(path: str | os.PathLike[str]) -> list[Path]:
    """The file with this name, or the sorted files that match a glob, without indexes and skip lists."""
    plain = Path(path)
    try:
        if plain.is_dir():
            raise ManifestError(f"{path}: is a folder; name a file, or quote a glob such as '{path}/*.jsonl'")
        if plain.exists():
            return [plain.absolute()]
        names = sorted(glob.glob(os.fspath(path), recursive=True))
    except ManifestError:
        raise
    except (OSError, ValueError) as error:
        raise ManifestError(f"{os.fspath(path)!r}: cannot be opened ({error})") from error
    files = [Path(name).absolute() for name in names if not name.endswith((INDEX_SUFFIX, SKIPPED_SUFFIX))]
    files = [file for file in files if file.is_file()]
    if not files:
        missing = "no file matches this pattern" if glob.has_magic(os.fspath(path)) else "no such manifest"
        raise ManifestError(f"{os.fspath(path)!r}: {missing}")
    return files


def resolve_audio(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`row` with an absolute audio path; URLs, data-URIs and text-only rows do not change."""
    audio = row.get("audio")
    if isinstance(audio, str) and audio and not audio.startswith(("/", "data:")) and not is_url(audio):
        row["audio"] = os.path.join(folder, audio)
    return row


def name_relative(row: dict[str, Any], folder: str | os.PathLike[str]) -> dict[str, Any]:
    """`row` with its audio path relative to `folder`, if the audio is in that folder."""
    below = os.path.abspath(folder) + os.sep
    audio = str(row.get("audio", ""))
    return row | {"audio": audio.removeprefix(below)} if audio.startswith(below) else row


# --- writing ----------------------------------------------------------------------------------------------
def write_manifest(
    path: str | os.PathLike[str],
    rows: Iterable[Utterance | dict[str, Any]],
    relative_to: str | os.PathLike[str] | None = None,
) -> int:
    """Write the rows one by one and return their number; the file gets its name at the end.

    Audio paths inside the folder `relative_to` (usually the manifest's own) are written relative to it.
    """
    count = 0
    with write_atomically(path) as partial, open(partial, "wb") as out:
        for row in rows:
            values = row.to_json() if isinstance(row, Utterance) else row
            out.write(dump_row(name_relative(values, relative_to) if relative_to else values, str(path)))
            count += 1
    return count
