"""What a run has written so far: one part file a rank, batch by batch, whole or not at all.

In:  `Written` answers as batches get done.
Out: which prompts are done, and where each one's record lies, whatever moment the run was killed at.
Try: `done = done_keys(folder, jobs=100)`
Flow: continuation/ — between the engines and the merge. A part's line is one answer; `left` counts the
      answers of its batch that follow, so a batch whose last line (`left` 0) is missing is cut off and
      written again. The top-k of an answer goes to flat files before its line; the rest is cut.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from blsp.continuation.engines import Top, Written


@dataclass(frozen=True)
class Record:
    """One line of a part: its bytes' place, and what it says."""

    begin: int
    end: int
    fields: dict[str, Any]


class AnswerLog:
    """The part file of one rank, opened for going on."""

    def __init__(self, folder: Path, rank: int, top_k: int) -> None:
        self.path = folder / f"part-{rank:05d}.jsonl"
        end = self._steps = 0
        if self.path.exists():
            for record in read_part(self.path):
                end = record.end
                first, steps = record.fields.get("top", (0, 0))
                self._steps = max(self._steps, first + steps)
        self._lines = _open_cut(self.path, end)
        self._ids = _open_cut(self.path.with_suffix(".ids.u32"), self._steps * top_k * 4) if top_k else None
        self._logp = _open_cut(self.path.with_suffix(".logp.f16"), self._steps * top_k * 2) if top_k else None

    def add(self, batch: list[Written]) -> None:
        """Record a whole batch."""
        lines = []
        for left, written in zip(range(len(batch) - 1, -1, -1), batch, strict=True):
            fields: dict[str, Any] = {"key": written.key, "left": left}
            if written.refused is not None:
                fields["refused"] = written.refused
            else:
                fields |= {"text": written.text, "ids": written.ids, "finish": written.finish}
            if written.top is not None:
                fields["top"] = self._add_top(written.top)
            lines.append(json.dumps(fields))
        for file in (self._ids, self._logp):
            if file is not None:
                file.flush()
        self._lines.write(("\n".join(lines) + "\n").encode())
        self._lines.flush()

    def _add_top(self, top: Top) -> tuple[int, int]:
        assert self._ids is not None and self._logp is not None, (
            "a top-k came from an engine that was not asked for it"
        )
        self._ids.write(top.ids.astype("<u4").tobytes())
        self._logp.write(top.logp.astype("<f2").tobytes())
        first, self._steps = self._steps, self._steps + len(top.ids)
        return first, len(top.ids)

    def __enter__(self) -> AnswerLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        for file in (self._ids, self._logp, self._lines):
            if file is not None:
                file.close()


def _open_cut(path: Path, size: int) -> Any:
    """Open for appending after the first `size` bytes."""
    file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115 (lives as long as the part)
    file.truncate(size)
    file.seek(size)
    return file


def part_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.jsonl"))


def read_part(path: Path) -> Iterator[Record]:
    """The records of whole batches; reading ends at a torn line."""
    batch: list[Record] = []
    begin = 0
    with open(path, "rb") as lines:
        for line in lines:
            try:
                fields = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                fields = None
            if not isinstance(fields, dict):
                return
            batch.append(Record(begin, begin + len(line), fields))
            begin += len(line)
            if fields["left"] == 0:
                yield from batch
                batch = []


def done_keys(folder: Path, jobs: int) -> np.ndarray:
    """(jobs,) bool: the prompts whose answers are recorded, in whichever part."""
    done = np.zeros(jobs, bool)
    for path in part_paths(folder):
        for record in read_part(path):
            done[record.fields["key"]] = True
    return done


class AnswerReader:
    """Random access to recorded answers by key, for the merge."""

    def __init__(self, folder: Path, jobs: int, top_k: int) -> None:
        self._top_k = top_k
        paths = part_paths(folder)
        self._files = [open(path, "rb") for path in paths]  # noqa: SIM115
        self._tops = [_open_tops(path, top_k) for path in paths] if top_k else []
        self._places = np.memmap(
            folder / "places.i64", "<i8", "w+", shape=(max(jobs, 1), 2)
        )  # part, first byte
        for number, path in enumerate(paths):
            for record in read_part(path):
                self._places[record.fields["key"]] = (number, record.begin)

    def fields(self, key: int) -> dict[str, Any]:
        number, begin = self._places[key]
        self._files[number].seek(begin)
        return json.loads(self._files[number].readline())

    def top(self, key: int) -> tuple[np.ndarray, np.ndarray]:
        """ids (n, K) and logp (n, K) of an answer."""
        first, steps = self.fields(key).get("top", (0, 0))
        ids, logp = self._tops[int(self._places[key][0])]
        return ids[first : first + steps], logp[first : first + steps]

    def close(self) -> None:
        for file in self._files:
            file.close()


def _open_tops(path: Path, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    arrays = []
    for suffix, dtype in ((".ids.u32", np.dtype("<u4")), (".logp.f16", np.dtype("<f2"))):
        file = path.with_suffix(suffix)
        empty = not file.exists() or file.stat().st_size == 0
        arrays.append(
            np.empty((0, top_k), dtype) if empty else np.memmap(file, dtype, "r").reshape(-1, top_k)
        )
    return arrays[0], arrays[1]
