"""The data files of a run: continuations with their stored teacher, or plain manifests, each with a weight.

In:  paths or globs (`--data`), weights, the loss.
Out: `Source` objects: the rows by number, the top-k store where `kl` reads it, what kind of file it is.
Try: ``open_sources(("out.jsonl",), weights=(), loss="kl", teacher="auto", temperature=1.0)``
Flow: step 1's files -> **sources.py** -> training/table.py -> training/examples.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from blsp.continuation.topk import TopKStore, topk_folder
from blsp.data.manifest import CONTINUATION_KEY, Manifest, find_manifests, read_rows

Teacher = Literal["auto", "online", "stored"]


class DataError(ValueError):
    """Data that cannot be trained on; the message names the file and the way out."""


@dataclass(frozen=True)
class Source:
    """One data file: continuations, or a plain manifest.

    An epoch takes `weight` times its rows; with `share`, `weight` times the other files' rows.
    """

    path: Path
    rows: Manifest
    weight: float
    teacher: TopKStore | None = None
    share: bool = False


def open_sources(
    data: Sequence[str],
    weights: Sequence[float] = (),
    *,
    teacher: Teacher = "online",
    temperature: float = 1.0,
) -> list[Source]:
    """All files, globs expanded. `teacher` "stored" opens the top-k of every continuations file and checks
    it.
    """
    if weights and len(weights) != len(data):
        raise DataError(f"{len(weights)} weights for {len(data)} data files: give one weight a file, or none")
    sources = []
    for name, weight in zip(data, weights or [1.0] * len(data), strict=True):
        if weight < 0:
            raise DataError(f"{name}: weight {weight} is negative; 0 leaves a file out")
        sources += [_open(path, weight, teacher, temperature) for path in find_manifests(name)]
    return sources


def _open(path: Path, weight: float, teacher: Teacher, temperature: float) -> Source:
    continuations = _holds_continuations(path)
    rows = Manifest(path, key=CONTINUATION_KEY if continuations else ("id",))
    store = None
    if continuations and teacher == "stored":
        store = TopKStore(topk_folder(path))
        store.require_temperature(temperature)
        if len(store) != len(rows):
            raise DataError(
                f"{store.folder}: holds {len(store)} rows, {path} {len(rows)}; run blsp continue "
                "--score-only again"
            )
    return Source(path, rows, weight, store)


def _holds_continuations(path: Path) -> bool:
    for _, row in read_rows(path):
        return "continuation" in row
    raise DataError(f"{path}: has no rows")


def choose_teacher(data: Sequence[str], teacher: Teacher) -> Teacher:
    """What "auto" means for these files: stored where every continuations file has its top-k, else online."""
    if teacher != "auto":
        return teacher
    files = [path for name in data for path in find_manifests(name) if _holds_continuations(path)]
    stored = [path for path in files if topk_folder(path).is_dir()]
    if stored and len(stored) < len(files):
        without = next(path for path in files if path not in stored)
        raise DataError(
            f"{without}: has no stored top-k while {stored[0].name} has; add it with blsp continue "
            "--score-only, or pass --teacher online"
        )
    return "stored" if stored else "online"
