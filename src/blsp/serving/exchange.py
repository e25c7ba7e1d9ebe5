"""One request in the event loop: its job, the reports of the scheduler, the text of the answer.

In:  messages with decoded clips, how to decode. Out: pieces of text, then the finish reason and the usage.
Try: `async for piece in exchange.pieces(): ...`
Flow: app.py → **exchange.py** → scheduler.py and back
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any, TypeVar

from fastapi import Request
from transformers import PreTrainedTokenizerBase

from blsp.inference.word_times import Word
from blsp.llm.decoding import Decoding, TextStream
from blsp.serving.errors import ApiError, late
from blsp.serving.job import Begun, Done, Failed, Job, Report, Token
from blsp.serving.scheduler import Scheduler

GRACE = 1.0  # seconds after the deadline in which the scheduler may still report it
CLIENT_LEFT = 499  # the status in the metrics when the client closed the connection
UNWRITTEN = "[audio]"  # a clip in the log
T = TypeVar("T")


class Exchange:
    """A submitted job; `pieces` may be iterated once."""

    def __init__(
        self,
        scheduler: Scheduler,
        messages: Sequence[dict[str, Any]],
        decoding: Decoding,
        *,
        end: float,
        stops: Sequence[str] = (),
        readout: bool = False,
        client: str = "",
        starts_at: float | None = None,
        sharing: str = "",
        hear_only: bool = False,
        may_shorten: bool = False,
    ) -> None:
        """Submit the job; raises ApiError (429) if the queue is full. end: the deadline, as monotonic time."""
        loop = asyncio.get_running_loop()
        self._reports: asyncio.Queue[Report] = asyncio.Queue()
        self._text = StopStringFilter(scheduler.listener.tokenizer, stops)
        self.begun = Begun(0, 0)
        self.texts: list[str] = []  # the pieces so far
        self.tokens = 0
        self.finish = ""
        self.words: tuple[Word, ...] = ()
        self._job = Job(
            messages,
            decoding,
            lambda report: _hand_over(loop, self._reports, report),
            end,
            readout,
            client,
            starts_at,
            sharing,
            hear_only,
            may_shorten,
        )
        scheduler.submit(self._job)

    async def started(self) -> None:
        """Wait until the prompt is accepted, so that a refusal can still be an HTTP status."""
        report = await self._report()
        if isinstance(report, Begun):
            self.begun = report
        elif isinstance(report, Failed):
            raise report.error
        else:
            raise AssertionError(f"a job began with {report}")

    async def pieces(self) -> AsyncIterator[str]:
        """The text of the answer; sets `finish`. Ending the iteration early cancels the job."""
        try:
            while not self.finish:
                for piece in self._take(await self._report()):
                    self.texts.append(piece)
                    yield piece
        finally:
            self._job.cancel()

    async def _report(self) -> Report:
        """The next report. The scheduler checks deadlines between two steps; this checks them during a long step."""
        left = self._job.deadline + GRACE - time.monotonic()
        try:
            return await asyncio.wait_for(self._reports.get(), None if math.isinf(left) else max(0.0, left))
        except TimeoutError as error:
            self._job.cancel()
            raise late() from error

    def _take(self, report: Report) -> list[str]:
        if isinstance(report, Failed):
            raise report.error
        if isinstance(report, Token):
            self.tokens += 1
            text = self._text.push(report.token)
            if self._text.stopped:
                self.finish = "stop"
            return [text] if text else []
        if isinstance(report, Done):
            fixed = report.sentence if report.sentence is not None else report.text
            text = self._text.close() if fixed is None else fixed
            self.finish, self.words = report.finish, report.words
            return [text] if text else []
        return []

    def cancel(self) -> None:
        self._job.cancel()

    @property
    def asked(self) -> list[str]:
        """The messages as text, for the log: the role and the parts of each; a clip is "[audio]"."""
        texts = []
        for message in self._job.messages:
            parts = [part if isinstance(part, str) else UNWRITTEN for part in message["parts"]]
            texts.append(" ".join([f"{message['role']}:", *parts]))
        return texts

    @property
    def heard(self) -> list[dict[str, Any]]:
        """The messages with vectors in the place of the clips, after the job is done."""
        return self._job.with_embeds()

    @property
    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.begun.prompt,
            "completion_tokens": self.tokens,
            "total_tokens": self.begun.prompt + self.tokens,
            "prompt_tokens_details": {"audio_tokens": self.begun.speech, "cached_tokens": self.begun.reused},
        }


def client_of(request: Request) -> str:
    """The client, for its turn in the queue and its key/values: the API key's name, or the client's address."""
    if key := getattr(request.state, "key", ""):
        return f"key {key}"
    return request.client.host if request.client else ""


async def joined(pieces: AsyncIterator[str]) -> str:
    """The whole text of an answer."""
    return "".join([piece async for piece in pieces])


async def while_connected(request: Request, work: Awaitable[T], exchange: Exchange | None = None) -> T:
    """The result of `work`; if the client leaves before that, the work and its job are cancelled."""
    task = asyncio.ensure_future(work)
    try:
        while True:
            done, _ = await asyncio.wait({task}, timeout=0.25)
            if done:
                return task.result()
            if await request.is_disconnected():
                raise ApiError(CLIENT_LEFT, "the client has left")
    finally:
        if not task.done():
            task.cancel()
            if exchange:
                exchange.cancel()


def _hand_over(loop: asyncio.AbstractEventLoop, reports: asyncio.Queue[Report], report: Report) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(reports.put_nowait, report)


class StopStringFilter:
    """The text of one answer, cut before the first stop string; `stopped` after one was found.

    An end that may become a stop string is held back. Example with the stop string "END": after "the EN" it returns
    "the " and holds "EN" back; if "D" follows, it has stopped; if "T" follows, it returns "ENT".
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self._stream = TextStream(tokenizer)
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        return self._release(self._stream.push(token), final=False)

    def close(self) -> str:
        return self._release(self._stream.close(), final=True)

    def _release(self, piece: str, *, final: bool) -> str:
        """The part of the held text and `piece` that cannot be the beginning of a stop string."""
        if self.stopped:
            return ""
        text = self._held + piece
        starts = [start for stop in self._stops if (start := text.find(stop)) >= 0]
        if starts:
            self.stopped, self._held = True, ""
            return text[: min(starts)]
        overlap = 0 if final else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - overlap :]
        return text[: len(text) - overlap]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
