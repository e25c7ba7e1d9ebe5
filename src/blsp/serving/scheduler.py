"""Scheduler of the LLM: one thread in which requests join and leave the batch between two steps.

In:  `Job`s (a conversation, how to decode, a deadline, where to report) from any thread.
Out: reports: `Begun`, tokens, the end, or the error.
Try: `scheduler = Scheduler(listener, limits); scheduler.start(); scheduler.submit(job)`
Flow: exchange.py → job.py → fair_queue.py, hearing.py → **scheduler.py** → inference/conversation.py, llm/decoding.py

Clients take turns in the queue (fair_queue.py). If it is full, `submit` refuses with 429. Only a few jobs join between
two steps, and only a piece of a long prompt is run, so that new jobs do not delay the running answers. Clips are
encoded in other threads (hearing.py). The key/values of finished conversations are kept (`Memory`), so that the next
turn runs only its new part. One turn of the thread:

    remove cancelled and late jobs → prefill encoded jobs, a piece at a time → one token for each running job
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from blsp.distributed import give_back_freed_memory
from blsp.inference.conversation import ContextError, LaidOut, Memory, lay_out, remember, request_for, user_turn
from blsp.inference.listener import Listener
from blsp.llm.decoding import Decoder, Decoding, Event, Request
from blsp.llm.prefix import Prefix
from blsp.llm.prompt import PromptError
from blsp.model.adapter_parts import AudioEmbeds
from blsp.serving.errors import ApiError, late
from blsp.serving.fair_queue import FairQueue
from blsp.serving.hearing import Hearing
from blsp.serving.job import Begun, Done, Failed, Job, Token
from blsp.serving.metrics import Metrics

log = logging.getLogger("blsp.serving")
MAX_JOINING = 4  # requests laid out between two steps
PIECE_SECONDS = 0.25  # of prefill between two steps, during which running answers wait
SHORTEST_PIECE, LONGEST_PIECE = 16, 4096  # positions of a prompt in one piece
LATE_SECONDS = 0.25  # between two checks for late jobs while there is no other work
FREE_MEMORY_EVERY = 64  # unused memory is returned to the system after this many answers
KEPT_POSITIONS = 512  # per kept conversation, on average, so that a few long ones do not fill the memory


@dataclass(frozen=True)
class Limits:
    """Requests in the batch, requests that may wait, and conversations whose key/values are kept."""

    batch: int = 16
    queue: int = 64
    kept: int = 32


class Scheduler:
    """The only thread in which answers are generated."""

    def __init__(self, listener: Listener, limits: Limits, metrics: Metrics | None = None) -> None:
        self.listener, self.limits, self.metrics = listener, limits, metrics or Metrics()
        self._decoder = Decoder(listener.model)
        self._memory = Memory(limits.kept, KEPT_POSITIONS * limits.kept)
        self._waiting: FairQueue[Job] = FairQueue(limits.queue)
        self._running: dict[Hashable, Job] = {}
        self._joining: deque[Request] = deque()  # of running jobs whose prompts are not prefilled
        self._piece = SHORTEST_PIECE  # positions that take about PIECE_SECONDS, estimated from the last piece
        self._changed = threading.Condition()  # its lock is re-entrant
        self.hearing = Hearing(listener, self._waiting, self._changed, self.metrics)
        self._stopping = False
        self._ended = 0
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)

    # --- called from other threads ------------------------------------------------------------------------
    def start(self) -> None:
        self._thread.start()
        self.hearing.start()

    def submit(self, job: Job) -> None:
        """Add `job` to the queue, or raise ApiError (429, 503). If the queue is full, newer jobs of a client with a
        larger share are refused instead."""
        with self._changed:
            for newer in self.check_room(job.client, job.seconds):
                self._waiting.discard(newer)
                newer.cancel()
                self._end(newer, self._queue_full())
            self._waiting.add(job)
            self.metrics.waiting.set(len(self._waiting))
            self._changed.notify_all()

    def check_room(self, client: str, seconds: float = 0.0) -> list[Job]:
        """The jobs that must leave the queue for this much speech; ApiError if it has no room."""
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
        """The refusal, with an estimate of the wait: two seconds for each batch of waiting jobs."""
        retry_after = max(1, 2 * len(self._waiting) // self.limits.batch)
        text = f"too many requests are waiting; try again in {retry_after} s"
        return ApiError(429, text, code="queue_full", retry_after=retry_after)

    def stop(self, seconds: float = 30.0) -> None:
        """Accept no new jobs, finish the accepted ones, and end the thread."""
        with self._changed:
            self._stopping = self.hearing.stopping = True
            self._changed.notify_all()
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
            except Exception as error:  # the running answers are lost; a new decoder serves the next jobs
                self._give_up(error, list(self._running.values()))
                self._decoder = Decoder(self.listener.model)
                self._joining.clear()

    def _wait(self) -> bool:
        """Wait until there is work; False when the server stops and all work is done."""
        with self._changed:
            while not len(self._waiting) and not self._running:
                if self._stopping:
                    return False
                self._changed.wait()
            if not self._running and not any(job.ready for job in self._waiting):
                self._changed.wait(LATE_SECONDS)  # all waiting jobs are being encoded; some may become late
        return True

    def _turn(self) -> None:
        """Remove jobs, add jobs, generate one token for each running job."""
        self._remove_late()
        self._joining.extend(filter(None, map(self._prepare, self._next())))
        if joining := self._prefilled():
            laid = {key: job.laid for key, job in self._running.items()}
            began = time.monotonic()
            events = self._decoder.join(_sharing_prefixes(joining, laid))
            if not self._joining:  # far into a long prompt a position takes longer than in one that passes it
                self._set_piece(sum(len(request.embeds) for request in joining), time.monotonic() - began)
            self._dispatch(events)
        if len(self._decoder):
            self.metrics.steps.inc()
            self._dispatch(self._decoder.step())
        self.metrics.running.set(len(self._running))
        self.hearing.busy = bool(self._running)
        if self._ended >= FREE_MEMORY_EVERY:
            self._ended = 0
            give_back_freed_memory()

    def _remove_late(self) -> None:
        """Remove cancelled jobs and those past their deadline, from the queue and from the batch."""
        with self._changed:
            over = [job for job in self._waiting if job.over]
            for job in over:
                self._waiting.discard(job)
            self.metrics.waiting.set(len(self._waiting))
        over += [job for job in self._running.values() if job.over]
        for job in over:
            self._decoder.leave(job.key)
            self._end(job, None if job.cancelled else late())
        self._joining = deque(request for request in self._joining if request.key in self._running)

    def _next(self) -> list[Job]:
        """The next jobs whose clips are encoded, as many as may join now."""
        free = min(self.limits.batch - len(self._running), MAX_JOINING)
        with self._changed:
            taken = list(islice((job for job in self._waiting if job.ready), free))
            for job in taken:
                self._waiting.take(job)
            self.metrics.waiting.set(len(self._waiting))
        self._running |= {job.key: job for job in taken}
        return taken

    def _prefilled(self) -> list[Request]:
        """The requests that join now: the next ones whose prompts fit into one piece together. Of a longer prompt one
        piece is run, then it goes to the end of the line; so short ones overtake it, and running answers wait for only
        one piece."""
        if not self._joining:
            return []
        joining, room = [self._joining.popleft()], self._piece
        if len(joining[0].embeds) > room:
            began = time.monotonic()
            self._joining.append(self._decoder.begin(joining[0], room))
            self._set_piece(room, time.monotonic() - began)
            return []
        room -= len(joining[0].embeds)
        while self._joining and len(self._joining[0].embeds) <= room:
            room -= len(self._joining[0].embeds)
            joining.append(self._joining.popleft())
        return joining

    def _set_piece(self, positions: int, seconds: float) -> None:
        """Set the size of the next piece from the time of the last: smaller on a slow machine and late in a prompt.

        A pass has a fixed cost, so the few positions of a short prompt say little about how many fit: after a pass
        within the time, the size only grows.
        """
        fitting = int(positions * PIECE_SECONDS / max(seconds, 1e-6))
        if seconds > PIECE_SECONDS or fitting > self._piece:
            self._piece = min(max(fitting, SHORTEST_PIECE), LONGEST_PIECE)

    def _prepare(self, job: Job) -> Request | None:
        """The job's request for the decoder; None if the job ends here (no speech, a read-out, too long, an error)."""
        try:
            if job.failure:
                raise job.failure
            if not job.readout and not job.hear_only:
                return self._request(job, job.with_embeds())
            self._read_out(job)
        except Exception as error:  # an error in one request is reported to that one only
            self._give_up(error, [job])
        return None

    def _read_out(self, job: Job) -> None:
        """End the job with the read-out, or only with its clips' vectors; nothing is decoded."""
        job.report(Begun(0, sum(len(clip.vectors) for clip in job.heard or ())))
        self._end(job, job.read or Done())

    def _request(self, job: Job, messages: list[dict[str, Any]]) -> Request | None:
        """The decoder's request, after the kept key/values; None if the job ended here."""
        clips = [part for part in messages[-1]["parts"] if isinstance(part, AudioEmbeds)]
        if clips and not any(clip.speech for clip in clips):
            job.report(Begun(0, 0))
            self._end(job, Done(sentence=self.listener.model.config.no_speech_sentence))
            return None
        try:
            job.laid = lay_out(self.listener, [as_message(message) for message in messages])
            decoding = self._shortened(job.decoding, len(job.laid.names)) if job.may_shorten else job.decoding
            request = request_for(self.listener, job.key, job.laid, decoding, self._memory, (job.client, job.sharing))
        except (ContextError, PromptError) as error:
            code = "context_length_exceeded" if isinstance(error, ContextError) else "invalid_prompt"
            self._end(job, ApiError(400, str(error), param="messages", code=code))
            return None
        speech = sum(isinstance(name, tuple) for name in job.laid.names)
        job.report(Begun(len(job.laid.names), speech, reused=len(request.prefix or ())))
        return request

    def _shortened(self, decoding: Decoding, prompt: int) -> Decoding:
        """With at most as many new tokens as the prompt leaves in the LLM's context; `lay_out` has left one."""
        limit = getattr(self.listener.model.config.text_config, "max_position_embeddings", None)
        left = decoding.max_new_tokens if limit is None else max(1, limit - prompt)
        return replace(decoding, max_new_tokens=min(decoding.max_new_tokens, left))

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
                remember(self._memory, job.laid, job.ids, event, (job.client, job.sharing))
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


def as_message(message: dict[str, Any]) -> dict[str, Any]:
    """A message in the form that conversation.py needs, without clips without speech."""
    parts = [part for part in message["parts"] if isinstance(part, str) or part.speech]
    if message["role"] == "user":
        return user_turn(parts)
    return {"role": message["role"], "content": "".join(parts)}


def _sharing_prefixes(requests: list[Request], laid: dict[Hashable, LaidOut | None]) -> list[Request]:
    """The requests; those with equal prefixes share one object, so that the decoder prefills them together."""
    shared: dict[tuple[Hashable, ...], Prefix] = {}
    result = []
    for request in requests:
        if request.prefix is not None:
            names = laid[request.key].names[: len(request.prefix)]  # type: ignore[union-attr]
            request = Request(
                request.key, request.embeds, shared.setdefault(names, request.prefix), request.decoding, keep_cache=True
            )
        result.append(request)
    return result
