"""`blsp generate`: an answer to every row of a manifest, spoken or written.

In:  a manifest; a model; an instruction for rows without one.
Out: the rows, in order, with `response`; clips that cannot be read in `<out>.skipped.jsonl`.
Try: `blsp generate --manifest questions.jsonl --out answers.jsonl`
Flow: inference/ — manifest → **Listener.generate, a chunk of rows at a time** → rows with answers.

A chunk is a fixed range of the manifest. Its rows are decoded sorted by length and written in order. Processes of one
launch share the chunks, and the output is the same as with one process. After a kill, the chunk in which the job
stopped is computed again with the same rows, and only the missing ones are written.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

from tqdm import tqdm

from blsp.data.audio import AudioError
from blsp.data.clips import load_clip
from blsp.data.jobs import Job
from blsp.data.manifest import Manifest, Utterance, name_relative
from blsp.distributed import find_runtime, from_first, leave, shared
from blsp.inference.listener import Listener, Question, decoding_of, load, load_options
from blsp.llm.decoding import Decoding
from blsp.llm.prompt import Order
from blsp.model.loading import warn_of_languages
from blsp.settings import GenerateSettings
from blsp.weights.shipped import model_digest

BATCHES_PER_CHUNK = 4  # with more, the lengths in a batch are more similar, but more clips are in memory


@dataclass(frozen=True)
class GenerateOptions:
    """How rows are answered. instruction: for rows without one. decoding: with the seed of the first row."""

    instruction: str
    order: Order
    decoding: Decoding
    batch_size: int

    @property
    def chunk(self) -> int:
        """Number of rows that are sorted together."""
        return self.batch_size * BATCHES_PER_CHUNK


@dataclass(frozen=True)
class Unreadable:
    """Why a row has no answer."""

    reason: str


Answer = str | Unreadable


def generate(settings: GenerateSettings) -> None:
    """Answer the rows of `settings.manifest` that are not in `settings.out` yet."""
    rows = Manifest(settings.manifest)
    total = len(rows) if settings.limit is None else min(settings.limit, len(rows))
    names = ("model", "instruction", "order", "max_new_tokens", "temperature", "top_p", "seed", "weights")
    header = {name: getattr(settings, name) for name in names}
    header["rescore"] = None if settings.rescore == "auto" else settings.rescore  # older headers have None
    runtime = find_runtime(settings.device, settings.dtype, minutes=settings.collective_minutes)
    with Job(settings.out, runtime.rank) as job:
        inputs = (name_relative(row.to_json(), settings.out.parent) for row in islice(rows, total))

        def begin() -> int:
            job.begin(header | {"model_sha256": model_digest(settings.model)})
            return job.count_done(inputs, "id", "response")

        done = from_first(begin)
        if done < total:
            listener = load(settings.model, **load_options(settings))
            config = listener.model.config
            warn_of_languages(config.audio_config, config.audio_model_id, rows)
            decoding = decoding_of(settings, listener)
            options = GenerateOptions(settings.instruction or "", settings.order, decoding, settings.batch_size)
            answer_rows(listener, rows, range(done, total), options, job)
        leave(runtime)
        if runtime.rank == 0:
            job.report(total - job.skipped.count, total, "rows answered")


def answer_rows(
    listener: Listener, rows: Sequence[Utterance], numbers: range, options: GenerateOptions, job: Job
) -> None:
    """Write the rows with these numbers, each with its response, to the job's log, in order.

    Ranks share the chunks; the first rank writes.
    """
    size, end = options.chunk, numbers.stop
    first = numbers.start - numbers.start % size
    chunks = [range(begin, min(begin + size, end)) for begin in range(first, end, size)]

    def answers(chunk: range) -> list[Answer]:
        seeded = replace(options.decoding, seed=options.decoding.seed + chunk.start)
        return answer_chunk(listener, [rows[i] for i in chunk], replace(options, decoding=seeded))

    hidden = None if job.rank == 0 else True  # None: tqdm shows the bar only on a terminal
    with tqdm(total=end, initial=numbers.start, desc="answering", unit="row", disable=hidden) as bar:
        for chunk, responses in zip(chunks, shared(chunks, answers), strict=True):
            for number, response in zip(chunk, responses, strict=True):
                if job.rank == 0:
                    _write(job, rows[number], response, is_new=number >= numbers.start)
                bar.update(number >= numbers.start)


def _write(job: Job, row: Utterance, answer: Answer, *, is_new: bool) -> None:
    if isinstance(answer, Unreadable):
        job.skipped.add(row.id, row.audio, answer.reason)
    elif is_new:
        job.log.append(name_relative(row.to_json(), job.out.parent) | {"response": answer})


def answer_chunk(listener: Listener, rows: Sequence[Utterance], options: GenerateOptions) -> list[Answer]:
    """The response to each row, or why there is none."""
    questions = [_question(row, options) for row in rows]
    if not any(isinstance(question, Question) for question in questions):
        return [question for question in questions if isinstance(question, Unreadable)]
    # An empty question replaces a row that is left out, so that the other rows keep their seeds.
    filled = [question if isinstance(question, Question) else Question(text="") for question in questions]
    answers = listener.generate(filled, decoding=options.decoding, batch_size=options.batch_size)
    pairs = zip(questions, answers, strict=True)
    return [question if isinstance(question, Unreadable) else answer for question, answer in pairs]


def _question(row: Utterance, options: GenerateOptions) -> Question | Unreadable:
    """The question of a row, as text if it has no audio; or why the row is left out."""
    instruction = options.instruction if row.instruction is None else row.instruction
    if not row.audio:
        if row.text.strip() or instruction.strip():
            return Question(text=row.text, instruction=instruction, order=options.order)
        return Unreadable("no audio, no text and no instruction")
    try:
        clip = load_clip(row)
    except AudioError as error:
        return Unreadable(str(error))
    return Question(audio=clip, instruction=instruction, order=options.order)
