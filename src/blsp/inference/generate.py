"""`blsp generate`: an answer to every row of a manifest, spoken or written.

In:  a manifest; a model; an instruction for rows that have none of their own.
Out: the rows, in their order, plus `response`; clips that cannot be read in `<out>.skipped.jsonl`.
Try: `blsp generate --manifest questions.jsonl --out answers.jsonl`
Flow: inference/ — manifest → **Listener.generate, a chunk of rows at a time** → rows with answers.

A chunk is a fixed range of the manifest, decoded sorted by length and written in order. A killed job computes the chunk
in which it stopped once more, with the same rows side by side, and writes what was missing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

from tqdm import tqdm

from blsp.data.audio import AudioError, load_audio
from blsp.data.jobs import Job, SkippedLog
from blsp.data.manifest import Manifest, Utterance, name_relative
from blsp.inference.listener import Listener, Question, decoding_of, load, load_options
from blsp.llm.decoding import Decoding
from blsp.llm.prompt import Order
from blsp.model.loading import warn_of_languages
from blsp.settings import GenerateSettings
from blsp.weights.shipped import model_digest

BATCHES_PER_CHUNK = 4  # more of them: lengths fit together better, and more clips are in memory


@dataclass(frozen=True)
class GenerateOptions:
    """How rows are answered. instruction: of rows that have none. decoding: with the seed of the first row."""

    instruction: str
    order: Order
    decoding: Decoding
    batch_size: int

    @property
    def chunk(self) -> int:
        """Number of rows that are sorted together."""
        return self.batch_size * BATCHES_PER_CHUNK


def generate(settings: GenerateSettings) -> None:
    """Answer the rows of `settings.manifest` that `settings.out` does not hold yet."""
    rows = Manifest(settings.manifest)
    total = len(rows) if settings.limit is None else min(settings.limit, len(rows))
    names = ("model", "instruction", "order", "max_new_tokens", "temperature", "top_p", "seed", "weights")
    header = {name: getattr(settings, name) for name in names}
    header["rescore"] = None if settings.rescore == "auto" else settings.rescore  # as in headers of before the flag
    with Job(settings.out) as job:
        job.begin(header | {"model_sha256": model_digest(settings.model)})
        inputs = (name_relative(row.to_json(), settings.out.parent) for row in islice(rows, total))
        done = job.count_done(inputs, "id", "response")
        if done < total:
            listener = load(settings.model, **load_options(settings))
            config = listener.model.config
            warn_of_languages(config.audio_config, config.audio_model_id, rows)
            decoding = decoding_of(settings, listener)
            options = GenerateOptions(settings.instruction or "", settings.order, decoding, settings.batch_size)
            answer_rows(listener, rows, range(done, total), options, job)
        job.report(total - job.skipped.count, total, "rows answered")


def answer_rows(
    listener: Listener, rows: Sequence[Utterance], numbers: range, options: GenerateOptions, job: Job
) -> None:
    """Write the rows with these numbers, each with its response, to the job's log, in their order."""
    size, end = options.chunk, numbers.stop
    with tqdm(total=end, initial=numbers.start, desc="answering", unit="row", disable=None) as bar:
        for begin in range(numbers.start - numbers.start % size, end, size):
            chunk = [rows[i] for i in range(begin, min(begin + size, end))]
            seeded = replace(options.decoding, seed=options.decoding.seed + begin)
            responses = answer_chunk(listener, chunk, replace(options, decoding=seeded), job.skipped)
            pairs = list(zip(chunk, responses, strict=True))
            for row, response in pairs[max(numbers.start - begin, 0) :]:
                if response is not None:
                    job.log.append(name_relative(row.to_json(), job.out.parent) | {"response": response})
                bar.update()


def answer_chunk(
    listener: Listener, rows: Sequence[Utterance], options: GenerateOptions, skipped: SkippedLog
) -> list[str | None]:
    """The response to each row; None where its clip cannot be read, which `skipped` notes."""
    questions = [_question(row, options, skipped) for row in rows]
    if not any(questions):
        return [None] * len(rows)
    # An empty question stands in for a row that is left out, so that the others keep their seeds.
    filled = [question or Question(text="") for question in questions]
    answers = listener.generate(filled, decoding=options.decoding, batch_size=options.batch_size)
    return [answer if question else None for question, answer in zip(questions, answers, strict=True)]


def _question(row: Utterance, options: GenerateOptions, skipped: SkippedLog) -> Question | None:
    """The question of a row, as text where it has no audio; None where the row is left out."""
    instruction = options.instruction if row.instruction is None else row.instruction
    if not row.audio:
        if row.text.strip() or instruction.strip():
            return Question(text=row.text, instruction=instruction, order=options.order)
        skipped.add(row.id, "", "neither audio nor text nor an instruction: nothing is asked")
        return None
    try:
        clip = load_audio(row.audio, start=row.start or 0.0, duration=row.duration)
    except AudioError as error:
        skipped.add(row.id, row.audio, str(error))
        return None
    return Question(audio=clip, instruction=instruction, order=options.order)
