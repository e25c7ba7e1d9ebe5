"""`blsp transcribe`: the transcript of each recording, in the order given.

In:  audio files; a model.
Out: `{"audio", "text"}`, one line of JSON a file, to a file (resumable) or to the screen.
Try: `blsp transcribe question.wav`
Flow: inference/ — recordings → **Listener.transcribe_all** → transcripts.

An adapter that reads out writes its own tokens, and the LLM helps to choose among the likeliest sequences
(`--readout`: the likeliest one, without the LLM). With the other adapters, or with `--repeat`, the LLM repeats the
speech. A file that cannot be read is named with the reason, on the screen and in `<out>.skipped.jsonl`, and the job
goes on. Where no speech is found, the text is "".
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from blsp.data.audio import AudioError, load_audio
from blsp.data.jobs import Job
from blsp.inference.listener import Listener, TranscribeMethod, load
from blsp.weights.shipped import model_digest

if TYPE_CHECKING:
    from blsp.settings import TranscribeSettings

Write = Callable[[dict[str, Any]], None]
Skip = Callable[[str, str], None]  # (file, reason)


def transcribe(settings: TranscribeSettings) -> None:
    """Transcribe `settings.files`; those that `settings.out` holds are not transcribed again."""
    if settings.out is None:
        _transcribe(settings, 0, _print_row, lambda name, reason: None)
        return
    files = settings.files
    readout = {"readout": True, "repeat": False}.get(_method(settings) or "")  # the header's older form
    header = {"model": settings.model, "readout": readout, "max_new_tokens": settings.max_new_tokens}
    with Job(settings.out) as job:
        job.begin(header | {"model_sha256": model_digest(settings.model)})
        done = job.count_done(({"audio": name} for name in files), key="audio", answer="text")
        if done < len(files):
            _transcribe(settings, done, job.log.append, lambda name, why: job.skipped.add(name, name, why))
        transcribed = len(files) - sum(name in job.skipped for name in files)
        print(f"{settings.out}: {transcribed} of {len(files)} files transcribed", end="")
        print(f"; {job.skipped.count} skipped, see {job.skipped.path}" if job.skipped.count else "")


def _method(settings: TranscribeSettings) -> TranscribeMethod | None:
    return "readout" if settings.readout else "repeat" if settings.repeat else None


def _transcribe(settings: TranscribeSettings, done: int, write: Write, skip: Skip) -> None:
    """Transcribe all files from number `done` on.

    The chunk in which a killed job stopped is computed again as a whole, since the last digits of a clip depend on the
    clips beside it; only what is missing is written.
    """
    listener = load(
        settings.model, audio_model=settings.audio_model, llm=settings.llm, device=settings.device, dtype=settings.dtype
    )
    if settings.readout and not listener.reads_out:
        listener.readout([])  # raises the error that says why not, before any file is read
    size, files = settings.batch_size, settings.files
    options = {"method": _method(settings), "max_new_tokens": settings.max_new_tokens, "batch_size": size}
    with tqdm(total=len(files), initial=done, desc="transcribing", unit="file", disable=None) as bar:
        for begin in range(done - done % size, len(files), size):
            chunk = files[begin : begin + size]
            texts = transcribe_files(listener, chunk, skip, **options)
            for name, text in list(zip(chunk, texts, strict=True))[max(done - begin, 0) :]:
                if text is not None:
                    write({"audio": name, "text": text})
                bar.update()


def transcribe_files(listener: Listener, files: Sequence[str], skip: Skip, **options: Any) -> list[str | None]:
    """The transcript of each file; None where it cannot be read, after `skip(file, reason)`."""
    clips: dict[int, np.ndarray] = {}
    for i, name in enumerate(files):
        try:
            clips[i] = load_audio(name)
        except AudioError as error:
            print(f"blsp: skipped: {error}", file=sys.stderr)
            skip(name, str(error))
    texts = dict(zip(clips, listener.transcribe_all(list(clips.values()), **options), strict=True))
    return [texts.get(i) for i in range(len(files))]


def _print_row(row: dict[str, Any]) -> None:
    with tqdm.external_write_mode():
        print(json.dumps(row, ensure_ascii=False), flush=True)
