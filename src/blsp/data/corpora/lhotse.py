"""Reader of Lhotse manifests: cuts, or recordings and supervisions (.jsonl or .jsonl.gz).

In:  a file of cuts; or a folder with PREFIX_cuts_SPLIT.jsonl.gz, or with PREFIX_recordings_SPLIT.jsonl.gz and
     PREFIX_supervisions_SPLIT.jsonl.gz (as Lhotse's recipes name them).
Out: an utterance for each supervision, one at a time.
Try: `next(lhotse(ReadRequest(root="data/manifests", split="train-clean-5", ...)))`
Flow: data/corpora/ — `data/prepare.py` names the readers in `READERS`.

The format is plain JSON (lhotse.readthedocs.io, "Representing a corpus" and "Cuts"), so the library is not
needed.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blsp.data.corpora.reading import (
    Corpus,
    CorpusError,
    Dropped,
    Lookup,
    ReadRequest,
    Row,
    Rows,
    iso,
    make_row,
)
from blsp.data.jsonl import ManifestError, parse_row

LHOTSE = Corpus("Lhotse manifests", "https://lhotse.readthedocs.io (their format)")


def lhotse(request: ReadRequest) -> Rows:
    """Cuts where there are cuts, else recordings joined with supervisions."""
    root = LHOTSE.need(request.folder)
    if root.is_file():
        yield from _from_cuts(root)
        return
    for split in request.splits:
        cuts = _find(root, "cuts", split)
        if cuts is not None:
            yield from _from_cuts(cuts)
            continue
        recordings, supervisions = _find(root, "recordings", split), _find(root, "supervisions", split)
        if recordings is None or supervisions is None:
            there = ", ".join(sorted(path.name for path in root.glob("*.jsonl*"))[:8]) or "no .jsonl file"
            raise CorpusError(
                f"{root}: no cuts and no recordings with supervisions of {split!r}; it has {there}"
            )
        yield from _from_supervisions(recordings, supervisions)


def _find(root: Path, kind: str, split: str) -> Path | None:
    """The one file of a kind and part, such as librispeech_recordings_train-clean-5.jsonl.gz or
    cuts_dev.jsonl."""
    word = r"(^|[_.]){}([_.]|$)"
    named = [path for path in sorted(root.glob("*.jsonl*")) if re.search(word.format(kind), path.name)]
    files = [path for path in named if re.search(word.format(re.escape(split)), path.name)]
    if len(files) > 1:
        raise CorpusError(
            f"{root}: {files[0].name} and {files[1].name} both are {kind} of {split!r}; name one file"
        )
    return files[0] if files else None


def _objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", object) of a .jsonl or .jsonl.gz file."""
    opened = gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # noqa: SIM115
    try:
        with opened as lines:
            for line, raw in enumerate(lines, start=1):
                if raw.strip():
                    yield f"{path}:{line}", parse_row(raw, f"{path}:{line}")
    except (ManifestError, OSError, EOFError, zlib.error) as error:
        raise CorpusError(f"{error}" if str(path) in str(error) else f"{path}: damaged ({error})") from error


def _from_cuts(path: Path) -> Rows:
    """A cut's supervisions; their times count from the cut's start."""
    for where, cut in _objects(path):
        recording = cut.get("recording")
        if not isinstance(recording, dict):
            kind = cut.get("type", "no recording")
            yield Dropped(str(cut.get("id")), "", f"no single recording: the cut is a {kind}")
            continue
        with _as_published(where):
            for supervision in cut.get("supervisions", []):
                yield _utterance(supervision, recording, float(cut.get("start", 0.0)), path)


def _from_supervisions(recordings: Path, supervisions: Path) -> Rows:
    listed = ((str(recording.get("id")), json.dumps(recording)) for _, recording in _objects(recordings))
    with Lookup(listed) as known:
        for where, supervision in _objects(supervisions):
            recording = known.get(str(supervision.get("recording_id")))
            if recording is None:
                reason = f"no recording: {supervision.get('recording_id')} is not in {recordings.name}"
                yield Dropped(str(supervision.get("id")), "", reason)
            else:
                with _as_published(where):
                    yield _utterance(supervision, json.loads(recording), 0.0, recordings)


@contextmanager
def _as_published(where: str) -> Iterator[None]:
    """A field that is missing or of another kind is an error about that line."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise CorpusError(f"{where}: not a Lhotse supervision with its recording ({error!r})") from error


def _utterance(supervision: dict[str, Any], recording: dict[str, Any], offset: float, path: Path) -> Row:
    id = str(supervision["id"])
    start, duration = offset + float(supervision["start"]), float(supervision["duration"])
    sources, seconds = recording["sources"], float(recording["duration"])
    unfit = _why_unfit(recording, sources)
    if unfit:
        return Dropped(id, str(recording.get("id")), f"unfit recording: {unfit}")
    audio = Path(str(sources[0]["source"]))
    whole = start <= 0 and abs(duration - seconds) < 0.001
    return make_row(
        id,
        path.parent / audio if (path.parent / audio).exists() else audio.absolute(),
        str(supervision.get("text") or ""),
        start=None if whole else round(max(0.0, start), 6),
        duration=None if whole else round(duration, 6),
        language=iso(supervision.get("language")),
        speaker=supervision.get("speaker"),
    )


def _why_unfit(recording: dict[str, Any], sources: Any) -> str | None:
    """What we cannot read as one file of one voice, in words."""
    if len(sources) != 1 or sources[0].get("type") != "file":
        return "its audio is not one file"
    if len(sources[0].get("channels", [0])) > 1:
        return "it has several channels, of which a supervision means one"
    if recording.get("transforms"):
        return "it is transformed on the fly (speed, volume); save it as audio first"
    return None
