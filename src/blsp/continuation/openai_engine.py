"""Step 1 behind any OpenAI-compatible URL: vLLM, SGLang, llama.cpp, a vendor.

In:  batches of `Prompt`, sent as chat messages with the words that the local route puts into its template.
Out: `Written`, as answers come; any number of requests is in flight.
Try: `OpenAIEngine("http://localhost:8000/v1", "my-llm", Decoding()).write([[prompt] for prompt in prompts])`
Flow: continuation/ — the large LLM's way into step 1; the writer records each answer as it arrives.

Full queues (429), server errors, time-outs, dropped connections and broken replies are tried again, with
exponential back-off and jitter, or after the time that `Retry-After` names; a refusal that no repetition
cures (401, 404, 422, …) stops the job at once. Either way no row is lost: finished ones are recorded, and
the next run asks the others. `continuation_ids` are what the server says it generated (vLLM does, given
`{"return_token_ids": true}` in the body); where it does not say, rows have none, since tokenising the text
again is not the same thing.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import islice
from typing import Any

import httpx

from blsp.continuation.engines import Prompt, Written
from blsp.llm.decoding import Decoding
from blsp.llm.prompt import Order

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds; doubled from one attempt to the next
WORTH_REPEATING = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
FINISHES = {"stop": "stop", "length": "length", "max_tokens": "length", "eos": "stop", "eos_token": "stop"}


class EngineError(RuntimeError):
    """The server cannot be used; the message says what it answered and what to do."""


class _TryAgain(Exception):
    """An attempt failed in a way that a later one may not. seconds: what Retry-After asked for."""

    def __init__(self, reason: str, seconds: float | None = None) -> None:
        super().__init__(reason)
        self.seconds = seconds


@dataclass(frozen=True)
class OpenAIEngine:
    """One chat-completions endpoint. url is the part before `/chat/completions`, mostly ending in `/v1`."""

    url: str
    model: str
    decoding: Decoding
    api_key: str = field(default="", repr=False)
    in_flight: int = 64  # requests
    timeout: float = 120.0  # seconds an attempt may take
    attempts: int = 8  # a request
    body: dict[str, Any] = field(default_factory=dict)  # merged into each request; null takes a field out
    stop_ids: tuple[int, ...] = ()  # cut off the end of the ids that the server returns
    content: Callable[[Prompt], Any] | None = None  # the user's turn, where it is not plain words

    def write(self, batches: Iterable[Sequence[Prompt]]) -> Iterator[list[Written]]:
        """The answers of each batch, in the order in which batches get done."""
        waiting = iter(batches)
        loop = asyncio.new_event_loop()
        client = httpx.AsyncClient(
            timeout=self.timeout,
            headers={"Authorization": f"Bearer {self.api_key}"} if self.api_key else {},
            limits=httpx.Limits(max_connections=self.in_flight, max_keepalive_connections=self.in_flight),
        )
        running: set[asyncio.Task[list[Written]]] = set()
        try:
            while True:
                for batch in islice(waiting, self.in_flight - len(running)):
                    running.add(loop.create_task(self._answer_all(client, batch)))
                if not running:
                    return
                first = asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                done, running = loop.run_until_complete(first)
                failed = [task for task in done if task.exception()]
                yield from (task.result() for task in done if not task.exception())
                if failed:
                    failed[0].result()
        finally:
            loop.run_until_complete(_leave(client, running))
            loop.close()

    async def _answer_all(self, client: httpx.AsyncClient, batch: Sequence[Prompt]) -> list[Written]:
        return list(await asyncio.gather(*(self._answer(client, prompt) for prompt in batch)))

    async def _answer(self, client: httpx.AsyncClient, prompt: Prompt) -> Written:
        request = self._request(prompt)
        for attempt in range(1, self.attempts + 1):
            try:
                return self._read(prompt, await self._post(client, request))
            except _TryAgain as failure:
                if attempt == self.attempts:
                    raise EngineError(
                        f"{self.url}: no answer to {prompt.text[:60]!r} in {attempt} attempts; the last one: "
                        f"{failure}. Finished rows are kept: start the same command again when the server is "
                        "well, or with a lower --concurrency"
                    ) from failure
                pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)
                await asyncio.sleep(pause if failure.seconds is None else failure.seconds + pause)
        raise EngineError(f"{self.url}: may be asked {self.attempts} times; it must be at least once")

    def _request(self, prompt: Prompt) -> dict[str, Any]:
        words = user_message(prompt.instruction, prompt.order, prompt.text)
        content = self.content(prompt) if self.content else words
        request = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.decoding.max_new_tokens,
            "temperature": self.decoding.temperature,
            "top_p": self.decoding.top_p,
            "seed": prompt.seed,
        } | self.body
        return {name: value for name, value in request.items() if value is not None}

    async def _post(self, client: httpx.AsyncClient, request: dict[str, Any]) -> Any:
        """The reply's JSON; `_TryAgain` where another attempt may help, `EngineError` where none will."""
        try:
            async with asyncio.timeout(
                self.timeout
            ):  # httpx times each read: a dripping server would never end
                reply = await client.post(self.url.rstrip("/") + "/chat/completions", json=request)
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            like = "http://localhost:8000/v1"
            raise EngineError(f"{self.url}: not a web address ({error}); write it like {like}") from None
        except (httpx.TransportError, TimeoutError) as error:
            raise _TryAgain(f"{type(error).__name__} {error}".strip()) from error
        if reply.status_code in WORTH_REPEATING or reply.status_code >= 500:
            raise _TryAgain(_said(reply), retry_after(reply.headers.get("Retry-After")))
        if reply.status_code != 200:
            raise EngineError(f"{self.url} refuses the request: {_said(reply)}")
        try:
            return reply.json()
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise _TryAgain(f"a reply that is not JSON: {reply.text[:80]!r}") from error

    def _read(self, prompt: Prompt, reply: Any) -> Written:
        try:
            choice = reply["choices"][0]
            text, finish = choice["message"].get("content") or "", choice.get("finish_reason")
            ids = choice.get("token_ids")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise _TryAgain(f"a reply without choices: {str(reply)[:80]!r}") from error
        if not isinstance(text, str) or not (ids is None or isinstance(ids, list)):
            raise _TryAgain(f"a reply whose content is not text: {str(choice)[:80]!r}")
        if finish is None:
            raise _TryAgain("a reply without finish_reason, so that its end is unknown")
        refused = None if finish in FINISHES else f"the server ended with finish_reason {finish!r}"
        if ids and ids[-1] in self.stop_ids:
            ids = ids[:-1]
        return Written(prompt.key, text, ids, FINISHES.get(finish, "length"), refused=refused)


async def _leave(client: httpx.AsyncClient, running: set[asyncio.Task[list[Written]]]) -> None:
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    await client.aclose()


def user_message(instruction: str, order: Order, text: str) -> str:
    """The user's turn as `llm/prompt.py` splices it, for a server that applies the template itself."""
    instruction, text = instruction.strip(), " " + text.strip()
    return f"{text}\n{instruction}" if order == "speech-first" else instruction + text


def retry_after(header: str | None) -> float | None:
    """Seconds that a Retry-After header asks for: a number or a date (RFC 9110); None when absent."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return None
    return min(max(seconds, 0.0), 3600.0) if seconds == seconds else None


def _said(reply: httpx.Response) -> str:
    return f"HTTP {reply.status_code} {reply.text[:200]!r}"
