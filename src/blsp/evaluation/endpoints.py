"""Other models behind an OpenAI-compatible URL: peers that take speech, and a judge of open answers.

In:  rows and a URL. Out: a peer's answers, in a further column; a judge's marks from 1 to 10.
Try: `blsp evaluate --suite tiny --task sqa --peer ultravox@http://localhost:8000/v1 --out results/x`
Flow: evaluation/ — beside routes.py (peers answer the same questions) and after it (the judge reads the answers).

A peer gets the instruction as text and the clip as `input_audio`. It chooses among options by writing one, since
endpoints do not give the likelihood of an answer.
"""

import base64
import io
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import soundfile

from blsp.continuation.engines import Prompt
from blsp.continuation.openai_engine import OpenAIEngine
from blsp.data.audio import SAMPLE_RATE
from blsp.data.clips import load_clip
from blsp.data.manifest import Utterance
from blsp.evaluation.answers import Answer, AnswerLog, Answers
from blsp.evaluation.tasks import Task
from blsp.llm.decoding import Decoding
from blsp.llm.servers import ServerError

KEY_VARIABLE = "OPENAI_API_KEY"
MARKS = (1.0, 10.0)  # the judge's least and best
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
    """`ultravox@http://localhost:8000/v1`, or only the URL if the server has one model."""
    model, _, url = text.rpartition("@")
    if urlsplit(url).scheme not in ("http", "https"):
        raise PeerError(f"{text!r}: write MODEL@URL, as in ultravox@http://localhost:8000/v1")
    return Endpoint(model, url)


def parse_peers(texts: Sequence[str]) -> tuple[Endpoint, ...]:
    """The peers of an evaluation; each needs its own column."""
    peers = tuple(map(parse_endpoint, texts))
    names = [*OWN_COLUMNS, *(peer.name for peer in peers)]
    for peer in peers:
        if names.count(peer.name) > 1:
            raise PeerError(
                f"{peer.model}@{peer.url}: its column would have the name {peer.name!r}, which another column has; "
                "evaluate it alone, or give the model another name on its server"
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
    engine = _engine(endpoint, task.max_new_tokens, lambda prompt: _speech_turn(rows[prompt.key], prompt))
    prompts = [Prompt(n, row.instruction or "", task.order, row.text) for n, row in enumerate(rows)]
    _ask_missing(engine, prompts, rows, log, progress)
    return {row.id: log.records[row.id] for row in rows}


def rate(endpoint: Endpoint, rows: Sequence[Utterance], answers: Answers, log: AnswerLog) -> dict[str, float]:
    """The judge's mark for each answer (nan if it wrote no number from 1 to 10)."""
    texts = [JUDGE.format(question=row.text, answer=answers[row.id].text) for row in rows]
    prompts = [Prompt(n, "", "instruction-first", text) for n, text in enumerate(texts)]
    _ask_missing(_engine(endpoint, 8, lambda prompt: prompt.text), prompts, rows, log)
    return {row.id: read_mark(log.records[row.id].text) for row in rows}


def _ask_missing(
    engine: OpenAIEngine,
    prompts: Sequence[Prompt],
    rows: Sequence[Utterance],
    log: AnswerLog,
    progress: Callable[[int], Any] = lambda count: None,
) -> None:
    """Write the missing replies to the log. A prompt's key is the number of its row.

    Raises ServerError for the first prompt without a reply, since a gap would count as a wrong answer.
    """
    waiting = [[prompt] for prompt in prompts if rows[prompt.key].id not in log.records]
    progress(len(rows) - len(waiting))
    for written in engine.write(waiting):
        if refused := [reply.refused for reply in written if not reply.finish]:
            raise ServerError(f"{engine.model}@{engine.urls[0]}: {refused[0]}")
        log.write({rows[reply.key].id: Answer(reply.text.strip(), reply.finish) for reply in written})
        progress(len(written))


def read_mark(text: str) -> float:
    """The first number from 1 to 10 in the judge's reply; nan if there is none."""
    number = re.search(r"\b(10|[1-9])\b", text)
    return float(number[0]) if number else float("nan")


def _engine(endpoint: Endpoint, max_new_tokens: int, content: Callable[[Prompt], Any]) -> OpenAIEngine:
    return OpenAIEngine(
        (endpoint.url,),
        endpoint.model,
        Decoding(max_new_tokens=max_new_tokens),
        api_key=os.environ.get(KEY_VARIABLE, ""),
        content=content,
        body={} if endpoint.model else {"model": None},
    )


def _speech_turn(row: Utterance, prompt: Prompt) -> list[dict[str, Any]]:
    """The user's turn: instruction and clip, in the task's order."""
    wav = io.BytesIO()
    soundfile.write(wav, load_clip(row), SAMPLE_RATE, format="WAV", subtype="PCM_16")
    audio = {"data": base64.b64encode(wav.getvalue()).decode(), "format": "wav"}
    clip: dict[str, Any] = {"type": "input_audio", "input_audio": audio}
    words = {"type": "text", "text": prompt.instruction}
    parts = [clip, words] if prompt.order == "speech-first" else [words, clip]
    return [part for part in parts if part is clip or prompt.instruction]
