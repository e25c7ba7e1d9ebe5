"""One answer on the event loop's side: submit a job, follow its reports, let it go when nobody waits.

In:  messages with decoded clips, how to decode. Out: pieces of text and, at the end, why it ended and what it cost.
Try: `async for piece in exchange.pieces(): ...`
Flow: serving/ — app.py -> **exchange** -> scheduler.py and back.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from blsp.llm.decoding import Decoding
from blsp.llm.text_stream import TextStream
from blsp.serving.api import ApiError
from blsp.serving.scheduler import Begun, Done, Failed, Job, Report, Scheduler, Token

GRACE = 1.0  # seconds beyond the deadline that the scheduler has to say so itself


class Exchange:
    """A job that was submitted; `pieces` may be iterated once."""

    def __init__(
        self,
        scheduler: Scheduler,
        messages: Sequence[dict[str, Any]],
        decoding: Decoding,
        *,
        seconds: float,
        stops: Sequence[str] = (),
        readout: bool = False,
    ) -> None:
        """Submits; raises ApiError (429) where the queue is full."""
        loop = asyncio.get_running_loop()
        self._reports: asyncio.Queue[Report] = asyncio.Queue()
        self._answer = Answer(scheduler.listener.tokenizer, stops)
        self.begun = Begun(0, 0)
        self.tokens = 0
        self.finish = ""
        self._job = Job(
            messages,
            decoding,
            lambda report: _hand_over(loop, self._reports, report),
            time.monotonic() + seconds,
            readout,
        )
        scheduler.submit(self._job)

    async def started(self) -> None:
        """Until the prompt is accepted, so that a refusal can still be an HTTP status."""
        report = await self._report()
        if isinstance(report, Begun):
            self.begun = report
        elif isinstance(report, Failed):
            raise report.error
        else:
            raise AssertionError(f"a job began with {report}")

    async def pieces(self) -> AsyncIterator[str]:
        """The answer's text; sets `finish`. Leaving early cancels the job."""
        try:
            while not self.finish:
                for piece in self._take(await self._report()):
                    yield piece
        finally:
            self._job.cancel()

    async def _report(self) -> Report:
        """The next one. The scheduler looks at deadlines between two steps; where it is held up in one, this does."""
        left = self._job.deadline + GRACE - time.monotonic()
        try:
            return await asyncio.wait_for(self._reports.get(), None if math.isinf(left) else max(0.0, left))
        except TimeoutError as error:
            self._job.cancel()
            raise ApiError(504, "the request's deadline passed", code="deadline_exceeded") from error

    def _take(self, report: Report) -> list[str]:
        if isinstance(report, Failed):
            raise report.error
        if isinstance(report, Token):
            self.tokens += 1
            text = self._answer.push(report.token)
            if self._answer.stopped:
                self.finish = "stop"
            return [text] if text else []
        if isinstance(report, Done):
            said = report.sentence if report.sentence is not None else report.text
            text = self._answer.close() if said is None else said
            self.finish = report.finish
            return [text] if text else []
        return []

    def cancel(self) -> None:
        self._job.cancel()

    @property
    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.begun.prompt,
            "completion_tokens": self.tokens,
            "total_tokens": self.begun.prompt + self.tokens,
            "prompt_tokens_details": {"audio_tokens": self.begun.speech},
        }


def _hand_over(loop: asyncio.AbstractEventLoop, reports: asyncio.Queue[Report], report: Report) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(reports.put_nowait, report)


class Answer:
    """Text of one answer as it grows; `stopped` once a stop string was met, which is not part of it."""

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
        """What of the held text and `piece` cannot become part of a stop string any more."""
        if self.stopped:
            return ""
        text = self._held + piece
        places = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        kept = 0 if final else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
