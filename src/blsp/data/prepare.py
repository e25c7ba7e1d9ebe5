"""`blsp prepare`: a corpus on disk -> a manifest, streaming, resumable.

    $ blsp prepare librispeech --root /data/LibriSpeech --split dev-clean --out dev.jsonl
    dev.jsonl: 2,703 rows; 0 left out

In: `PrepareSettings`. Out: the manifest, OUT.meta.json (settings and counts) and, if anything was left out,
OUT.skipped.jsonl. Rows are appended to a hidden partial file, one whole line at a time; a run that was
killed counts what is there, lets the reader go past it (readers keep their order), and goes on; the file
gets its name at the end. Memory does not grow with the corpus. First step of the flow; `blsp continue` and
`blsp encode` come next.
"""

from __future__ import annotations

import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from blsp.data.audio import AudioError, load_audio
from blsp.data.corpora import folders, hub, lhotse, no_speech, recognition, translation, understanding
from blsp.data.corpora.reading import CorpusError, Dropped, Read, Row, Wanted
from blsp.data.jsonl import SKIPPED_SUFFIX, RowLog, SkippedLog, read_rows
from blsp.data.manifest import Utterance
from blsp.data.row_index import open_index

if TYPE_CHECKING:
    from blsp.settings import PrepareSettings

CHECKED_AHEAD = 64  # recordings being decoded at a time

READERS: dict[str, Callable[[Wanted], Read]] = {
    "librispeech": recognition.librispeech,
    "gigaspeech": recognition.gigaspeech,
    "tedlium3": recognition.tedlium3,
    "common-voice": translation.common_voice,
    "covost2": translation.covost2,
    "must-c": translation.must_c,
    "fleurs": translation.fleurs,
    "fluent-speech-commands": understanding.fluent_speech_commands,
    "slurp": understanding.slurp,
    "snips": understanding.snips,
    "folder": folders.audio_and_text,
    "kaldi": folders.kaldi,
    "lhotse": lhotse.lhotse,
    "hf": hub.hugging_face,
    "no-speech": no_speech.no_speech,
}


def prepare(settings: PrepareSettings) -> None:
    """Write the manifest of a corpus' part; what is done already is not done again."""
    out = Path(settings.out).absolute()
    job = _job(settings)
    if _is_done(out, job):
        print(f"{settings.out}: is there already, made with these settings")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial_file(out, job)
    rows = _checked(_rows_left(_read(settings, out, job), partial), settings.check_audio)
    first = list(islice(rows, 1))  # before anything is written: a wrong root is found here
    with SkippedLog(out) as skipped, RowLog(partial) as log:
        for row in tqdm(chain(first, rows), desc=settings.corpus, unit=" rows", mininterval=1):
            if isinstance(row, Dropped):
                skipped.add(row.id, row.audio, row.reason)
            else:
                log.append(_relative(row, out.parent))
    _finish(settings, out, partial, job)


def _read(settings: PrepareSettings, out: Path, job: dict[str, Any]) -> Read:
    """The corpus' rows, `limit` utterances at most."""
    wanted = Wanted(
        root=settings.root,
        split=settings.split,
        language=settings.language,
        target_language=settings.target_language,
        made_audio=out.parent / f"{out.stem}_audio" / _mark(job),
        text_field=settings.text_field,
        reference_field=settings.reference_field,
        subset=settings.subset,
        limit=settings.limit,
        seed=settings.seed,
    )
    left = settings.limit
    for row in READERS[settings.corpus](wanted):
        yield row
        if left is not None and isinstance(row, Utterance):
            left -= 1
            if not left:
                return


# --- going on where a run stopped -------------------------------------------------------------------------


def _job(settings: PrepareSettings) -> dict[str, Any]:
    """What decides about the manifest's content."""
    named = ["corpus", "split", "language", "target_language", "text_field", "reference_field", "subset"]
    job = {name: getattr(settings, name) for name in [*named, "check_audio", "limit", "seed"]}
    local = bool(settings.root) and Path(settings.root).exists()
    return job | {"root": os.path.abspath(settings.root) if local else settings.root}


def _mark(job: dict[str, Any]) -> str:
    """What a job's files are called by, so that another job's are never taken for them."""
    return f"{zlib.crc32(json.dumps(job, sort_keys=True).encode()):08x}"


def _meta_file(out: Path) -> Path:
    return out.with_name(f"{out.name}.meta.json")


def _is_done(out: Path, job: dict[str, Any]) -> bool:
    if not out.exists():
        return False
    meta = _meta_file(out)
    if meta.exists() and json.loads(meta.read_text(encoding="utf-8")).get("settings") == job:
        return True
    raise CorpusError(f"{out}: exists and was not made with these settings; remove it or name another --out")


def _partial_file(out: Path, job: dict[str, Any]) -> Path:
    """The job's own partial file; what another job left half done under this name goes."""
    partial = out.with_name(f".{out.name}.{_mark(job)}.partial")
    for other in out.parent.glob(f".{out.name}.*.partial"):
        if other != partial:
            other.unlink()
    if not partial.exists():
        Path(f"{out}{SKIPPED_SUFFIX}").unlink(missing_ok=True)
    return partial


def _rows_left(rows: Read, partial: Path) -> Read:
    """The rows after the last one that stands in the partial file."""
    if not partial.exists():
        yield from rows
        return
    RowLog(partial).close()  # cuts off a torn line
    count, last = 0, ""
    for _, row in read_rows(partial):
        count, last = count + 1, str(row.get("id"))
    if count and all(row.id != last for row in rows):
        partial.unlink()
        raise CorpusError(
            f"the corpus has changed since the last run ({last} is gone); run the command again"
        )
    yield from rows


# --- checking and writing ---------------------------------------------------------------------------------


def _checked(rows: Read, check_audio: bool) -> Read:
    """The rows in their order; with `check_audio`, those that cannot be decoded as `Dropped`."""
    if not check_audio:
        yield from rows
        return
    with ThreadPoolExecutor(os.cpu_count()) as decoders:  # libsndfile and soxr let other threads run
        ahead: list[Future[Row]] = [decoders.submit(_check, row) for row in islice(rows, CHECKED_AHEAD)]
        while ahead:
            yield ahead.pop(0).result()
            ahead += [decoders.submit(_check, row) for row in islice(rows, 1)]


def _check(row: Row) -> Row:
    if isinstance(row, Dropped):
        return row
    try:
        load_audio(row.audio, start=row.start or 0.0, duration=row.duration)
    except AudioError as error:
        return Dropped(row.id, row.audio, f"audio: {error}")
    return row


def _relative(row: Utterance, folder: Path) -> dict[str, Any]:
    """The row as JSON; audio that lies below the manifest's folder is named relative to it."""
    values = row.to_json()
    inside = str(folder) + os.sep
    if row.audio.startswith(inside):
        values["audio"] = row.audio[len(inside) :]
    return values


def _finish(settings: PrepareSettings, out: Path, partial: Path, job: dict[str, Any]) -> None:
    """Refuse a manifest without rows or with an id that occurs twice; else give it its name, and say what
    was done."""
    skipped = _count_skipped(out)
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in skipped.most_common())
    if not partial.stat().st_size:
        partial.unlink()
        raise CorpusError(
            f"{settings.root}: no utterance in {settings.split!r}; left out: {left_out or 'nothing'}"
        )
    index = partial.with_name(f"{partial.name}.idx")
    try:
        rows = len(open_index(partial, ("id",)))
    finally:
        index.unlink(missing_ok=True)
    meta = {"settings": job, "rows": rows, "skipped": dict(skipped)}
    _meta_file(out).write_text(json.dumps(meta, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, out)
    print(
        f"{settings.out}: {rows:,} rows; {skipped.total():,} left out{f' ({left_out})' if left_out else ''}"
    )


def _count_skipped(out: Path) -> Counter[str]:
    """How often each reason occurs, up to its first colon."""
    path = Path(f"{out}{SKIPPED_SUFFIX}")
    rows: Iterator[tuple[int, dict[str, Any]]] = read_rows(path) if path.exists() else iter(())
    return Counter(str(row["reason"]).partition(":")[0] for _, row in rows)
