"""Inputs of the speech route for tests of the judge: perfect ones, and those of another clip; a fixed recogniser.

In:  a loaded model. Out: what `Evaluation(speech=...)` takes instead of the model's own speech vectors.
Try: `Evaluation(listener, folder, speech=shuffled(transcripts_as_speech(listener)))`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from blsp.data.manifest import Utterance
from blsp.evaluation.answers import AnswerLog
from blsp.evaluation.routes import RouteInput, RouteInputFn
from blsp.inference.listener import Listener
from blsp.llm.language_model import embed
from blsp.llm.prompt import transcript_ids
from blsp.model.adapter_parts import AudioEmbeds

TEXTS = (
    "hello world",
    "how many days are in a week",
    "what is the capital of france",
    "please repeat the following words",
    "the capital of france",
    "repeat the words hello world please",
    "how many words are in the following",
)


def transcripts_as_speech(listener: Listener) -> RouteInputFn:
    """A perfect adapter: the speech vectors are the transcript's own embeddings."""

    def speech(rows: Sequence[Utterance]) -> list[RouteInput]:
        return [_as_audio_embeds(listener, row.text) for row in rows]

    return speech


def shuffled(speech: RouteInputFn) -> RouteInputFn:
    """Each row gets the input of another text."""

    def other_speech(rows: Sequence[Utterance]) -> list[RouteInput]:
        others = [replace(row, text=TEXTS[(TEXTS.index(row.text) + 3) % len(TEXTS)]) for row in rows]
        return speech(others)

    return other_speech


class Parrot:
    """A recogniser that writes the transcript, but "misheard" for the first row and nothing for the second."""

    name, compute, mark, multilingual = "parrot", "int8", "parrot", False

    def supports_language(self, language: str) -> bool:
        return language == "en"

    def transcribe(self, rows: Sequence[Utterance], log: AnswerLog) -> list[str]:
        return [{"en/0": "misheard", "en/1": ""}.get(row.id, row.text) for row in rows]


class Exact(Parrot):
    """A recogniser that writes the transcript."""

    name = "exact"

    def transcribe(self, rows: Sequence[Utterance], log: AnswerLog) -> list[str]:
        return [row.text for row in rows]


def _as_audio_embeds(listener: Listener, text: str) -> AudioEmbeds:
    vectors = embed(listener.model, transcript_ids(listener.tokenizer, text)).detach()
    return AudioEmbeds(vectors, num_audio_tokens=len(vectors), speech=True)
