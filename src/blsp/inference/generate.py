"""`blsp generate`: an answer to every row of a manifest, spoken or written.

In:  a manifest; a model; an instruction for rows that have none of their own.
Out: the rows, in their order, plus `response`; clips that cannot be heard in `<out>.skipped.jsonl`.
Try: `blsp generate --manifest questions.jsonl --out answers.jsonl`
Flow: inference/ — manifest → **Listener.generate, a chunk of rows at a time** → rows with answers.

A chunk is a fixed stretch of the manifest: its clips are encoded and its prompts decoded sorted by length, and its
rows are written in order. A killed job computes the chunk in which it stopped once more, with the same neighbours,
and writes what was missing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from blsp.data.audio import AudioError, load_audio
from blsp.data.jobs import Job, RowLog, SkippedLog
from blsp.data.manifest import Manifest, Utterance
from blsp.inference.listener import Listener, Question, load
from blsp.llm.decoding import Decoding
from blsp.llm.prompt import Order
from blsp.weights.shipped import model_digest

if TYPE_CHECKING:
    from blsp.settings import GenerateSettings

BATCHES_PER_CHUNK = 4  # the more, the better lengths fit together, and the more clips are held in memory


@dataclass(frozen=True)
class Asking:
    """How rows are asked: `instruction` where a row has none; `decoding` with the seed of the first row."""

    instruction: str
    order: Order
    decoding: Decoding
    batch_size: int

    @property
    def chunk(self) -> int:
        """Rows that are sorted together."""
        return self.batch_size * BATCHES_PER_CHUNK


def generate(settings: GenerateSettings) -> None:
    """Answer the rows of `settings.manifest` that `settings.out` does not hold yet."""
    rows = Manifest(settings.manifest)
    total = len(rows) if settings.limit is None else min(settings.limit, len(rows))
    names = ("model", "instruction", "order", "max_new_tokens", "temperature", "top_p", "seed")
    asked = {name: getattr(settings, name) for name in names}
    with Job(settings.out) as job:
        job.begin(asked | {"model_sha256": model_digest(settings.model)})
        inputs = (written_row(row, settings.out) for row in islice(rows, total))
        done = job.count_done(inputs, key="id", answer="response")
        if done < total:
            listener = load(settings.model, device=settings.device, dtype=settings.dtype)
            decoding = replace(
                listener.decoding,
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                seed=settings.seed,
            )
            asking = Asking(settings.instruction or "", settings.order, decoding, settings.batch_size)
            answer_rows(listener, rows, range(done, total), asking, job.log, job.skipped)
        skipped = job.skipped
        print(f"{settings.out}: {total - skipped.count} of {total} rows answered", end="")
        print(f"; {skipped.count} skipped, see {skipped.path}" if skipped.count else "")


def answer_rows(
    listener: Listener,
    rows: Sequence[Utterance],
    wanted: range,
    asking: Asking,
    log: RowLog,
    skipped: SkippedLog,
) -> None:
    """Write the rows `wanted`, each with its response, to `log`, in their order."""
    size = asking.chunk
    with tqdm(total=wanted.stop, initial=wanted.start, desc="answering", unit="row", disable=None) as bar:
        for begin in range(wanted.start - wanted.start % size, wanted.stop, size):
            chunk = [rows[i] for i in range(begin, min(begin + size, wanted.stop))]
            seeded = replace(asking.decoding, seed=asking.decoding.seed + begin)
            responses = answer_chunk(listener, chunk, replace(asking, decoding=seeded), skipped)
            for place, (row, response) in enumerate(zip(chunk, responses, strict=True), start=begin):
                if place >= wanted.start:
                    if response is not None:
                        log.append(written_row(row, log.path) | {"response": response})
                    bar.update()


def answer_chunk(
    listener: Listener, rows: Sequence[Utterance], asking: Asking, skipped: SkippedLog
) -> list[str | None]:
    """The response to each row; None where its clip cannot be heard, which `skipped` notes."""
    questions = [_question(row, asking, skipped) for row in rows]
    # A row that is left out keeps its place, and with it its neighbours' seeds.
    asked = [question or Question(text="") for question in questions]
    answers = listener.generate(asked, decoding=asking.decoding, batch_size=asking.batch_size)
    return [answer if question else None for question, answer in zip(questions, answers, strict=True)]


def _question(row: Utterance, asking: Asking, skipped: SkippedLog) -> Question | None:
    """What a row asks; text where it has no audio."""
    instruction = asking.instruction if row.instruction is None else row.instruction
    if not row.audio:
        if row.text.strip() or instruction.strip():
            return Question(text=row.text, instruction=instruction, order=asking.order)
        skipped.add(row.id, "", "neither audio nor text nor an instruction: nothing is asked")
        return None
    try:
        clip = load_audio(row.audio, start=row.start or 0.0, duration=row.duration)
    except AudioError as error:
        skipped.add(row.id, row.audio, str(error))
        return None
    return Question(audio=clip, instruction=instruction, order=asking.order)


def written_row(row: Utterance, out: Path) -> dict[str, Any]:
    """The row as a file at `out` holds it: audio under that file's folder is named relative to it."""
    values = row.to_json()
    folder = os.path.abspath(out.parent) + os.sep
    if row.audio.startswith(folder):
        values["audio"] = row.audio[len(folder) :]
    return values
