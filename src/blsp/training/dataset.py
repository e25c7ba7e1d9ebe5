"""What the plan has to know of every row, as numbers on disk: its length, its prompt, whether it is held out.

In:  data sources, the speech's lengths (from the feature cache, the manifest or the file's header), prompts.
Out: `Table`: memory-mapped rows to learn from, the rows held out, and the (instruction, order) pairs they
     use.
Try: ``table = build_table(sources, reader, folder, log)``
Flow: training/dataset.py -> **table.py** -> training/batches.py (the plan) and training/examples.py (whole
      rows)

Built once a run and kept in its folder, so that a resumed run plans with the very same numbers. What cannot
be learnt from is left out here and listed with its reason in ``<out>.skipped.jsonl``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from blsp.continuation.topk import TopKStore, topk_folder
from blsp.data.jobs import SkippedLog
from blsp.data.manifest import CONTINUATION_KEY, Manifest, Utterance, find_manifests, read_rows

BLOCK = 4096  # rows scanned, and asked of the feature cache, at a time

ROW = np.dtype(
    [
        ("hash", "<u8"),  # of the utterance's id: all behaviours of one utterance are held out together
        ("row", "<i8"),  # in its source
        ("source", "<u2"),
        ("frame", "<u4"),  # index into the (instruction, order) pairs
        ("frames", "<i4"),  # encoder frames of the speech
        ("transcript", "<i4"),  # tokens
        ("tail", "<i4"),  # positions after the speech: suffix and response, its last token not counted
        ("no_speech", "?"),
    ]
)


class Reader(Protocol):
    """What a row's numbers are measured with (training/examples.py)."""

    def speech_frames(self, rows: Sequence[Utterance]) -> list[int | str]:
        """Encoder frames of each clip, or why there are none."""

    def text_lengths(self, row: Utterance, source: Source) -> tuple[int, int] | str:
        """(transcript tokens, tail positions) of a row, or why it cannot be learnt from."""

    def frame_index(self, row: Utterance) -> int:
        """Index of the row's (instruction, order) pair; a new pair gets the next one."""


@dataclass(frozen=True)
class Table:
    """Rows to learn from, rows held out (ROW each), how many of the first come from each source."""

    rows: NDArray[np.void]
    held_out: NDArray[np.void]
    per_source: tuple[int, ...]
    frames: tuple[tuple[str, str], ...]  # (instruction, order)


def open_table(
    sources: Sequence[Source],
    reader: Reader,
    folder: Path,
    skipped: SkippedLog,
    hold_out: int,
    frames: list[tuple[str, str]],
) -> Table:
    """The run's table: read back when it is there and the data is the same, built otherwise."""
    facts = {"sources": [_fingerprint(source) for source in sources], "hold_out": hold_out}
    head = folder / "table.json"
    if head.exists():
        stored = json.loads(head.read_text(encoding="utf-8"))
        if stored["facts"] != facts:
            raise DataError(
                f"{folder}: was begun with other data ({', '.join(str(s.path) for s in sources)} changed); "
                "restore the files, or begin a new run with another --out"
            )
        frames[:] = [tuple(pair) for pair in stored["frames"]]
    else:
        _build(sources, reader, folder, skipped, hold_out)
        stored = {"facts": facts, "frames": frames, "per_source": _counts(folder / "rows.npy", len(sources))}
        _write(head, json.dumps(stored))
    rows, held = (np.load(folder / name, mmap_mode="r") for name in ("rows.npy", "held_out.npy"))
    if not len(rows):
        raise DataError(
            f"no row of {', '.join(str(s.path) for s in sources)} can be learnt from: see {skipped.path}"
        )
    return Table(rows, held, tuple(stored["per_source"]), tuple(tuple(pair) for pair in stored["frames"]))


def _build(
    sources: Sequence[Source], reader: Reader, folder: Path, skipped: SkippedLog, hold_out: int
) -> None:
    """Scan every source once; then set the held-out utterances apart."""
    folder.mkdir(parents=True, exist_ok=True)
    scan, count = folder / ".scan", 0
    with open(scan, "wb") as out:
        for number, source in enumerate(sources):
            for block in _blocks(source):
                measured = _measure(number, source, block, reader, skipped)
                measured.tofile(out)
                count += len(measured)
    whole = np.memmap(scan, ROW, "r", shape=(count,)) if count else np.empty(0, ROW)
    limit = _limit(whole["hash"][~whole["no_speech"]], hold_out)
    _copy(whole, folder / "rows.npy", lambda rows: (rows["hash"] > limit) | rows["no_speech"])
    _copy(whole, folder / "held_out.npy", lambda rows: (rows["hash"] <= limit) & ~rows["no_speech"])
    scan.unlink()


def _blocks(source: Source) -> Iterator[tuple[int, list[Utterance]]]:
    for first in range(0, len(source.rows), BLOCK):
        yield first, source.rows[first : first + BLOCK]


def _measure(
    number: int, source: Source, block: tuple[int, list[Utterance]], reader: Reader, skipped: SkippedLog
) -> NDArray[np.void]:
    """The ROWs of a block; rows that cannot be learnt from go to the skip list."""
    first, utterances = block
    texts = [reader.text_lengths(row, source) for row in utterances]
    fit = [i for i, text in enumerate(texts) if not isinstance(text, str)]
    speech = dict(zip(fit, reader.speech_frames([utterances[i] for i in fit]), strict=True))
    found = []
    for place, (row, text) in enumerate(zip(utterances, texts, strict=True)):
        frames = speech.get(place, 0)
        if isinstance(text, str) or isinstance(frames, str):
            skipped.add(row.id, row.audio, text if isinstance(text, str) else str(frames))
            continue
        found.append(
            (
                id_hash(row.id),
                first + place,
                number,
                reader.frame_index(row),
                frames,
                *text,
                row.no_speech,
            )
        )
    return np.array(found, ROW)


def id_hash(id: str) -> int:
    """64 bits of an utterance's id that are the same everywhere."""
    return int.from_bytes(
        hashlib.blake2b(id.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
    )


def _limit(hashes: NDArray[np.uint64], hold_out: int) -> int:
    """The largest of the `hold_out` smallest distinct hashes, at most a tenth of them; -1 for none."""
    distinct = np.unique(hashes)
    allowed = min(hold_out, len(distinct) // 10)
    return int(distinct[allowed - 1]) if allowed else -1


def _copy(
    whole: NDArray[np.void], path: Path, chosen: Callable[[NDArray[np.void]], NDArray[np.bool_]]
) -> None:
    """Write the chosen rows as .npy, block by block."""
    spans = range(0, len(whole), 1 << 18)
    count = sum(int(chosen(whole[at : at + (1 << 18)]).sum()) for at in spans)
    partial = path.with_name(f".{path.name}.partial")
    if count:
        out = np.lib.format.open_memmap(partial, "w+", ROW, (count,))
        place = 0
        for at in spans:
            part = whole[at : at + (1 << 18)]
            kept = part[chosen(part)]
            out[place : place + len(kept)] = kept
            place += len(kept)
        out.flush()
    else:
        with open(partial, "wb") as file:
            np.save(file, np.empty(0, ROW))
    os.replace(partial, path)


def _counts(path: Path, sources: int) -> list[int]:
    return np.bincount(np.load(path, mmap_mode="r")["source"], minlength=sources).tolist()


def _fingerprint(source: Source) -> dict[str, object]:
    """What tells that a data file changed: its length and its two ends."""
    with open(source.path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        ends = file.read(65_536)
        file.seek(max(0, size - 65_536))
        ends += file.read()
    return {"bytes": size, "ends": hashlib.sha256(ends).hexdigest(), "weight": source.weight}


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


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
