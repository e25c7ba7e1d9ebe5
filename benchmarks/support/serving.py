"""Server process and measuring clients, for the benchmarks of the server.

In:  flags of `blsp serve`; questions. Out: the address and process of a running server; each answer, with times.
Try: ``with serving(["--model", "models/blsp-tiny"]) as server: …``
Flow: **serving.py** → serve_load.py, serve_robustness.py; tests/serving runs both with few requests
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import soundfile

from blsp.data.audio import SAMPLE_RATE, load_audio

SPEECH = Path(__file__).parents[2] / "examples" / "speech"


@dataclass(frozen=True)
class Server:
    url: str
    process: int
    log: Path

    def memory_mb(self) -> float:
        """Resident memory of the server (Linux)."""
        status = Path(f"/proc/{self.process}/status").read_text(encoding="ascii")
        return int(status.split("VmRSS:")[1].split()[0]) / 1024


@contextmanager
def serving(flags: Sequence[str], keys: Sequence[str] = ()) -> Iterator[Server]:
    """`blsp serve` on a free port until the block ends; then it must exit with 0.

    It knows the hosts of odd_hosts.py.
    """
    command = [sys.executable, "-m", "benchmarks.support.odd_hosts", "serve", "--port", "0", *flags]
    environment = os.environ | {"BLSP_API_KEY": " ".join(keys)}
    with (
        tempfile.NamedTemporaryFile(suffix=".log") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment) as process,
    ):
        assert process.stdout is not None
        line = next((line for line in process.stdout if line.startswith("listening on ")), None)
        if line is None:
            raise RuntimeError(f"{' '.join(command)}: ended with {process.wait()} before it listened")
        server = Server(line.split()[-1], process.pid, Path(log.name))
        try:
            while httpx.get(f"{server.url}/health").status_code != 200:
                time.sleep(0.1)
            yield server
        finally:
            process.terminate()
        if process.wait() != 0:
            raise RuntimeError(f"the server ended with {process.returncode} after SIGTERM")


def recordings(count: int) -> list[bytes]:
    """Real recordings that no adapter was trained on, as WAV files, in the order of their lists (70 at most)."""
    lists = [(SPEECH / name).read_text(encoding="utf-8") for name in ("asterisk.jsonl", "heldout.jsonl")]
    lines = "".join(lists).splitlines()[:count]
    return [as_wav(load_audio(SPEECH / json.loads(line)["audio"])) for line in lines]


def as_wav(samples: Any) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return file.getvalue()


def spoken_question(wav: bytes, text: str) -> list[dict[str, Any]]:
    """The messages of a chat request: an instruction, then speech."""
    audio = {"type": "input_audio", "input_audio": {"data": base64.b64encode(wav).decode(), "format": "wav"}}
    return [{"role": "user", "content": [{"type": "text", "text": f"{text}\n"}, audio]}]


@dataclass(frozen=True)
class Served:
    """The answer to one request: `status` (0: the connection broke), the text, seconds, tokens."""

    question: int
    status: int
    text: str = ""
    first: float = 0.0
    total: float = 0.0
    tokens: int = 0
    retry_after: bool = False


async def ask(client: httpx.AsyncClient, number: int, messages: Any, new_tokens: int) -> Served:
    """One streamed answer."""
    body = {"messages": messages, "stream": True, "max_completion_tokens": new_tokens}
    body["stream_options"] = {"include_usage": True}
    began, first, text, tokens = time.monotonic(), 0.0, "", 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            return Served(number, response.status_code, retry_after="retry-after" in response.headers)
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
            for choice in chunk["choices"]:
                piece = choice["delta"].get("content") or ""
                first = first or (time.monotonic() - began if piece else 0.0)
                text += piece
    return Served(number, 200, text, first, time.monotonic() - began, tokens)


async def crowd(
    url: str, questions: Sequence[Any], clients: int, requests: int, new_tokens: int | Sequence[int]
) -> list[Served]:
    """`requests` answers to `clients` that ask the next question as soon as they have an answer.

    new_tokens: the most tokens of an answer; several numbers: for the questions in rotation.
    """
    lengths = [new_tokens] if isinstance(new_tokens, int) else new_tokens
    numbers = iter(range(requests))
    served: list[Served] = []
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)

    async def client_loop(client: httpx.AsyncClient) -> None:
        for number in numbers:
            question = number % len(questions)
            length = lengths[question % len(lengths)]
            served.append(await ask(client, question, questions[question], length))

    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        await asyncio.gather(*(client_loop(client) for _ in range(clients)))
    return served
