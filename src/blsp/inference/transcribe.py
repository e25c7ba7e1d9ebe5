"""`blsp transcribe`: the transcript of each recording, in the order given.

In:  audio files; a model.
Out: one line of JSON for each recording, `{"audio", "text"}`, with times also `{"seconds", "times", "segments"}`; or a
     txt, json, srt or vtt file for each. The output is a file or a folder (both resumable), or the screen.
Try: `blsp transcribe question.wav`, `blsp transcribe meeting.wav --out meeting.srt`
Flow: inference/ — recordings → **transcript.py** → files

A folder holds `transcripts.jsonl`, the lines of all recordings. Its other files are written from these lines, so
another format needs no new transcription. A recording that cannot be read is reported with the reason, on the screen
and in `<out>.skipped.jsonl`, and the job continues. If no speech is found, the text is "".
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from blsp.data.audio import AudioError, load_audio, probe_audio
from blsp.data.files import read_rows, write_text
from blsp.data.jobs import Job, JobError
from blsp.inference.listener import Listener, load, load_options
from blsp.inference.transcript import TranscribeMethod, Transcript, transcripts
from blsp.weights.shipped import model_digest

if TYPE_CHECKING:
    from blsp.settings import TranscribeSettings
    from blsp.settings.shared import TranscriptFormat

Write = Callable[[dict[str, Any]], None]
Skip = Callable[[str, str], None]  # (file, reason)
RECORD = "transcripts.jsonl"  # in a folder of files
MOST_SECONDS = 1800.0  # of recordings in memory at once, unless one is longer


def transcribe(settings: TranscribeSettings) -> None:
    """Transcribe `settings.files`, except those that are in `settings.out` already."""
    kind, out, folder = settings.written_as, settings.out, settings.folder

    def text_of(row: dict[str, Any]) -> str:
        return document(row, kind, settings.timestamps)

    if folder is not None:
        _resumable(settings, folder / RECORD, lambda row: write_text(folder / _name(row, kind), text_of(row)))
    elif out is not None and kind == "jsonl":
        _resumable(settings, out, lambda row: None)
    else:
        skipped: list[str] = []

        def write(row: dict[str, Any]) -> None:
            _print(text_of(row)) if out is None else write_text(out, text_of(row))

        _transcribe(settings, 0, write, lambda name, reason: skipped.append(name))
        if len(skipped) == len(settings.files):
            raise JobError(f"none of the {len(skipped)} recordings could be read; each is named above")


def _name(row: dict[str, Any], kind: TranscriptFormat) -> str:
    return f"{Path(row['audio']).stem}.{kind}"


def _resumable(settings: TranscribeSettings, out: Path, write: Write) -> None:
    """Add the missing rows to `out`; `write` gets each row of `out`."""
    files = settings.files
    readout = {"readout": True, "repeat": False}.get(_method(settings) or "")  # the header's older form
    header = {"model": settings.model, "readout": readout, "max_new_tokens": settings.max_new_tokens}
    header |= {"timestamps": _timed(settings) or None, "aligner": settings.aligner, "weights": settings.weights}
    header["vad"] = None if settings.vad == "auto" else settings.vad
    with Job(out) as job:
        job.begin(header | {"model_sha256": model_digest(settings.model)})
        done = job.count_done(({"audio": name} for name in files), "audio", "text", "seconds", "times", "segments")

        for _, row in read_rows(out) if done else ():
            write(row)

        def append(row: dict[str, Any]) -> None:
            job.log.append(row)
            write(row)

        if done < len(files):
            _transcribe(settings, done, append, lambda name, why: job.skipped.add(name, name, why))
        job.report(len(files) - sum(name in job.skipped for name in files), len(files), "files transcribed")


def _method(settings: TranscribeSettings) -> TranscribeMethod | None:
    return "readout" if settings.readout else "repeat" if settings.repeat else None


def _timed(settings: TranscribeSettings) -> bool:
    """Whether times are needed."""
    return settings.timestamps or settings.folder is not None or settings.written_as in ("json", "srt", "vtt")


def _transcribe(settings: TranscribeSettings, done: int, write: Write, skip: Skip) -> None:
    """Transcribe all files from number `done` on.

    The chunk in which a killed job stopped is computed again with all its files, since rounding depends on the clips in
    a batch; only missing rows are written.
    """
    listener = load(settings.model, **load_options(settings))
    if settings.readout and not listener.reads_out:
        listener.readout([])  # raises the error now, before any file is read
    aligner = None
    if settings.aligner and not listener.reads_out:
        aligner = load(settings.aligner, device=settings.device, dtype=settings.dtype)
    if aligner and not aligner.reads_out:
        aligner.readout([])
    lengths = [_seconds(name) for name in settings.files]
    with tqdm(
        total=round(sum(lengths), 1), initial=round(sum(lengths[:done]), 1), desc="transcribing", unit="s", disable=None
    ) as bar:
        for begin, end in _chunks(lengths, settings.batch_size):
            if end <= done:
                continue
            before = bar.n
            found = transcribe_files(
                listener,
                settings.files[begin:end],
                skip,
                method=_method(settings),
                max_new_tokens=settings.max_new_tokens,
                batch_size=settings.batch_size,
                timestamps=_timed(settings),
                aligner=aligner,
                vad=settings.vad,
                progress=lambda seconds: bar.update(round(seconds, 1)),
            )
            for number, transcript in enumerate(found, start=begin):
                if number >= done and transcript is not None:
                    write({"audio": settings.files[number], **transcript.row()})
            bar.update(max(0.0, round(before + sum(lengths[max(begin, done) : end]) - bar.n, 1)))


def _seconds(name: str) -> float:
    """The length of a recording; 0 if it cannot be read, which is reported later."""
    with suppress(AudioError):
        return probe_audio(name).seconds
    return 0.0


def _chunks(lengths: Sequence[float], size: int) -> Iterator[tuple[int, int]]:
    """The files (first, end) that are transcribed together: at most `size`, and `MOST_SECONDS` unless one is longer."""
    begin, seconds = 0, 0.0
    for number, length in enumerate(lengths):
        if number > begin and (number - begin == size or seconds + length > MOST_SECONDS):
            yield begin, number
            begin, seconds = number, 0.0
        seconds += length
    if begin < len(lengths):
        yield begin, len(lengths)


def transcribe_files(listener: Listener, files: Sequence[str], skip: Skip, **options: Any) -> list[Transcript | None]:
    """The transcript of each file; None, after `skip(file, reason)`, if it cannot be read."""
    clips: dict[int, np.ndarray] = {}
    for i, name in enumerate(files):
        try:
            clips[i] = load_audio(name)
        except AudioError as error:
            print(f"blsp: skipped: {error}", file=sys.stderr)
            skip(name, str(error))
    found = dict(zip(clips, transcripts(listener, list(clips.values()), **options), strict=True))
    return [found.get(i) for i in range(len(files))]


def document(row: dict[str, Any], kind: TranscriptFormat, timestamps: bool = False) -> str:
    """The text of a row in another format, with a newline at its end. timestamps: also in txt."""
    if kind == "jsonl":
        return json.dumps(row, ensure_ascii=False) + "\n"
    if kind == "json":
        return json.dumps(row, ensure_ascii=False, indent=2) + "\n"
    transcript = Transcript.from_row(row)
    if kind == "txt":
        return transcript.txt() if timestamps else transcript.text + "\n"
    return transcript.srt() if kind == "srt" else transcript.vtt()


def _print(text: str) -> None:
    with tqdm.external_write_mode():
        print(text, end="", flush=True)
