"""The same question by three routes: as text, through a cascade, as speech.

In:  a loaded model, a task and its rows. Out: answers, one a row, in a log that a killed run goes on with.
Try: `ask(listener, task, rows, read_text(rows), log, batch_size=32)`
Flow: evaluation/ — tasks.py → **routes** → scoring.py.

Every route puts something into the same place between the same ids (`Listener.request`): the transcript, the
recogniser's transcript, or the speech's vectors. What follows is one code path: one decode loop, one scoring
of options. The batch plan is fixed from all rows before the first is asked, and finished plans are skipped
whole, so that a resumed run has the very numbers of an uninterrupted one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import transformers

import blsp
from blsp.data.manifest import Utterance
from blsp.evaluation.answers import NO_SPEECH, Answer, AnswerLog, Answers, fingerprint
from blsp.evaluation.recogniser import file_size, load_clip
from blsp.evaluation.tasks import Task
from blsp.inference.listener import Listener, Question
from blsp.llm.decoding import Request, decode
from blsp.llm.teacher_forcing import option_scores
from blsp.model.adapter_parts import AudioEmbeds

RouteInput = str | AudioEmbeds  # what stands in the speech's place: words, or vectors
RouteInputFn = Callable[[Sequence[Utterance]], list[RouteInput]]
BATCHES_AT_A_TIME = 2  # planned (and kept) together: rows that end make room for others within the plan
OPTIONS_AT_A_TIME = 128  # options scored side by side


def read_text(transcripts: dict[str, str]) -> RouteInputFn:
    """The text route, and the cascade: words by the row's id."""
    return lambda rows: [transcripts[row.id] for row in rows]


def hear_speech(listener: Listener) -> RouteInputFn:
    """The speech route: what the adapter makes of each clip. The clips of the batch before are not heard again."""
    clips: list[tuple[str, float | None, float | None]] = []
    heard: list[RouteInput] = []

    def say(rows: Sequence[Utterance]) -> list[RouteInput]:
        wanted = [(row.audio, row.start, row.duration) for row in rows]
        if (
            wanted != clips
        ):  # whole batches alone are kept: a clip's last digits depend on the others beside it
            heard[:] = listener.embed_audio([load_clip(row) for row in rows])
            clips[:] = wanted
        return list(heard)

    return say


def supports_language(listener: Listener, language: str) -> bool:
    """False for a language that the speech encoder was never taught (Whisper's English-only models)."""
    return language == "en" or listener.model.config.audio_config.vocab_size >= 51865


def ask(
    listener: Listener,
    task: Task,
    rows: Sequence[Utterance],
    say: RouteInputFn,
    log: AnswerLog,
    batch_size: int,
    done: Callable[[int], Any] = lambda count: None,
) -> Answers:
    """Every row's answer; `done` is told of rows as they are finished."""
    for chunk in plan(rows, batch_size):
        if not all(row.id in log.known for row in chunk):
            log.write(_answer(listener, task, chunk, say(chunk), batch_size))
        done(len(chunk))
    return {row.id: log.known[row.id] for row in rows}


def write_down(
    listener: Listener, rows: Sequence[Utterance], log: AnswerLog, batch_size: int
) -> dict[str, str]:
    """What `blsp transcribe` writes of each row's clip, by the row's id."""
    for chunk in plan(rows, batch_size):
        if not all(row.id in log.known for row in chunk):
            texts = listener.transcribe_all([load_clip(row) for row in chunk])
            log.write({row.id: Answer(text) for row, text in zip(chunk, texts, strict=True)})
    return {row.id: log.known[row.id].text for row in rows}


def plan(rows: Sequence[Utterance], batch_size: int) -> Iterator[list[Utterance]]:
    """Rows of like length together: the order, and so the batches, depend on the questions alone."""
    ordered = sorted(rows, key=lambda row: (row.instruction or "", len(row.text), row.id))
    for start in range(0, len(ordered), BATCHES_AT_A_TIME * batch_size):
        yield ordered[start : start + BATCHES_AT_A_TIME * batch_size]


@torch.no_grad()
def _answer(
    listener: Listener, task: Task, rows: Sequence[Utterance], said: Sequence[RouteInput], batch_size: int
) -> Answers:
    answers, requests = {}, []
    for row, words in zip(rows, said, strict=True):
        heard = _heard(listener, words)
        if nothing_said(words):
            answers[row.id] = Answer(listener.model.config.no_speech_sentence, NO_SPEECH, heard=heard)
        else:
            requests.append(request(listener, task, row, words))
            answers[row.id] = Answer("", heard=heard)
    if task.generate or any(row.options is None for row in rows):
        hearing = {row.id for row, words in zip(rows, said, strict=True) if isinstance(words, AudioEmbeds)}
        for key, result in decode(listener.model, requests, batch_size).items():
            name, text = str(key), listener.tokenizer.decode(result.ids, skip_special_tokens=True).strip()
            silent = name in hearing and text == listener.model.config.no_speech_sentence
            finish = (
                NO_SPEECH if silent else result.finish
            )  # adapters without a read-out say so through the LLM
            answers[name] = replace(answers[name], text=text, finish=finish, ids=tuple(result.ids))
    options = {row.id: row.options for row in rows if row.options is not None}
    choosing = [each for each in requests if each.key in options]
    asked = [options[str(each.key)] or () for each in choosing]
    for each, scores in zip(
        choosing,
        option_scores(listener.model, listener.tokenizer, choosing, asked, OPTIONS_AT_A_TIME),
        strict=True,
    ):
        answers[str(each.key)] = replace(answers[str(each.key)], option_scores=tuple(scores))
    return answers


def request(listener: Listener, task: Task, row: Utterance, said: RouteInput) -> Request:
    """The row's question with words or vectors in the speech's place."""
    words, heard = (said, None) if isinstance(said, str) else (None, said)
    question = Question(text=words, instruction=row.instruction or "", order=task.order)
    decoding = replace(listener.decoding, max_new_tokens=task.max_new_tokens)
    return listener.request(row.id, question, heard, decoding)


def nothing_said(said: RouteInput) -> bool:
    """No speech was heard, or the recogniser wrote nothing: there is nothing to ask the LLM about."""
    return not said.strip() if isinstance(said, str) else not said.speech


def _heard(listener: Listener, said: RouteInput) -> str | None:
    """What the route understood, where it can be written down; None for adapters that read nothing out."""
    if isinstance(said, str):
        return said
    return None if said.token_ids is None else listener.readout([said])[0]


# --- what decides an answer ---------------------------------------------------------------------------------


def reader_fingerprint(listener: Listener) -> str:
    """The LLM alone: text route and cascade do not change with the adapter, and are not asked again."""
    config = listener.model.config
    return f"{config.text_model_id} {config.text_model_sha256} {listener.model.lm_head.weight.dtype}"


def listener_fingerprint(listener: Listener) -> str:
    """Everything that hears: a digest of the adapter's tensors beside the frozen parts it names."""
    digest = hashlib.sha256(
        f"{listener.model.config.audio_model_sha256} {listener.model.config.full_window}".encode()
    )
    for name, tensor in sorted(listener.model.adapter_state().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return f"{reader_fingerprint(listener)} {digest.hexdigest()}"


def route_fingerprint(model: str, task: Task, rows: Sequence[Utterance], route: str, batch_size: int) -> str:
    """A digest of everything that decides a route's answers to a task."""
    return fingerprint(
        model=model,
        task=repr(replace(task, note="", name="")),
        rows=[(row.to_json(), file_size(row.audio)) for row in rows],
        route=route,
        batch_size=batch_size,
        versions=(blsp.__version__, torch.__version__, transformers.__version__),
        threads=torch.get_num_threads(),
    )
