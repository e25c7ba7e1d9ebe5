"""Data sources, and the measured rows of a run on disk: rows to learn from, and held-out rows.

In:  data files (continuations or manifests), and a `RowMeasurer` (examples.py) that gives each row's lengths.
Out: `Dataset`: memory-mapped rows to learn from, held-out rows, and the prompts that they use.
Try: ``dataset = open_dataset(sources, measurer, folder, skipped, hold_out=64, runtime=runtime)``
Flow: continuations -> **dataset.py** -> training/batches.py (order of the rows), training/examples.py (whole rows)

Rows are measured once in a run, so that a resumed run has exactly the same numbers. Rows are held out by group (law
13): rows of the same recording or text are in one group. Otherwise a probe would measure clips of which the adapter has
learnt a copy.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from blsp.continuation.topk import TopKStore, topk_folder
from blsp.data.files import read_ends, take_room, write_atomically, write_json
from blsp.data.jobs import Job, SkippedLog
from blsp.data.manifest import CONTINUATION_KEY, Manifest, Utterance, find_manifests, read_rows
from blsp.data.normalisation import split_words
from blsp.distributed import Runtime, barrier
from blsp.llm.prompt import show_args

if TYPE_CHECKING:
    from blsp.training.examples import RowMeasurer

Teacher = Literal["auto", "online", "stored"]


class DataError(ValueError):
    """Data that cannot be used for training; the message names the file and says what to do."""


# --- sources ----------------------------------------------------------------------------------------------
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
    data: Sequence[str], weights: Sequence[float] = (), *, stored_teacher: bool = False, temperature: float = 1.0
) -> list[Source]:
    """All files, globs expanded. stored_teacher: open and check the top-k of each continuations file."""
    if weights and len(weights) != len(data):
        raise DataError(f"{len(weights)} weights for {len(data)} data files: give one weight a file, or none")
    sources = []
    for name, weight in zip(data, weights or [1.0] * len(data), strict=True):
        if weight < 0:
            raise DataError(f"{name}: weight {weight} is negative; 0 leaves a file out")
        sources += [_open_source(path, weight, stored_teacher, temperature) for path in find_manifests(name)]
    return sources


def _open_source(path: Path, weight: float, stored_teacher: bool, temperature: float) -> Source:
    continuations = _holds_continuations(path)
    rows = Manifest(path, key=CONTINUATION_KEY if continuations else ("id",))
    if not continuations or not stored_teacher:
        return Source(path, rows, weight)
    store = TopKStore(topk_folder(path))
    store.require_temperature(temperature)
    if len(store) != len(rows):
        raise DataError(
            f"{store.folder}: holds {len(store)} rows, {path} {len(rows)}; run blsp continue --score-only again"
        )
    return Source(path, rows, weight, store)


def _holds_continuations(path: Path) -> bool:
    for _, row in read_rows(path):
        return "continuation" in row
    raise DataError(f"{path}: has no rows")


def choose_teacher(data: Sequence[str], teacher: Teacher) -> Teacher:
    """Resolve "auto" for these files: stored if each continuations file has its top-k, otherwise online."""
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


def check_teacher(sources: Sequence[Source], llm: str | None, llm_sha256: str | None) -> None:
    """Raise DataError unless the continuations, and their stored teacher, come from the LLM of this run.

    Files that do not name their LLM (written by a server or another program) are not checked.
    """
    for source in sources:
        digest = (Job(source.path).header() or {}).get("llm_sha256")
        if source.teacher is not None:
            digest = source.teacher.meta.get("llm_sha256")
        if digest is not None and digest != llm_sha256:
            raise DataError(
                f"{source.path}: was written by another LLM (digest {digest[:12]}…) than --llm "
                f"{llm} ({str(llm_sha256)[:12]}…); the LLM "
                "that will listen must be the one that wrote: run blsp continue with it"
            )


def shared_template_args(sources: Sequence[Source], given: dict[str, Any]) -> dict[str, Any] | None:
    """The chat template's variables with which the continuations were written; `given` ones must be the same.

    None if there are neither: a plain manifest has no prompt.
    """
    args, origin = (given, "--template-arg") if given else (None, "")
    for source in sources:
        header = Job(source.path).header() or {}
        if "chat_template_sha256" not in header:
            continue
        written = header.get("template_args") or {}
        if args is not None and written != args:
            raise DataError(
                f"{source.path}: was written with {show_args(written)}, but {origin} says {show_args(args)}; the LLM "
                "must read one prompt in both steps: run blsp continue again, or give the same --template-arg"
            )
        args, origin = written, str(source.path)
    return args


# --- measured rows ----------------------------------------------------------------------------------------

ROWS_AT_A_TIME = 4096  # rows that are measured, and looked up in the feature cache, together

ROW = np.dtype(
    [
        ("id_hash", "<u8"),  # of the utterance's id: the key of its augmentation
        ("row", "<i8"),  # row number in its source
        ("source", "<u2"),
        ("template", "<u4"),  # index into the dataset's (instruction, order) pairs
        ("encoder_frames", "<i4"),  # of the speech, 50 a second
        ("transcript_tokens", "<i4"),
        ("tokens_after_audio", "<i4"),  # prompt suffix and response, without the response's last token
        ("no_speech", "?"),
    ]
)
# A measured row with two keys: rows that share a key belong to one group.
MEASURED = np.dtype([("values", ROW), ("recording", "<u8"), ("text", "<u8")])


class Measures(NamedTuple):
    """The numbers of one row: the last five fields of `ROW`."""

    template: int
    encoder_frames: int
    transcript_tokens: int
    tokens_after_audio: int
    no_speech: bool


class Refused(Exception):
    """A row that cannot be used for training; the message is the reason in the skip list."""


@dataclass(frozen=True)
class Dataset:
    """The rows of a run.

    rows, held_out: arrays of `ROW`, memory-mapped. per_source: how many of `rows` come from each source.
    templates: the (instruction, order) pairs that `ROW.template` counts.
    """

    sources: tuple[Source, ...]
    rows: NDArray[np.void]
    held_out: NDArray[np.void]
    per_source: tuple[int, ...]
    templates: tuple[tuple[str, str], ...]

    def utterance(self, row: np.void) -> Utterance:
        """The manifest row that a measured row stands for."""
        return self.sources[int(row["source"])].rows[int(row["row"])]


def open_dataset(
    sources: Sequence[Source], measurer: RowMeasurer, folder: Path, skipped: SkippedLog, hold_out: int, runtime: Runtime
) -> Dataset:
    """The run's rows: measured by the first process unless the folder has them, then mapped by all processes."""
    head = folder / "table.json"
    facts = {"sources": [_source_facts(source) for source in sources], "hold_out": hold_out}
    names = ", ".join(str(source.path) for source in sources)
    if runtime.rank == 0 and not head.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _measure_sources(sources, measurer, folder, skipped, hold_out)
        counts = np.bincount(_load_rows(folder / "rows.npy")["source"], minlength=len(sources)).tolist()
        # Written last: the other files are complete only if this one exists
        write_json(head, {"facts": facts, "templates": measurer.templates, "per_source": counts})
    barrier(runtime)
    stored = json.loads(head.read_text(encoding="utf-8"))
    if stored["facts"] != facts:
        raise DataError(
            f"{folder}: was started with other data ({names} changed); restore the files, or start a new run "
            "with another --out"
        )
    rows, held_out = _load_rows(folder / "rows.npy"), _load_rows(folder / "held_out.npy")
    if not len(rows):
        raise DataError(f"no row of {names} can be learnt from: see {skipped.path}")
    templates = stored["templates"] if "templates" in stored else stored["frames"]  # the name before 2026-11
    pairs = tuple((instruction, order) for instruction, order in templates)
    return Dataset(tuple(sources), rows, held_out, tuple(stored["per_source"]), pairs)


def _load_rows(path: Path) -> NDArray[np.void]:
    """`ROW`s mapped from disk; older files have the same layout under other field names."""
    return np.load(path, mmap_mode="r").view(ROW)


def _source_facts(source: Source) -> dict[str, object]:
    """Facts that change when a data file changes: its length and a digest of its two ends."""
    size, ends = read_ends(source.path)
    return {"bytes": size, "ends": hashlib.sha256(ends).hexdigest(), "weight": source.weight}


def _measure_sources(
    sources: Sequence[Source], measurer: RowMeasurer, folder: Path, skipped: SkippedLog, hold_out: int
) -> None:
    """Measure every row once, block by block; then write rows.npy and held_out.npy."""
    count = 0
    with tempfile.TemporaryFile(dir=folder) as scan:
        for number, source in enumerate(sources):
            for first in range(0, len(source.rows), ROWS_AT_A_TIME):
                block = _measure_block(number, source, first, measurer, skipped)
                scan.write(block.tobytes())
                count += len(block)
        scan.flush()
        measured = np.memmap(scan, MEASURED, "r", shape=(count,)) if count else np.empty(0, MEASURED)
        groups = group_rows(measured["recording"], measured["text"])
        no_speech = measured["values"]["no_speech"]
        chosen = choose_groups(groups, no_speech, hold_out)
        _write_rows(folder / "rows.npy", measured, ~chosen)
        _write_rows(folder / "held_out.npy", measured, chosen & ~no_speech)


def _measure_block(
    number: int, source: Source, first: int, measurer: RowMeasurer, skipped: SkippedLog
) -> NDArray[np.void]:
    """`MEASURED` entries of a block of rows; those that cannot be used go to the skip list."""
    utterances = source.rows[first : first + ROWS_AT_A_TIME]
    entries = []
    for row, (utterance, measures) in enumerate(
        zip(utterances, measurer.measure(utterances), strict=True), start=first
    ):
        if isinstance(measures, Refused):
            skipped.add(utterance.id, utterance.audio, str(measures))
            continue
        entries.append(((text_hash(utterance.id), row, number, *measures), *group_keys(utterance)))
    return np.array(entries, MEASURED)


def _write_rows(path: Path, measured: NDArray[np.void], chosen: NDArray[np.bool_]) -> None:
    """Write the chosen rows as .npy, block by block, so that memory does not grow with their number."""
    count = int(chosen.sum())
    with write_atomically(path) as partial:
        if not count:  # an empty file cannot be mapped
            with open(partial, "wb") as file:
                np.save(file, np.empty(0, ROW))
            return
        out = np.lib.format.open_memmap(partial, "w+", ROW, (count,))
        take_room(partial)
        end = 0
        for start in range(0, len(measured), 1 << 18):
            block = measured["values"][start : start + (1 << 18)][chosen[start : start + (1 << 18)]]
            out[end : end + len(block)] = block
            end += len(block)
        out.flush()


# --- groups and held-out rows -----------------------------------------------------------------------------
def text_hash(text: str) -> int:
    """A 64-bit hash of a text, the same in every process."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def recording_of(id: str) -> str:
    """The id of the recording that a clip is a copy of, or its own: "clip-7/augmented-2" is a copy of "clip-7"."""
    return id.split("/augmented-")[0]


def group_keys(utterance: Utterance) -> tuple[int, int]:
    """Hashes of an utterance's recording and of its words; of its field `group` instead, if it has one."""
    group = utterance.extra.get("group")
    if group is not None:
        return (text_hash(f"group {group}"),) * 2
    recording = text_hash(f"recording {recording_of(utterance.id)}")
    words = " ".join(split_words(utterance.text.casefold()))
    return recording, text_hash(f"text {words}") if words else recording


def group_rows(recordings: NDArray[np.uint64], texts: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The group of each row, as the smallest hash of a recording in it. Rows that share a recording or a text,
    also through other rows, are in one group.

    Example: recordings [1, 1, 2, 3] and texts [7, 8, 8, 9] give the groups [1, 1, 1, 3].
    """
    _, recording = np.unique(recordings, return_inverse=True)
    _, text = np.unique(texts, return_inverse=True)
    groups = np.array(recordings)
    while True:
        before = groups
        for key in (text, recording):  # a row takes the smallest group among the rows with its key
            smallest = np.full(len(groups), np.iinfo(np.uint64).max, dtype=np.uint64)
            np.minimum.at(smallest, key, groups)
            groups = smallest[key]
        if np.array_equal(groups, before):
            return groups


def choose_groups(groups: NDArray[np.uint64], no_speech: NDArray[np.bool_], hold_out: int) -> NDArray[np.bool_]:
    """True at the rows of the first `hold_out` groups, at most a tenth of all groups and of all rows with speech.

    A group that is too large for the rest of the tenth, such as a text that thousands of clips share, is skipped.
    Nothing is learnt from a chosen group, but only its clips with speech can be measured, and so are held out.
    """
    names, sizes = np.unique(groups[~no_speech], return_counts=True)  # in the order of the hashes
    groups_left, rows_left, chosen = min(hold_out, len(names) // 10), int(sizes.sum()) // 10, []
    for name, size in zip(names, sizes.tolist(), strict=True):
        if groups_left and size <= rows_left:
            chosen.append(name)
            groups_left, rows_left = groups_left - 1, rows_left - size
    return np.isin(groups, np.array(chosen, dtype=np.uint64))


def learnt_from(utterances: Sequence[Utterance], hold_out: int) -> list[Utterance]:
    """The rows of a manifest that a run on only this manifest learns from."""
    keys = np.array([group_keys(utterance) for utterance in utterances], dtype=np.uint64).reshape(-1, 2)
    no_speech = np.array([utterance.no_speech for utterance in utterances], dtype=bool)
    chosen = choose_groups(group_rows(keys[:, 0], keys[:, 1]), no_speech, hold_out)
    return [utterance for utterance, held in zip(utterances, chosen, strict=True) if not held]
