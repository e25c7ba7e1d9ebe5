"""An LLM behind OpenAI-compatible URLs: vLLM, SGLang, llama.cpp, a vendor.

In:  batches of `Prompt`, sent as chat messages with the same words that the local engine puts into its template.
Out: `Written`, as soon as answers arrive; each server has up to `in_flight` open requests.
Try: `OpenAIEngine(("http://localhost:8000/v1",), "my-llm", Decoding()).write([[prompt] for prompt in prompts])`
Flow: prompt_plan.py (batches) → **openai_engine.py** → llm/servers.py; answers go back there

What happens after a failure:

    the server cannot be reached, or is full (429, 502, 503)   sent again until --retry-minutes pass without an answer
    no answer in time, a lost connection, a broken reply,      sent again --retries times; then the prompt is refused:
    another server error                                       it goes to the skip list with the reason
    the request is refused (400, 413, 422, …)                  the prompt is refused at once
    the address or the key is wrong (401, 403, 404, 405)       the job stops

No row is lost when the job stops: finished ones are recorded, and the next run asks for the others.
`continuation_ids` are the token ids that the server returns (vLLM does, with `{"return_token_ids": true}` in the
body). Otherwise rows have none, since tokenising the text again may give other ids.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2
from openai import APIStatusError

from blsp.continuation.engines import Prompt, Written
from blsp.llm.decoding import Decoding
from blsp.llm.prompt import Order
from blsp.llm.servers import LOST, NEVER_SENT, UNREACHABLE, Server, ServerError, Servers, cause_of, pause_before

WRONG_JOB = (401, 403, 404, 405)  # the error would be the same for every prompt
SENT_AGAIN = (408, 409, 429)  # and server errors, 500 and above
FULL = 429
FINISHES = {"stop": "stop", "length": "length", "max_tokens": "length", "eos": "stop", "eos_token": "stop"}


class RefusedError(Exception):
    """The server refuses this prompt; sending it again does not help."""


class FailedError(Exception):
    """An attempt without an answer. counts: the prompt may be the cause. asked: the server's `Retry-After`."""

    def __init__(self, message: str, *, counts: bool = True, asked: str | None = None) -> None:
        super().__init__(message)
        self.counts, self.asked = counts, asked


@dataclass(frozen=True)
class OpenAIEngine:
    """Chat completions. Each URL is the part before `/chat/completions`; it usually ends in `/v1`."""

    urls: tuple[str, ...]
    model: str
    decoding: Decoding
    api_key: str = field(default="", repr=False)
    in_flight: int = 64  # requests at each URL
    timeout: float = 120.0  # seconds for one attempt
    retries: int = 8  # of a prompt that may be the cause of the failure
    retry_minutes: float = 30.0  # without any answer, before the job stops
    body: dict[str, Any] = field(default_factory=dict)  # merged into each request; null removes a field
    stop_ids: tuple[int, ...] = ()  # cut off the end of the ids that the server returns
    content: Callable[[Prompt], Any] | None = None  # makes the user's turn, if it is not plain text

    def write(self, batches: Iterable[Sequence[Prompt]]) -> Iterator[list[Written]]:
        """The answers of each batch, in the order in which the batches finish."""
        servers = Servers(self.urls, api_key=self.api_key, connections=self.in_flight)
        results: asyncio.Queue[list[Written] | Exception | None] = asyncio.Queue()
        waiting, working = iter(batches), self.in_flight * len(self.urls)
        with asyncio.Runner() as runner:
            loop = runner.get_loop()
            workers = [loop.create_task(self._work(servers, waiting, results)) for _ in range(working)]
            try:
                while working:
                    for result in runner.run(_all_in(results)):
                        if isinstance(result, Exception):
                            raise result
                        if result is None:
                            working -= 1
                        else:
                            yield result
            finally:
                for worker in workers:
                    worker.cancel()
                runner.run(servers.close())

    async def _work(self, servers: Servers, waiting: Iterator[Sequence[Prompt]], results: asyncio.Queue[Any]) -> None:
        """Answer batches until there are none; the last result is None, or the error that stops the job."""
        try:
            for batch in waiting:
                results.put_nowait([await self._answer(servers, prompt) for prompt in batch])
            results.put_nowait(None)
        except Exception as error:
            results.put_nowait(error)

    async def _answer(self, servers: Servers, prompt: Prompt) -> Written:
        """Send the prompt until it is answered or refused; the table at the top of this file has the rules."""
        request, attempts, counted = self._request(prompt), 0, 0
        while True:
            try:
                async with servers.take() as server:
                    choice = await self._ask(server, request)
                    servers.answered(server)
                return self._written(prompt, choice)
            except RefusedError as refusal:
                return Written(prompt.key, "", None, "", refused=str(refusal))
            except FailedError as fault:
                attempts, counted = attempts + 1, counted + fault.counts
                if counted > self.retries:
                    reason = f"no answer in {attempts} attempts; the last one: {fault}"
                    return Written(prompt.key, "", None, "", refused=reason)
                silence = time.monotonic() - servers.answered_at
                if not fault.counts and silence > 60 * self.retry_minutes:
                    raise ServerError(
                        f"{', '.join(self.urls)}: no answer for {silence / 60:.1f} minutes; the last attempt: {fault}. "
                        "Finished rows are kept: start the same command again when the server works, or with a lower "
                        "--concurrency"
                    ) from None
                await asyncio.sleep(pause_before(attempts - 1, fault.asked))

    async def _ask(self, server: Server, request: dict[str, Any]) -> dict[str, Any]:
        """The first choice of a whole reply; raises RefusedError, FailedError or ServerError."""
        sent_at = time.monotonic()
        try:
            async with asyncio.timeout(self.timeout):  # for the whole reply, even if it arrives byte by byte
                reply = await server.client.post("/chat/completions", body=request, cast_to=httpx2.Response)
            return _choice_of(reply.content)
        except APIStatusError as error:
            status, said = error.status_code, f"HTTP {error.status_code} {error.response.text[:200]!r}"
            if status in WRONG_JOB:
                raise ServerError(f"{server.url} refuses the request: {said}") from error
            if status < 500 and status not in SENT_AGAIN:
                raise RefusedError(f"the server refuses it: {said}") from error
            if status in UNREACHABLE:
                server.leave_out(sent_at)
            asked = error.response.headers.get("Retry-After")
            raise FailedError(said, counts=status not in (FULL, *UNREACHABLE), asked=asked) from error
        except TimeoutError:
            raise FailedError(f"no answer in {self.timeout:g} s (--timeout)") from None
        except LOST as error:
            server.leave_out(sent_at)
            cause = cause_of(error)
            said = f"{type(cause).__name__} {cause}".strip()
            raise FailedError(said, counts=not isinstance(cause, NEVER_SENT)) from error

    def _written(self, prompt: Prompt, choice: dict[str, Any]) -> Written:
        text, finish, ids = choice["message"].get("content") or "", choice["finish_reason"], choice.get("token_ids")
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


async def _all_in(queue: asyncio.Queue[Any]) -> list[Any]:
    """All entries of the queue, at least one: one call of the event loop for each entry would be slow."""
    return [await queue.get(), *(queue.get_nowait() for _ in range(queue.qsize()))]


def _choice_of(content: bytes) -> dict[str, Any]:
    """The first choice of a chat completion; raises FailedError for any other reply."""
    try:
        body = json.loads(content)
    except ValueError:
        raise FailedError(f"a reply that is not JSON: {content[:80]!r}") from None
    try:
        choice = body["choices"][0]
        text, finish, ids = (choice["message"].get("content"), choice.get("finish_reason"), choice.get("token_ids"))
    except (KeyError, IndexError, TypeError, AttributeError):
        raise FailedError(f"a reply without choices: {str(body)[:80]!r}") from None
    if not isinstance(text or "", str) or not isinstance(ids or [], list):
        raise FailedError(f"a reply whose content is not text: {str(choice)[:80]!r}")
    if finish is None:
        raise FailedError("a reply without finish_reason")
    return dict(choice)


def user_message(instruction: str, order: Order, text: str) -> str:
    """The user's turn, the same text as in `llm/prompt.py`, for a server that applies the template itself."""
    instruction, text = instruction.strip(), " " + text.strip()
    return f"{text}\n{instruction}" if order == "speech-first" else instruction + text
