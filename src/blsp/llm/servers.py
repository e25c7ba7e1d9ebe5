"""LLM servers behind OpenAI-compatible URLs: the least busy is asked first, a failing one is left out for a while.

In:  URLs, a key. Out: for each request a `Server`, whose `client` is openai's.
Try: `async with Servers(["http://localhost:8000/v1"]).take() as server: await server.client.models.list()`
Flow: **servers.py** → continuation/openai_engine.py (step 1), serving/remote.py (chat on vLLM)

The `openai` client runs on aiohttp: a request then took half the processor time (docs/log.md). The client does
not retry by itself: the callers of this module decide where a request is sent again.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import aiohttp
import httpx2
from openai import APIConnectionError, AsyncOpenAI, DefaultAioHttpClient

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds between two attempts; each pause is twice the one before
LONGEST_ABSENCE = 15.0  # seconds that a server is left out, at most, before it is tried again
CONNECT_SECONDS = 10.0
LONGEST_WAIT = 120.0  # seconds; the longest wait that a server may ask for
UNREACHABLE = (502, 503)  # status codes of a proxy whose server cannot be reached
LOST = (APIConnectionError, aiohttp.ClientError)  # no whole reply came: no connection, or one that ended early
NEVER_SENT = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)


class ServerError(RuntimeError):
    """The servers cannot be used; the message says what was answered and what to do."""


@dataclass(eq=False)
class Server:
    """One URL, its open requests and its failures."""

    url: str
    client: AsyncOpenAI = field(repr=False)
    busy: int = 0  # requests that are not answered yet
    failures: int = 0  # since its last answer
    failed_at: float = -1.0  # of time.monotonic()
    back_at: float = 0.0  # of time.monotonic(); it is left out until then

    def leave_out(self, sent_at: float) -> None:
        """Leave it out for a while, longer each time. Ignored if the request was sent before the last failure."""
        if sent_at < self.failed_at:
            return
        self.failed_at = time.monotonic()
        self.back_at = self.failed_at + min(LONGEST_ABSENCE, pause_before(self.failures))
        self.failures += 1


class Servers:
    """All URLs of one job. Use it inside one event loop."""

    def __init__(self, urls: Sequence[str], *, api_key: str = "", connections: int = 64) -> None:
        """connections: requests that may be open at one URL."""
        for url in urls:
            if urlsplit(url).scheme not in ("http", "https"):
                raise ServerError(f"{url}: not a web address; write it like http://localhost:8000/v1")
        self._servers = [Server(url, _client(url, api_key, connections)) for url in urls]
        self.answered_at = time.monotonic()  # when any of them answered last; at first, when the job began

    @asynccontextmanager
    async def take(self) -> AsyncIterator[Server]:
        """The least busy server. If all are left out, wait until the first one may be tried again."""
        while (wait := min(server.back_at for server in self._servers) - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        now = time.monotonic()
        server = min((s for s in self._servers if s.back_at <= now), key=lambda s: (s.busy, s.failures))
        server.busy += 1
        try:
            yield server
        finally:
            server.busy -= 1

    def answered(self, server: Server) -> None:
        """Note that a server has answered."""
        server.failures, server.back_at = 0, 0.0
        self.answered_at = time.monotonic()

    async def close(self) -> None:
        for server in self._servers:
            await server.client.close()


def _client(url: str, api_key: str, connections: int) -> AsyncOpenAI:
    limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
    timeout = httpx2.Timeout(None, connect=CONNECT_SECONDS)  # callers limit the time of the whole answer
    http_client = DefaultAioHttpClient(timeout=timeout, limits=limits)
    return AsyncOpenAI(api_key=api_key or "none", base_url=url, max_retries=0, timeout=timeout, http_client=http_client)


def pause_before(attempt: int, asked: str | None = None) -> float:
    """Seconds to wait before a request is sent again. asked: the server's `Retry-After`, seconds or a date."""
    with suppress(TypeError, ValueError):  # the header is missing or invalid
        if (asked or "").replace(".", "", 1).isdecimal():
            return min(float(asked or 0), LONGEST_WAIT)
        date = parsedate_to_datetime(asked or "")
        return min(max(0.0, (date - datetime.now(UTC)).total_seconds()), LONGEST_WAIT)
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(attempt, 16)) * random.uniform(0.5, 1.0)


def cause_of(error: BaseException) -> BaseException:
    """The aiohttp error that caused an error in `LOST`; openai's message is always just "Connection error."."""
    while not isinstance(error, aiohttp.ClientError) and error.__cause__ is not None:
        error = error.__cause__
    return error
