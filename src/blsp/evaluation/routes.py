"""The three routes of a question: as text, through a cascade, as speech.

In:  a loaded model, a task and its rows. Out: one answer for each row, in a log from which a killed run continues.
Try: `ask(listener, task, rows, text_input(transcripts), log, batch_size=32)`
Flow: evaluation/ — tasks.py → **routes** → scoring.py.

The routes have the same prefix ids and suffix ids of the prompt and differ only in the input between them: the
transcript, the recogniser's transcript, or the speech vectors. Batches are planned from all rows before the first one
is run, and a finished batch is skipped as a whole. So a resumed run gives exactly the numbers of an uninterrupted one.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import transformers

import blsp
from blsp.data.addresses import audio_size
from blsp.data.audio import load_audio
from blsp.data.clips import load_clip
from blsp.data.files import digest_of
from blsp.data.manifest import Utterance
from blsp.evaluation.answers import NO_SPEECH, Answer, AnswerLog, Answers, fill
from blsp.evaluation.tasks import Clip, Task, clip_of
from blsp.inference.listener import Listener, Question
from blsp.inference.pauses import pieces_of
from blsp.llm.decoding import Request, Result, answer_text, decode
from blsp.llm.teacher_forcing import option_scores
from blsp.model.adapter_parts import AudioEmbeds
from blsp.model.lora import has_lora, lora_weights
from blsp.model.speech_encoder import knows_english_only

RouteInput = str | AudioEmbeds  # the input in the place of the speech: words, or vectors
RouteInputFn = Callable[[Sequence[Utterance]], list[RouteInput]]
BATCHES_AT_A_TIME = 2  # planned and logged together: when a row ends early, the next one takes its slot
BATCHES_KEPT = 8  # whose vectors are not computed again: 1 GB for 256 clips of 62 vectors of 4,096 in bfloat16
OPTIONS_AT_A_TIME = 128  # answer options scored in one pass


def text_input(transcripts: dict[str, str]) -> RouteInputFn:
    """The input of the text route and of the cascade: words by the row's id."""
    return lambda rows: [transcripts[row.id] for row in rows]


def speech_input(listener: Listener) -> RouteInputFn:
    """The input of the speech route: the adapter's vectors.

    Tasks ask about the same clips, so the vectors of the last batches are kept. Only an equal batch is reused, as
    rounding depends on the clips in a batch.
    """

    @lru_cache(BATCHES_KEPT)
    def vectors(clips: tuple[Clip, ...]) -> list[AudioEmbeds]:
        samples = [load_audio(audio, start=start or 0.0, duration=duration) for audio, start, duration in clips]
        return listener.embed_audio(samples)

    return lambda rows: [*vectors(tuple(map(clip_of, rows)))]


def supports_language(listener: Listener, language: str) -> bool:
    """False for a language that the speech encoder was not trained on (Whisper's English-only models)."""
    return language == "en" or not knows_english_only(listener.model.config.audio_config)


def ask(
    listener: Listener,
    task: Task,
    rows: Sequence[Utterance],
    route_input: RouteInputFn,
    log: AnswerLog,
    batch_size: int,
    progress: Callable[[int], Any] = lambda count: None,
) -> Answers:
    """The answer of each row. progress: called with the number of rows finished since the last call."""

    def answer(batch: Sequence[Utterance]) -> Answers:
        return _answer(listener, task, batch, route_input(batch), batch_size)

    records = fill(log, list(plan_batches(rows, batch_size)), _id, answer, progress)
    return {row.id: records[row.id] for row in rows}


def transcribe_rows(
    listener: Listener, rows: Sequence[Utterance], answers: Answers, log: AnswerLog, batch_size: int
) -> dict[str, str]:
    """The transcript of each row's clip by `blsp transcribe`, by the row's id. answers: of the speech route.

    If the LLM chose the read-out that it answered to, that is the transcript of a clip that is heard as a whole.
    """
    known: dict[str, str] = {}
    if listener.model.config.rescore:
        known = {row.id: answers[row.id].transcript or "" for row in rows if _is_whole(load_clip(row))}
    others = [row for row in rows if row.id not in known]

    def transcripts(batch: Sequence[Utterance]) -> Answers:
        texts = listener.transcribe_all([load_clip(row) for row in batch])
        return {row.id: Answer(text) for row, text in zip(batch, texts, strict=True)}

    records = fill(log, list(plan_batches(others, batch_size)), _id, transcripts)
    return known | {row.id: records[row.id].text for row in others}


def _is_whole(clip: np.ndarray) -> bool:
    """Whether `blsp transcribe` hears a clip (N,) in one piece, with nothing left out before or after it."""
    return [len(piece.audio) for piece in pieces_of(clip)] == [len(clip)]


def _id(row: Utterance) -> str:
    return row.id


def plan_batches(rows: Sequence[Utterance], batch_size: int) -> Iterator[list[Utterance]]:
    """Batches of rows of similar length; they depend only on the questions."""
    ordered = sorted(rows, key=lambda row: (row.instruction or "", len(row.text), row.id))
    for start in range(0, len(ordered), BATCHES_AT_A_TIME * batch_size):
        yield ordered[start : start + BATCHES_AT_A_TIME * batch_size]


def slices(rows: Sequence[Utterance], size: int) -> Iterator[slice]:
    """Slices of at most `size` neighbouring rows with the same instruction: the rows of one pass share their prefix."""
    start = 0
    for end in range(1, len(rows) + 1):
        full = end - start == size
        if end == len(rows) or full or rows[end].instruction != rows[start].instruction:
            yield slice(start, end)
            start = end


@torch.no_grad()
def _answer(
    listener: Listener, task: Task, rows: Sequence[Utterance], inputs: Sequence[RouteInput], batch_size: int
) -> Answers:
    """The answers of one batch: written by the decode loop, and chosen among the options if a row has some."""
    requests = {
        row.id: request(listener, task, row, route_input)
        for row, route_input in zip(rows, inputs, strict=True)
        if not is_empty(route_input)
    }
    generate = task.generate or any(row.options is None for row in rows)
    results = decode(listener.model, list(requests.values()), batch_size) if generate else {}
    scores = _score_options(listener, rows, requests)
    return {
        row.id: _as_answer(listener, route_input, results.get(row.id), scores.get(row.id))
        for row, route_input in zip(rows, inputs, strict=True)
    }


def _score_options(
    listener: Listener, rows: Sequence[Utterance], requests: dict[str, Request]
) -> dict[str, list[float]]:
    """By row id: the mean log-likelihood per token of each option, if the row has options and an input."""
    options = {row.id: row.options for row in rows if row.options is not None and row.id in requests}
    chosen = [requests[name] for name in options]
    scores = option_scores(listener.model, listener.tokenizer, chosen, list(options.values()), OPTIONS_AT_A_TIME)
    return dict(zip(options, scores, strict=True))


def _as_answer(
    listener: Listener, route_input: RouteInput, result: Result | None, scores: Sequence[float] | None
) -> Answer:
    """The `Answer` of one row, from the results of the decode loop and of the scoring of options."""
    transcript = _transcript(listener, route_input)
    sentence = listener.model.config.no_speech_sentence
    if is_empty(route_input):
        return Answer(sentence, NO_SPEECH, transcript=transcript)
    option_scores = None if scores is None else tuple(scores)
    if result is None:
        return Answer("", option_scores=option_scores, transcript=transcript)
    text = answer_text(listener.tokenizer, result.ids).strip()
    # An adapter without a read-out cannot recognise silence; then the LLM writes the fixed sentence.
    silent = isinstance(route_input, AudioEmbeds) and text == sentence
    return Answer(text, NO_SPEECH if silent else result.finish, tuple(result.ids), option_scores, transcript)


def request(listener: Listener, task: Task, row: Utterance, route_input: RouteInput) -> Request:
    """The row's question with words or vectors in the place of the speech."""
    text, audio_embeds = (route_input, None) if isinstance(route_input, str) else (None, route_input)
    question = Question(text=text, instruction=row.instruction or "", order=task.order)
    decoding = replace(listener.decoding, max_new_tokens=task.max_new_tokens)
    return listener.request(row.id, question, audio_embeds, decoding)


def is_empty(route_input: RouteInput) -> bool:
    """True if no speech was found, or the recogniser wrote nothing: the LLM is not asked."""
    return not route_input.strip() if isinstance(route_input, str) else not route_input.speech


def _transcript(listener: Listener, route_input: RouteInput) -> str | None:
    """The route's transcript of the speech; None for adapters without a read-out."""
    if isinstance(route_input, str):
        return route_input
    return None if route_input.token_ids is None else listener.readout([route_input])[0]


# --- digests for the logs -----------------------------------------------------------------------------------
def text_fingerprint(listener: Listener) -> str:
    """The LLM, its prompt and how it is run; not the adapter: a new one needs no new answers of text and cascade."""
    model, config = listener.model, listener.model.config
    lora = f" {_digest(lora_weights(model))}" if has_lora(config, "llm") else ""
    weight = model.lm_head.weight
    asked = digest_of(
        {
            "chat_template": listener.tokenizer.chat_template,
            "no_speech_sentence": config.no_speech_sentence,
            "device": weight.device.type,
            "attention": model.model.language_model.config._attn_implementation,
        }
    )
    return f"{config.text_model_id} {config.text_model_sha256} {weight.dtype}{lora} {asked}"


def speech_fingerprint(listener: Listener) -> str:
    """The LLM, the speech encoder, and a digest of the adapter's tensors and of the use of its read-out."""
    config = listener.model.config
    use = f"{config.audio_model_sha256} {config.full_window} {config.rescore}"
    return f"{text_fingerprint(listener)} {_digest(listener.model.adapter_state(), use)}"


def _digest(state: Mapping[str, torch.Tensor], beginning: str = "") -> str:
    """SHA-256 of a text and of tensors with their names."""
    digest = hashlib.sha256(beginning.encode())
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def route_fingerprint(model: str, task: Task, rows: Sequence[Utterance], route: str, batch_size: int) -> str:
    """A digest of everything that decides a route's answers to a task."""
    return digest_of(
        {
            "model": model,
            "task": repr(replace(task, note="", name="")),
            "rows": [(row.to_json(), audio_size(row.audio)) for row in rows],
            "route": route,
            "batch_size": batch_size,
            "versions": (blsp.__version__, torch.__version__, transformers.__version__),
            "threads": torch.get_num_threads(),
        }
    )
