"""A client beside an attack, and the bound of what it may notice.

In:  a server with the keys of `KEYS`. Out: silences, first tokens and memory, and those figures beyond their bound.
Try: ``with watched(target) as figures: post(target, "attacker", …)``
Flow: **neighbours.py** → attacks.py → serve_robustness.py

Seconds are compared with a bound times `slowdown`: how many times slower than alone this process was just before, since
other jobs share the machine. Memory and counts are compared as they are.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.support.hostile import CHAT

KEYS = {"attacker": "a-key", "neighbour": "n-key"}
KEYED = {"api_key": tuple(f"{name}={key}" for name, key in KEYS.items())}
STORY = [{"role": "user", "content": "Tell me a long story about a dog, a cat and a mouse."}]
SHORT = [{"role": "user", "content": "Hello"}]
STREAMED = 96  # tokens of each of the neighbour's streams
PATIENCE = 300.0  # seconds that a client waits


@dataclass
class Target:
    """A running server. memory_mb: reads its resident memory; log: its lines; share: the part of the requests."""

    url: str
    memory_mb: Callable[[], float]
    log: Callable[[], str] = str
    share: float = 1.0

    def times(self, count: int, least: int = 1) -> int:
        return max(least, round(count * self.share))

    def client(self, name: str) -> httpx.Client:
        headers = {"authorization": f"Bearer {KEYS.get(name, name)}"} if name else {}
        return httpx.Client(base_url=self.url, timeout=PATIENCE, headers=headers, verify=False)  # it is plain HTTP

    def counted(self, route: str, status: int) -> float:
        """How many requests /metrics tells."""
        with self.client("neighbour") as client:
            lines = client.get("/metrics").text.splitlines()
        wanted = f'blsp_requests_total{{route="{route}",status="{status}"}}'
        return sum(float(line.split()[-1]) for line in lines if line.startswith(wanted))


@dataclass(frozen=True)
class Case:
    """run: the attack and its figures; most: the bound of each figure that has one.

    settings: of `blsp serve`; None: an attack on other commands, without a server.
    """

    name: str
    run: Callable[[Target], dict[str, float]]
    most: Mapping[str, float]
    settings: Mapping[str, Any] | None = field(default_factory=lambda: KEYED)

    def beyond(self, figures: Mapping[str, float], room: float = 1.0) -> list[str]:
        """The figures over their bounds. Bounds in seconds are multiplied by the slowdown and by `room`."""
        room *= max(1.0, figures.get("slowdown", 1.0))
        bounds = {name: most * (room if name.endswith("_s") else 1.0) for name, most in self.most.items()}
        return [f"{self.name}: {name} {figures[name]} > {most:.3g}" for name, most in bounds.items()
                if not figures[name] <= most]  # fmt: skip


def slowdown(seconds: float = 0.3) -> float:
    """How many times longer work takes here than with a core of its own."""
    began, spent = time.monotonic(), time.process_time()
    while time.process_time() - spent < seconds:
        sum(range(10_000))
    return round((time.monotonic() - began) / (time.process_time() - spent), 2)


class Streams:
    """The neighbour: one streamed answer after another in a thread; the silences between pieces, the first tokens."""

    def __init__(self, target: Target) -> None:
        self._target, self._stop = target, threading.Event()
        self.silences: list[float] = []
        self.firsts: list[float] = []
        self.failed: list[str] = []
        self._thread = threading.Thread(target=self._work, daemon=True)

    def _work(self) -> None:
        body = {"messages": STORY, "max_tokens": STREAMED, "stream": True, "temperature": 1.0}
        with self._target.client("neighbour") as client:
            while not self._stop.is_set():
                before, began = 0.0, time.monotonic()
                with client.stream("POST", CHAT, json=body) as answer:
                    for line in answer.iter_lines():
                        now = time.monotonic()
                        if '"error"' in line or answer.status_code != 200:
                            self.failed.append(line)
                        if '"content": "' not in line or '"content": ""' in line:
                            continue
                        (self.silences if before else self.firsts).append(now - (before or began))
                        before = now
                        if self._stop.is_set():
                            break

    def __enter__(self) -> Streams:
        self._thread.start()
        end = time.monotonic() + 60
        while not self.silences and time.monotonic() < end:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)


@contextmanager
def watched(target: Target, quiet: float = 12.0) -> Iterator[dict[str, float]]:
    """Figures of a neighbour before (`quiet_…`) and while the block runs, and how far the server's memory rose."""
    figures: dict[str, float] = {"slowdown": slowdown()}
    with Streams(target) as before:
        time.sleep(quiet * min(1.0, 0.1 + target.share))
    with memory_watched(target, figures), Streams(target) as streams:
        yield figures
        time.sleep(0.5)
    figures["quiet_silence_s"], figures["quiet_first_s"] = round(max(before.silences), 3), round(max(before.firsts), 3)
    figures["silence_s"] = round(max(streams.silences), 3)
    figures["first_s"] = round(max(streams.firsts), 3)
    figures["neighbour_failed"] = len(before.failed) + len(streams.failed)


@contextmanager
def memory_watched(target: Target, figures: dict[str, float]) -> Iterator[None]:
    """Adds to the figures how far the server's memory rises while the block runs."""
    memory, highest, over = target.memory_mb(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not over.wait(0.05):
            highest = max(highest, target.memory_mb())

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        try:
            yield
        finally:
            over.set()
        watching.result()
    figures["memory_mb"] = round(max(0.0, highest - memory), 1)


def post(target: Target, name: str, body: Any, path: str = CHAT, **options: Any) -> tuple[int, float]:
    """The status and the seconds from sending to the whole answer; 0 where the client gave up."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    with target.client(name) as client:
        began = time.monotonic()
        try:
            status = client.post(path, content=content, **options).status_code
        except httpx.TransportError:
            status = 0
        return status, time.monotonic() - began


def chat(content: Any, tokens: int = 4) -> dict[str, Any]:
    messages = content if isinstance(content, list) and content and "role" in content[0] else [
        {"role": "user", "content": content}
    ]  # fmt: skip
    return {"messages": messages, "max_tokens": tokens}


def clip(data: bytes) -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}
