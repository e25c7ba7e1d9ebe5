"""Others on the same questions, over HTTP: a peer that takes speech as one more column, a judge of open answers.

In:  rows and an OpenAI-compatible URL. Out: a peer's answers; a judge's marks from 1 to 10.
Try: `blsp evaluate --suite tiny --task sqa --peer ultravox@http://localhost:8000/v1 --out results/x`
Flow: evaluation/ — beside routes.py (peers answer what the routes answer) and after it (the judge reads answers).

Requests go through step 1's engine: many in flight, patient with 429 and server errors. A peer gets the
instruction as text and the clip as `input_audio`; it chooses among options by writing one, since no endpoint
tells the likelihood of given answers.
"""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import soundfile

from blsp.continuation.engines import Prompt
from blsp.data.audio import SAMPLE_RATE
from blsp.data.manifest import Utterance
from blsp.evaluation.answers import Answer, AnswerLog, Answers
from blsp.evaluation.recogniser import load_clip
from blsp.evaluation.tasks import Task
from blsp.llm.decoding import Decoding

KEY_VARIABLE = "OPENAI_API_KEY"
ROWS_AT_A_TIME = 32
OURS = ("text", "cascade", "speech", "transcript", "recogniser", "readout")  # columns that are taken
JUDGE = """\
Rate how well an assistant answered a spoken question, from 1 (useless) to 10 (excellent): is the answer \
relevant to the question, correct and helpful? Write the number alone.

Question: {question}

Answer: {answer}

Rating:"""


class PeerError(ValueError):
    """A peer or judge that cannot be meant; the message shows how to write one."""


@dataclass(frozen=True)
class Endpoint:
    """MODEL@URL. `name` is the column's title."""

    model: str
    url: str

    @property
    def name(self) -> str:
        return self.model.rpartition("/")[2] or urlsplit(self.url).netloc


def parse_endpoint(text: str) -> Endpoint:
    """`ultravox@http://localhost:8000/v1`, or the URL alone where the server has one model."""
    model, _, url = text.rpartition("@")
    if urlsplit(url).scheme not in ("http", "https"):
        raise PeerError(f"{text!r}: write MODEL@URL, as in ultravox@http://localhost:8000/v1")
    return Endpoint(model, url)


def parse_peers(texts: Sequence[str]) -> tuple[Endpoint, ...]:
    """The peers of an evaluation; each needs a column of its own."""
    peers = tuple(map(parse_endpoint, texts))
    names = [*OURS, *(peer.name for peer in peers)]
    for peer in peers:
        if names.count(peer.name) > 1:
            raise PeerError(
                f"{peer.model}@{peer.url}: its column would be called {peer.name!r}, and there is one already; "
                "evaluate it on its own, or have its server call the model differently"
            )
    return peers


def ask_peer(
    endpoint: Endpoint,
    task: Task,
    rows: Sequence[Utterance],
    log: AnswerLog,
    done: Callable[[int], Any] = lambda count: None,
) -> Answers:
    """The peer's answers to the task, as far as they are not in the log."""
    by_number = dict(enumerate(rows))
    engine = _engine(endpoint, task.max_new_tokens, lambda prompt: _spoken(by_number[prompt.key], prompt))
    waiting = [number for number, row in by_number.items() if row.id not in log.known]
    done(len(rows) - len(waiting))
    for start in range(0, len(waiting), ROWS_AT_A_TIME):
        numbers = waiting[start : start + ROWS_AT_A_TIME]
        prompts = [Prompt(n, by_number[n].instruction or "", task.order, by_number[n].text) for n in numbers]
        for written in engine.write([[prompt] for prompt in prompts]):
            for each in written:
                log.write({by_number[each.key].id: Answer(each.text.strip(), each.finish)})
        done(len(numbers))
    return {row.id: log.known[row.id] for row in rows}


def rate(endpoint: Endpoint, rows: Sequence[Utterance], answers: Answers, log: AnswerLog) -> dict[str, float]:
    """The judge's mark for each answer (nan where it wrote no number from 1 to 10)."""
    by_number = dict(enumerate(rows))
    engine = _engine(endpoint, 8, lambda prompt: prompt.text)
    texts = {
        number: JUDGE.format(question=row.text, answer=answers[row.id].text)
        for number, row in by_number.items()
    }
    waiting = [number for number, row in by_number.items() if row.id not in log.known]
    prompts = [[Prompt(number, "", "instruction-first", texts[number])] for number in waiting]
    for written in engine.write(prompts):
        for each in written:
            log.write({by_number[each.key].id: Answer(each.text.strip(), each.finish)})
    return {row.id: read_mark(log.known[row.id].text) for row in rows}


def read_mark(text: str) -> float:
    """The first number from 1 to 10 in the judge's reply."""
    found = re.search(r"\b(10|[1-9])\b", text)
    return float(found[0]) if found else float("nan")


def _engine(endpoint: Endpoint, max_new_tokens: int, content: Callable[[Prompt], Any]) -> Any:
    try:
        from blsp.continuation.openai_engine import OpenAIEngine
    except ImportError as error:
        raise ImportError("--peer and --judge need httpx: pip install httpx") from error
    return OpenAIEngine(
        endpoint.url,
        endpoint.model,
        Decoding(max_new_tokens=max_new_tokens),
        api_key=os.environ.get(KEY_VARIABLE, ""),
        content=content,
        body={} if endpoint.model else {"model": None},
    )


def _spoken(row: Utterance, prompt: Prompt) -> list[dict[str, Any]]:
    """The user's turn: instruction and clip, in the task's order."""
    clip: dict[str, Any] = {
        "type": "input_audio",
        "input_audio": {"data": _as_wav(load_clip(row)), "format": "wav"},
    }
    words = {"type": "text", "text": prompt.instruction}
    parts = [clip, words] if prompt.order == "speech-first" else [words, clip]
    return [part for part in parts if part is clip or prompt.instruction]


def _as_wav(clip: np.ndarray) -> str:
    """Base64 of a 16-bit WAV file."""
    buffer = io.BytesIO()
    soundfile.write(buffer, clip, SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return base64.b64encode(buffer.getvalue()).decode()
