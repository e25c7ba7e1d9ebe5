"""`blsp prepare`: a corpus on disk becomes a manifest.

In:  `PrepareSettings`.
Out: the manifest; OUT.meta.json (settings and counts); OUT.skipped.jsonl, if anything was left out.
Try: `blsp prepare librispeech --root /data/LibriSpeech --split dev-clean --out dev.jsonl`
Flow: **corpora → manifest** → continuations (`blsp continue`) → speech features (`blsp encode`).

After a kill, the same command counts the rows of its part file (jobs.py), skips as many rows of the reader (readers
keep their order), and continues. Memory does not grow with the corpus.
"""

import os
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import fields, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from blsp.data.audio import AudioError, is_silent
from blsp.data.clips import load_clip
from blsp.data.corpora import folders, hub, multilingual, no_speech, recognition, shards, tables, understanding
from blsp.data.corpora.reading import CorpusError, Dropped, ReadRequest, Row, Rows
from blsp.data.files import digest_of, read_rows
from blsp.data.jobs import Job, in_order
from blsp.data.manifest import Utterance, name_relative
from blsp.data.row_index import index_path, open_index
from blsp.settings import PrepareSettings

CHECKED_AHEAD = 64  # recordings being decoded at a time

READERS: dict[str, Callable[[ReadRequest], Rows]] = {
    "librispeech": recognition.librispeech,
    "gigaspeech": recognition.gigaspeech,
    "tedlium3": recognition.tedlium3,
    "common-voice": multilingual.common_voice,
    "covost2": multilingual.covost2,
    "must-c": multilingual.must_c,
    "fleurs": multilingual.fleurs,
    "fluent-speech-commands": understanding.fluent_speech_commands,
    "slurp": understanding.slurp,
    "snips": understanding.snips,
    "folder": folders.audio_and_text,
    "kaldi": folders.kaldi,
    "lhotse": folders.lhotse,
    "csv": tables.csv_table,
    "tsv": tables.tsv_table,
    "jsonl": tables.jsonl_table,
    "nemo": tables.nemo,
    "webdataset": shards.webdataset,
    "shar": shards.shar,
    "hf": hub.hugging_face,
    "no-speech": no_speech.no_speech,
}


def prepare(settings: PrepareSettings) -> None:
    """Write the manifest of a part of a corpus; rows that are written already are not read again."""
    out, facts = Path(settings.out).absolute(), _facts(settings)
    with Job(out) as job:
        if out.exists():
            job.require_same(job.require_header().get("settings", {}), facts)
            print(f"{settings.out}: exists already, made with the same settings")
            return
        rows = _read(settings, out, facts)
        first = list(islice(rows, 1))  # finds a wrong root before anything is written
        parts = job.parts(facts)
        if not parts.paths():
            job.skipped_path.unlink(missing_ok=True)  # of another job that was stopped
        with parts.log() as log:
            rows = _checked(_rows_left(_unique(chain(first, rows)), log.path), settings.check_audio)
            for row in tqdm(rows, desc=settings.corpus, unit=" rows", mininterval=1):
                if isinstance(row, Dropped):
                    job.skipped.add(row.id, row.audio, row.reason)
                else:
                    log.append(name_relative(row.to_json(), out.parent))
        _finish(settings, job, log.path, facts)


def _facts(settings: PrepareSettings) -> dict[str, Any]:
    """The settings that decide the manifest's content."""
    named = ["corpus", "split", "language", "target_language", "subset"]
    named += ["audio_column", "text_column", "reference_column"]
    facts = {name: getattr(settings, name) for name in [*named, "check_audio", "limit", "seed"]}
    local = bool(settings.root) and Path(settings.root).exists()
    return facts | {"root": os.path.abspath(settings.root) if local else settings.root}


def _read(settings: PrepareSettings, out: Path, facts: dict[str, Any]) -> Rows:
    """The corpus' rows, with at most `limit` utterances."""
    made_audio = out.parent / f"{out.stem}_audio" / digest_of(facts)[:8]
    given = {field.name: getattr(settings, field.name) for field in fields(ReadRequest) if field.name != "made_audio"}
    request, left = ReadRequest(**given, made_audio=made_audio), settings.limit
    for row in READERS[settings.corpus](request):
        yield row
        if left is not None and isinstance(row, Utterance):
            left -= 1
            if not left:
                return


def _unique(rows: Rows) -> Rows:
    """The rows, with `Dropped` instead of a row whose id was used before. The ids are in a temporary database.

    The second row with the id `a` is listed as `a (2)` if it is left out, as the skip list holds an id once.
    """
    with closing(sqlite3.connect("")) as seen:
        seen.execute("CREATE TABLE ids (id TEXT PRIMARY KEY, rows INTEGER, used INTEGER) WITHOUT ROWID")
        for row in rows:
            known = seen.execute("SELECT rows, used FROM ids WHERE id = ?", (row.id,)).fetchone()
            before, used = known or (0, False)
            kept = isinstance(row, Utterance)
            seen.execute("REPLACE INTO ids VALUES (?, ?, ?)", (row.id, before + 1, used or kept))
            if kept and used:
                row = Dropped(row.id, row.audio, "repeated id: an earlier row has it")
            yield replace(row, id=f"{row.id} ({before + 1})") if before and isinstance(row, Dropped) else row


def _rows_left(rows: Rows, part: Path) -> Rows:
    """The rows after the last one in the part file, which a row that was left out may share its id with."""
    count, last = 0, ""
    for _, row in read_rows(part):
        count, last = count + 1, str(row.get("id"))
    if count and all(isinstance(row, Dropped) or row.id != last for row in rows):
        part.unlink()
        raise CorpusError(f"the corpus has changed since the last run ({last} is gone); run the command again")
    yield from rows


# --- checking and writing ---------------------------------------------------------------------------------
def _checked(rows: Rows, check_audio: bool) -> Rows:
    """The rows in order; with `check_audio`, `Dropped` instead of rows that cannot be decoded or are silent."""
    if not check_audio:
        yield from rows
        return
    with ThreadPoolExecutor(os.cpu_count()) as decoders:  # libsndfile and soxr let other threads run
        yield from in_order(decoders, _check, rows, CHECKED_AHEAD)


def _check(row: Row) -> Row:
    if isinstance(row, Dropped):
        return row
    try:
        audio = load_clip(row)
    except AudioError as error:
        return Dropped(row.id, row.audio, f"audio: {error}")
    if row.text.strip() and not row.no_speech and is_silent(audio):
        return Dropped(row.id, row.audio, f"silence under a transcript: {row.text}")
    return row


def _finish(settings: PrepareSettings, job: Job, part: Path, facts: dict[str, Any]) -> None:
    """Raise CorpusError for a manifest without rows; otherwise give it its name, and print what was done."""
    dropped = read_rows(job.skipped_path) if job.skipped_path.exists() else ()
    reasons = Counter(str(row["reason"]).partition(":")[0] for _, row in dropped)
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
    if not part.stat().st_size:
        shutil.rmtree(job.parts_folder)
        raise CorpusError(f"{settings.root}: no utterance in {settings.split!r}; left out: {left_out or 'nothing'}")
    rows = len(open_index(part, ("id",)))
    os.replace(index_path(part), index_path(job.out))
    job.finish(part, {"settings": facts, "rows": rows, "skipped": dict(reasons)})
    more = f" ({left_out})" if left_out else ""
    print(f"{settings.out}: {rows:,} rows; {reasons.total():,} left out{more}")
