"""Scheduler of the model: one thread in which requests join and leave the batch between two steps.

In:  `Job`s (a conversation, how to decode, a deadline, where to report) from any thread.
Out: reports: `Begun`, tokens, the end, or the error.
Try: `scheduler = Scheduler(listener, limits); scheduler.start(); scheduler.submit(job)`
Flow: app.py, exchange.py → **scheduler.py** → inference/conversation.py, llm/decoding.py

Clients take turns in the queue (fair_queue.py). It is bounded; beyond that `submit` refuses with 429. Few jobs join
between two steps, so that a crowd does not hold up the answers in progress. The key/values of finished conversations
are kept (`Memory`), so the next turn runs only its new part. One turn of the thread:

    remove cancelled and late jobs → encode and prefill new jobs → one token for every running job
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, count
from typing import Any

import numpy as np

from blsp.data.audio import SAMPLE_RATE
from blsp.distributed import give_back_freed_memory
from blsp.inference.conversation import ContextError, LaidOut, Memory, lay_out, remember, request_for, user_turn
from blsp.inference.listener import Listener
from blsp.inference.pauses import Piece
from blsp.inference.transcript import BEAM, times_of_words
from blsp.inference.word_times import Word
from blsp.llm.decoding import Decoder, Decoding, Event, Request
from blsp.llm.prefix import Prefix
from blsp.llm.prompt import PromptError
from blsp.model.adapter_parts import AudioEmbeds
from blsp.serving.fair_queue import FairQueue
from blsp.serving.metrics import Metrics
from blsp.serving.refusals import ApiError

log = logging.getLogger("blsp.serving")
MAX_JOINING = 4  # requests encoded and prefilled between two steps
MAX_JOINING_SECONDS = 60.0  # of speech among them; a longer recording joins alone
RESCORING_COST = 4  # a second of speech takes this many times longer when the LLM scores its hypotheses
FREE_MEMORY_EVERY = 64  # answers between two returns of unused memory to the system
KEPT_POSITIONS = 512  # per kept conversation, on average: a few long ones do not fill the memory

Part = str | np.ndarray


@dataclass(frozen=True)
class Begun:
    """The prompt is accepted. prompt: its positions; speech: how many of them are speech."""

    prompt: int
    speech: int


@dataclass(frozen=True)
class Token:
    token: int


@dataclass(frozen=True)
class Done:
    """finish: "stop" or "length". sentence: the no-speech sentence, where no speech was found. text: a read-out.
    words: of the read-out, with their times, where they were asked for."""

    finish: str = "stop"
    sentence: str | None = None
    text: str | None = None
    words: tuple[Word, ...] = ()


@dataclass(frozen=True)
class Failed:
    error: ApiError


Report = Begun | Token | Done | Failed


@dataclass(eq=False)
class Job:
    """One answer to generate. messages: `{"role", "parts"}`, parts are texts and clips (N,) in order; the last
    message is the question. With `readout`, its clips are transcribed as `Listener.transcribe` does.
    client: whose turn it is, an API key's name or an address. starts_at: where the clip of a read-out begins in its
    recording, in seconds; None: the times of its words are not wanted."""

    messages: Sequence[dict[str, Any]]
    decoding: Decoding
    report: Callable[[Report], None]
    deadline: float  # of time.monotonic()
    readout: bool = False
    client: str = ""
    starts_at: float | None = None
    key: int = field(default_factory=count().__next__)
    submitted: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    laid: LaidOut | None = None
    ids: list[int] = field(default_factory=list)

    @cached_property
    def seconds(self) -> float:
        """Seconds of speech to encode."""
        return sum(map(len, _clips(self))) / SAMPLE_RATE

    def cancel(self) -> None:
        """Ask the scheduler to remove the job at the next step."""
        self.cancelled = True


@dataclass(frozen=True)
class Limits:
    """Requests generated together, requests that may wait, conversations whose key/values are kept."""

    batch: int = 16
    queue: int = 64
    kept: int = 32


class Scheduler:
    """The only thread that runs the model."""

    def __init__(self, listener: Listener, limits: Limits, metrics: Metrics | None = None) -> None:
        self.listener, self.limits, self.metrics = listener, limits, metrics or Metrics()
        self._decoder = Decoder(listener.model)
        self._memory = Memory(limits.kept, KEPT_POSITIONS * limits.kept)
        self._waiting: FairQueue[Job] = FairQueue(limits.queue)
        self._running: dict[Hashable, Job] = {}
        self._changed = threading.Condition()  # its lock is re-entrant
        self._stopping = False
        self._ended = 0
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)

    # --- called from other threads ------------------------------------------------------------------------
    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Add `job` to the queue, or raise ApiError (429, 503). Where the queue is full, newer jobs of a client that
        holds more of it give way."""
        with self._changed:
            for newer in self.check_room(job.client, job.seconds):
                self._waiting.discard(newer)
                newer.cancel()
                self._end(newer, self._queue_full())
            self._waiting.add(job)
            self.metrics.waiting.set(len(self._waiting))
            self._changed.notify()

    def check_room(self, client: str, seconds: float = 0.0) -> list[Job]:
        """Raise ApiError where the queue has no room for this much speech; else the jobs that must give way to it."""
        with self._changed:
            if self._stopping:
                raise ApiError(503, "the server is shutting down", code="shutting_down")
            for job in self._waiting:
                if job.cancelled:
                    self._waiting.discard(job)
            yielding = self._waiting.making_room(client, seconds)
            if yielding is None:
                raise self._queue_full()
            return yielding

    def _queue_full(self) -> ApiError:
        """The refusal, with a guess when to come back: two seconds of work per batch of waiting jobs."""
        retry_after = max(1, 2 * len(self._waiting) // self.limits.batch)
        text = f"too many requests are waiting; try again in {retry_after} s"
        return ApiError(429, text, code="queue_full", retry_after=retry_after)

    def stop(self, seconds: float = 30.0) -> None:
        """Accept no new jobs, finish the accepted ones, and end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(seconds)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    # --- in the thread of the model -------------------------------------------------------------------------------
    def _work(self) -> None:
        while self._wait():
            try:
                self._turn()
            except Exception as error:  # the running answers are lost; a fresh decoder serves the next jobs
                self._give_up(error, list(self._running.values()))
                self._decoder = Decoder(self.listener.model)

    def _wait(self) -> bool:
        """Wait until there is work; False when the server stops and all work is done."""
        with self._changed:
            while not len(self._waiting) and not self._running:
                if self._stopping:
                    return False
                self._changed.wait()
        return True

    def _turn(self) -> None:
        """Remove jobs, add jobs, generate one token for every running job."""
        self._remove_late()
        if joining := self._next():
            self._dispatch(self._decoder.join(self._requests(joining)))
        if len(self._decoder):
            self.metrics.steps.inc()
            self._dispatch(self._decoder.step())
        self.metrics.running.set(len(self._running))
        if self._ended >= FREE_MEMORY_EVERY:
            self._ended = 0
            give_back_freed_memory()

    def _remove_late(self) -> None:
        """Remove cancelled jobs and those past their deadline, from the queue and from the batch."""
        now = time.monotonic()
        with self._changed:
            late = [job for job in self._waiting if job.cancelled or now > job.deadline]
            for job in late:
                self._waiting.discard(job)
        for job in late:
            self._end(job, None if job.cancelled else _late())
        for job in [job for job in self._running.values() if job.cancelled or now > job.deadline]:
            self._decoder.leave(job.key)
            self._end(job, None if job.cancelled else _late())

    def _next(self) -> list[Job]:
        """The next waiting jobs, as many as may join now."""
        free = min(self.limits.batch - len(self._running), MAX_JOINING)
        taken: list[Job] = []
        seconds = 0.0
        with self._changed:
            while len(self._waiting) and len(taken) < free:
                job = next(iter(self._waiting))
                seconds += job.seconds * (RESCORING_COST if job.readout else 1)
                if taken and seconds > MAX_JOINING_SECONDS:
                    break
                self._waiting.take(job)
                taken.append(job)
            self.metrics.waiting.set(len(self._waiting))
        self._running |= {job.key: job for job in taken}
        return taken

    def _requests(self, jobs: list[Job]) -> list[Request]:
        """Requests for the decoder. Jobs that end here (no speech, a read-out, too long) are reported."""
        requests = []
        encoded = self._encode([job for job in jobs if job.readout], beam=BEAM)
        for job, messages in encoded + self._encode([job for job in jobs if not job.readout]):
            try:
                request = self._read_out(job, messages) if job.readout else self._request(job, messages)
            except Exception as error:  # an error in one request is reported to that one only
                self._give_up(error, [job])
                continue
            if request is not None:
                requests.append(request)
        return _sharing_prefixes(requests, {job.key: job.laid for job in jobs})

    def _encode(self, jobs: list[Job], beam: int = 0) -> list[tuple[Job, list[dict[str, Any]]]]:
        """Jobs with their messages, the clips encoded in one batch; if that fails, job by job."""
        clips = [clip for job in jobs for clip in _clips(job)]
        try:
            embeds = iter(self.listener.embed_audio(clips, beam=beam, keep_states=beam > 0) if clips else ())
        except Exception as error:
            if len(jobs) == 1:
                self._give_up(error, jobs)
                return []
            return [pair for job in jobs for pair in self._encode([job], beam)]
        self.metrics.speech.inc(sum(map(len, clips)) / SAMPLE_RATE)
        return [
            (
                job,
                [
                    message | {"parts": [part if isinstance(part, str) else next(embeds) for part in message["parts"]]}
                    for message in job.messages
                ],
            )
            for job in jobs
        ]

    def _read_out(self, job: Job, messages: list[dict[str, Any]]) -> Request | None:
        """End the job with the read-out; there is nothing to decode."""
        clips = [part for part in messages[-1]["parts"] if isinstance(part, AudioEmbeds)]
        job.report(Begun(0, sum(len(clip.vectors) for clip in clips)))
        texts = self.listener.rescore(clips)
        words: list[list[Word]] = []
        if job.starts_at is not None:
            words = times_of_words(self.listener, [Piece(job.starts_at, clip) for clip in _clips(job)], clips, texts)
        self._end(job, Done(text=" ".join(filter(None, texts)), words=tuple(chain.from_iterable(words))))
        return None

    def _request(self, job: Job, messages: list[dict[str, Any]]) -> Request | None:
        """What the decoder gets, with the key/values that are kept; None where the job ended here."""
        clips = [part for part in messages[-1]["parts"] if isinstance(part, AudioEmbeds)]
        if clips and not any(clip.speech for clip in clips):
            job.report(Begun(0, 0))
            self._end(job, Done(sentence=self.listener.model.config.no_speech_sentence))
            return None
        try:
            job.laid = lay_out(self.listener, [_as_message(message) for message in messages])
            request = request_for(self.listener, job.key, job.laid, job.decoding, self._memory)
        except (ContextError, PromptError) as error:
            code = "context_length_exceeded" if isinstance(error, ContextError) else "invalid_prompt"
            self._end(job, ApiError(400, str(error), param="messages", code=code))
            return None
        self.metrics.reused.inc(len(request.prefix) if request.prefix else 0)
        job.report(Begun(len(job.laid.names), sum(isinstance(name, tuple) for name in job.laid.names)))
        return request

    def _dispatch(self, events: list[Event]) -> None:
        for event in events:
            job = self._running.get(event.key)
            if job is None:
                continue
            if not job.ids:
                self.metrics.first_token.observe(time.monotonic() - job.submitted)
            if event.finish != "stop":
                job.ids.append(event.token)
                self.metrics.tokens.inc()
                job.report(Token(event.token))
            if event.finish:
                assert job.laid is not None  # the conversation was laid out before the job joined
                remember(self._memory, job.laid, job.ids, event)
                self._end(job, Done(event.finish))

    def _end(self, job: Job, last: Done | ApiError | None) -> None:
        self._running.pop(job.key, None)
        self._ended += 1
        self.metrics.total.observe(time.monotonic() - job.submitted)
        if last is not None:
            job.report(Failed(last) if isinstance(last, ApiError) else last)

    def _give_up(self, error: Exception, jobs: Sequence[Job]) -> None:
        """Report an error to the jobs concerned; the other jobs continue."""
        log.error("the model failed", exc_info=error)
        refusal = ApiError(500, f"the model failed ({type(error).__name__})", code="internal_error")
        for job in jobs:
            self._end(job, refusal)


def _clips(job: Job) -> list[np.ndarray]:
    return [part for message in job.messages for part in message["parts"] if isinstance(part, np.ndarray)]


def _late() -> ApiError:
    return ApiError(504, "the request's deadline passed", code="deadline_exceeded")


def _as_message(message: dict[str, Any]) -> dict[str, Any]:
    """A message in the form of conversation.py; clips without speech are left out."""
    parts = [part for part in message["parts"] if isinstance(part, str) or part.speech]
    if message["role"] == "user":
        return user_turn(parts)
    return {"role": message["role"], "content": "".join(parts)}


def _sharing_prefixes(requests: list[Request], laid: dict[int, LaidOut | None]) -> list[Request]:
    """The requests; those with equal prefixes share one object, so that the decoder prefills them together."""
    shared: dict[tuple[Hashable, ...], Prefix] = {}
    result = []
    for request in requests:
        if request.prefix is not None:
            names = laid[request.key].names[: len(request.prefix)]  # type: ignore[index, union-attr]
            request = Request(
                request.key, request.embeds, shared.setdefault(names, request.prefix), request.decoding, keep_cache=True
            )
        result.append(request)
    return result
