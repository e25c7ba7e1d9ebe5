"""`blsp transcribe`: what was said in each recording, in the order given.

In:  audio files; a model.
Out: `{"audio", "text"}`, one line of JSON a file, to a file (resumable) or to the screen.
Try: `blsp transcribe question.wav`
Flow: inference/ — recordings → **Listener.transcribe_all** → transcripts.

An adapter that reads out writes its own tokens, and the LLM chooses among the likeliest sequences (`--readout`: the
likeliest, and the LLM is not run); with the other adapters, or when asked, the LLM repeats what it hears. A file that
cannot be read is named with the reason, on the screen and in `<out>.skipped.jsonl`, and the job goes on. Where no
speech is heard, the text is "".
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
from blsp.inference.listener import Listener, load
from blsp.weights.shipped import model_digest

if TYPE_CHECKING:
    from blsp.settings import TranscribeSettings


def transcribe(settings: TranscribeSettings) -> None:
    """Write down what is said in `settings.files`; files that `settings.out` holds are not heard again."""
    readout = True if settings.readout else False if settings.repeat else None
    if settings.out is None:
        _transcribe(settings, readout, 0, _to_screen, lambda name, reason: None)
        return
    asked = {"model": settings.model, "readout": readout, "max_new_tokens": settings.max_new_tokens}
    with Job(settings.out) as job:
        job.begin(asked | {"model_sha256": model_digest(settings.model)})
        skipped = job.skipped
        done = job.count_done(({"audio": name} for name in settings.files), key="audio", answer="text")
        if done < len(settings.files):
            _transcribe(
                settings, readout, done, job.log.append, lambda name, why: skipped.add(name, name, why)
            )
        written = len(settings.files) - sum(name in skipped for name in settings.files)
        print(f"{settings.out}: {written} of {len(settings.files)} files transcribed", end="")
        print(f"; {skipped.count} skipped, see {skipped.path}" if skipped.count else "")


def _transcribe(
    settings: TranscribeSettings,
    readout: bool | None,
    done: int,
    write: Callable[[dict[str, Any]], None],
    skip: Callable[[str, str], None],
) -> None:
    listener = load(settings.model, device=settings.device, dtype=settings.dtype)
    if readout and not listener.reads_out:
        listener.readout([])  # says why not, before anything is heard
    size, files = settings.batch_size, settings.files
    with tqdm(total=len(files), initial=done, desc="listening", unit="file", disable=None) as bar:
        for begin in range(done - done % size, len(files), size):
            chunk = files[begin : begin + size]
            texts = transcribe_files(
                listener,
                chunk,
                skip,
                readout=readout,
                max_new_tokens=settings.max_new_tokens,
                batch_size=size,
            )
            for place, (name, text) in enumerate(zip(chunk, texts, strict=True), start=begin):
                if place >= done:
                    if text is not None:
                        write({"audio": name, "text": text})
                    bar.update()


def transcribe_files(
    listener: Listener, files: Sequence[str], skip: Callable[[str, str], None], **how: Any
) -> list[str | None]:
    """What is said in each file; None where it cannot be read, after `skip(file, reason)`."""
    clips: dict[int, np.ndarray] = {}
    for place, name in enumerate(files):
        try:
            clips[place] = load_audio(name)
        except AudioError as error:
            print(f"blsp: skipped: {error}", file=sys.stderr)
            skip(name, str(error))
    texts = dict(zip(clips, listener.transcribe_all(list(clips.values()), **how), strict=True))
    return [texts.get(place) for place in range(len(files))]


def _to_screen(row: dict[str, Any]) -> None:
    with tqdm.external_write_mode():
        print(json.dumps(row, ensure_ascii=False), flush=True)
