"""An LLM behind an OpenAI-compatible URL: vLLM, SGLang, llama.cpp, a vendor.

In:  batches of `Prompt`, sent as chat messages with the words that the local engine puts into its template.
Out: `Written`, as answers come; up to `in_flight` requests wait at the server at once.
Try: `OpenAIEngine("http://localhost:8000/v1", "my-llm", Decoding()).write([[prompt] for prompt in prompts])`
Flow: work.py (batches) → **openai_engine.py** → work.py, which records each answer as it arrives

The `openai` client sends a request again after 429, a server error, a time-out or a lost connection, and here after a
broken reply too; it waits as long as `Retry-After` says (two minutes at most), or ever longer. A refusal that no
repetition changes (401, 404, 422) stops the job at once. No row is lost in either case: finished ones are recorded,
and the next run asks for the others. `continuation_ids` are what the server says it generated (vLLM does, given
`{"return_token_ids": true}` in the body). Otherwise rows have none, since the text tokenised again is not the same.
"""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx
from openai import APIStatusError, AsyncOpenAI

from blsp.continuation.engines import Prompt, Written
from blsp.llm.decoding import Decoding
from blsp.llm.prompt import Order

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds between two attempts; each pause is twice the one before
LONGEST_WAIT = 120  # seconds that a server may ask for; the client does not wait longer
POOL = 16  # requests that share connections: httpx looks through all of a pool's connections at each request
SENT_AGAIN = {408, 409, 429}  # and server errors, 500 and above
FINISHES = {"stop": "stop", "length": "length", "max_tokens": "length", "eos": "stop", "eos_token": "stop"}


class EngineError(RuntimeError):
    """The server cannot be used; the message says what it answered and what to do."""


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
        """The answers of each batch, in the order in which the batches are done."""
        if urlsplit(self.url).scheme not in ("http", "https"):
            raise EngineError(f"{self.url}: not a web address; write it like http://localhost:8000/v1")
        with asyncio.Runner() as runner:
            results: asyncio.Queue[list[Written] | Exception | None] = asyncio.Queue()
            waiting, loop, verify = iter(batches), runner.get_loop(), httpx.create_ssl_context()
            clients = [self._client(verify) for _ in range(-(-self.in_flight // POOL))]
            workers = [
                loop.create_task(self._work(clients[number % len(clients)], waiting, results))
                for number in range(self.in_flight)
            ]
            working = len(workers)
            try:
                while working:
                    result = runner.run(results.get())
                    if isinstance(result, Exception):
                        raise result
                    if result is None:
                        working -= 1
                    else:
                        yield result
            finally:
                for client in clients:
                    runner.run(client.close())

    def _client(self, verify: ssl.SSLContext) -> AsyncOpenAI:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=POOL)
        # openai's types name httpx2, the successor of httpx; it takes both
        http_client: Any = _WholeReplies(timeout=self.timeout, limits=limits, verify=verify)
        return AsyncOpenAI(
            api_key=self.api_key or "none", base_url=self.url, max_retries=self.attempts - 1, http_client=http_client
        )

    async def _work(
        self, client: AsyncOpenAI, waiting: Iterator[Sequence[Prompt]], results: asyncio.Queue[Any]
    ) -> None:
        """Take batches until there are none; the last result is None, or the error that ends the job."""
        try:
            for batch in waiting:
                answers = await asyncio.gather(*(self._answer(client, prompt) for prompt in batch))
                results.put_nowait(list(answers))
            results.put_nowait(None)
        except Exception as error:
            results.put_nowait(error)

    async def _answer(self, client: AsyncOpenAI, prompt: Prompt) -> Written:
        try:
            reply: Any = await client.post("/chat/completions", body=self._request(prompt), cast_to=object)
        except APIStatusError as error:
            response = error.response
            said = response.extensions.get("fault") or f"HTTP {response.status_code} {response.text[:200]!r}"
            if response.status_code < 500 and response.status_code not in SENT_AGAIN:
                raise EngineError(f"{self.url} refuses the request: {said}") from error
            raise EngineError(
                f"{self.url}: no answer to {prompt.text[:60]!r} in {self.attempts} attempts; the last one: {said}. "
                "Finished rows are kept: start the same command again when the server works, or with a lower "
                "--concurrency"
            ) from error
        choice = reply["choices"][0]
        text, finish, ids = (choice["message"].get("content") or "", choice["finish_reason"], choice.get("token_ids"))
        refused = None if finish in FINISHES else f"the server ended with finish_reason {finish!r}"
        if any("\ud800" <= character <= "\udfff" for character in text):
            refused = "the server's text holds half of a surrogate pair, which no file can hold"
        if ids and ids[-1] in self.stop_ids:
            ids = ids[:-1]
        return Written(prompt.key, text, ids, FINISHES.get(finish, "length"), refused=refused)

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


class _WholeReplies(httpx.AsyncClient):
    """The HTTP client below openai's. What is not a whole chat completion in time becomes a server error, which
    openai's client sends again."""

    async def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        fault = None
        try:
            # httpx times each read alone: a server that sends a byte now and then would never end
            async with asyncio.timeout(self.timeout.read):
                reply = await super().send(request, **options)
            fault = _fault_of(reply) if reply.status_code == 200 else None
        except (httpx.TransportError, TimeoutError) as error:
            fault = f"{type(error).__name__} {error}".strip()
        if fault:
            reply = httpx.Response(502, request=request, extensions={"fault": fault})
        reply.headers["Content-Type"] = "application/json"  # some servers do not say so
        _set_pause(reply, int(request.headers.get("x-stainless-retry-count", 0)))
        return reply


def _fault_of(reply: httpx.Response) -> str | None:
    """What is broken in a reply that should be a chat completion; None where it is one."""
    try:
        body = reply.json()
    except ValueError:
        return f"a reply that is not JSON: {reply.text[:80]!r}"
    try:
        choice = body["choices"][0]
        text, finish, ids = (choice["message"].get("content"), choice.get("finish_reason"), choice.get("token_ids"))
    except (KeyError, IndexError, TypeError, AttributeError):
        return f"a reply without choices: {str(body)[:80]!r}"
    if not isinstance(text or "", str) or not isinstance(ids or [], list):
        return f"a reply whose content is not text: {str(choice)[:80]!r}"
    return "a reply without finish_reason, so that its end is unknown" if finish is None else None


def _set_pause(reply: httpx.Response, attempt: int) -> None:
    """Say how long to wait before the next attempt, where the server does not, or asks for too long."""
    asked = reply.headers.get("Retry-After")
    if asked is None:
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt) * random.uniform(0.5, 1.0)
        reply.headers["Retry-After"] = f"{pause:.3f}"
    else:
        with suppress(ValueError):  # a date, or no number at all: openai's client reads it
            reply.headers["Retry-After"] = str(min(float(asked), LONGEST_WAIT))


def user_message(instruction: str, order: Order, text: str) -> str:
    """The user's turn as `llm/prompt.py` splices it, for a server that applies the template itself."""
    instruction, text = instruction.strip(), " " + text.strip()
    return f"{text}\n{instruction}" if order == "speech-first" else instruction + text
