"""Other models behind an OpenAI-compatible URL: peers that take speech, and a judge of open answers.

In:  rows and a URL. Out: a peer's answers, as one more column; a judge's marks from 1 to 10.
Try: `blsp evaluate --suite tiny --task sqa --peer ultravox@http://localhost:8000/v1 --out results/x`
Flow: evaluation/ — beside routes.py (peers answer the same questions) and after it (the judge reads the answers).

Requests go through the engine of step 1, which keeps many in flight and repeats those that a full or broken server
refused. A peer gets the instruction as text and the clip as `input_audio`. It chooses among options by writing one,
since no endpoint tells how likely a given answer is.
"""

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
from blsp.continuation.openai_engine import OpenAIEngine
from blsp.data.audio import SAMPLE_RATE
from blsp.data.manifest import Utterance
from blsp.evaluation.answers import Answer, AnswerLog, Answers
from blsp.evaluation.recogniser import load_clip
from blsp.evaluation.tasks import Task
from blsp.llm.decoding import Decoding

KEY_VARIABLE = "OPENAI_API_KEY"
ROWS_AT_A_TIME = 32
OWN_COLUMNS = ("text", "cascade", "speech", "transcript", "recogniser", "readout")
JUDGE = """\
Rate how well an assistant answered a spoken question, from 1 (useless) to 10 (excellent): is the answer \
relevant to the question, correct and helpful? Write the number alone.

Question: {question}

Answer: {answer}

Rating:"""


class PeerError(ValueError):
    """An invalid name of a peer or judge; the message shows a valid one."""


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
    names = [*OWN_COLUMNS, *(peer.name for peer in peers)]
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
    progress: Callable[[int], Any] = lambda count: None,
) -> Answers:
    """The peer's answers to the task; those in the log are not asked for again."""
    by_number = dict(enumerate(rows))
    engine = _engine(endpoint, task.max_new_tokens, lambda prompt: _speech_turn(by_number[prompt.key], prompt))
    waiting = [number for number, row in by_number.items() if row.id not in log.records]
    progress(len(rows) - len(waiting))
    for start in range(0, len(waiting), ROWS_AT_A_TIME):
        numbers = waiting[start : start + ROWS_AT_A_TIME]
        prompts = [Prompt(n, by_number[n].instruction or "", task.order, by_number[n].text) for n in numbers]
        for written in engine.write([[prompt] for prompt in prompts]):
            for reply in written:
                log.write({by_number[reply.key].id: Answer(reply.text.strip(), reply.finish)})
        progress(len(numbers))
    return {row.id: log.records[row.id] for row in rows}


def rate(endpoint: Endpoint, rows: Sequence[Utterance], answers: Answers, log: AnswerLog) -> dict[str, float]:
    """The judge's mark for each answer (nan where it wrote no number from 1 to 10)."""
    by_number = dict(enumerate(rows))
    engine = _engine(endpoint, 8, lambda prompt: prompt.text)
    texts = {number: JUDGE.format(question=row.text, answer=answers[row.id].text) for number, row in by_number.items()}
    waiting = [number for number, row in by_number.items() if row.id not in log.records]
    prompts = [[Prompt(number, "", "instruction-first", texts[number])] for number in waiting]
    for written in engine.write(prompts):
        for reply in written:
            log.write({by_number[reply.key].id: Answer(reply.text.strip(), reply.finish)})
    return {row.id: read_mark(log.records[row.id].text) for row in rows}


def read_mark(text: str) -> float:
    """The first number from 1 to 10 in the judge's reply; nan where there is none."""
    number = re.search(r"\b(10|[1-9])\b", text)
    return float(number[0]) if number else float("nan")


def _engine(endpoint: Endpoint, max_new_tokens: int, content: Callable[[Prompt], Any]) -> OpenAIEngine:
    return OpenAIEngine(
        endpoint.url,
        endpoint.model,
        Decoding(max_new_tokens=max_new_tokens),
        api_key=os.environ.get(KEY_VARIABLE, ""),
        content=content,
        body={} if endpoint.model else {"model": None},
    )


def _speech_turn(row: Utterance, prompt: Prompt) -> list[dict[str, Any]]:
    """The user's turn: instruction and clip, in the task's order."""
    clip: dict[str, Any] = {"type": "input_audio", "input_audio": {"data": _as_wav(load_clip(row)), "format": "wav"}}
    words = {"type": "text", "text": prompt.instruction}
    parts = [clip, words] if prompt.order == "speech-first" else [words, clip]
    return [part for part in parts if part is clip or prompt.instruction]


def _as_wav(clip: np.ndarray) -> str:
    """Base64 of a 16-bit WAV file."""
    buffer = io.BytesIO()
    soundfile.write(buffer, clip, SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return base64.b64encode(buffer.getvalue()).decode()
