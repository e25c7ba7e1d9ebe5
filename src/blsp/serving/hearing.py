"""Threads that encode the clips of waiting jobs, beside the thread of the model.

In:  jobs in the queue whose clips are not encoded yet. Out: `Job.heard`, and `Job.read` for a read-out, or
     `Job.failure`.
Try: `Hearing(listener, queue, changed, metrics).hear([job])`
Flow: fair_queue.py → **hearing.py** (mel, encoder, adapter, read-out) → scheduler.py

One thread encodes recordings of up to `LONG` seconds, a few jobs together. The other one encodes longer recordings, one
by one and at a lower priority. So no running answer and no short question waits for ten minutes of speech.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from blsp.inference.listener import Listener
from blsp.inference.pauses import Piece
from blsp.inference.transcript import times_of_words
from blsp.inference.word_times import Word
from blsp.model.adapter_parts import AudioEmbeds
from blsp.serving.fair_queue import FairQueue
from blsp.serving.job import Done, Job
from blsp.serving.metrics import Metrics

LONG = 30.0  # seconds of speech: one window of the encoder
MAX_TOGETHER = 4  # jobs encoded in one batch
MAX_TOGETHER_SECONDS = 60.0  # of speech among them
NICENESS = 5  # of the thread for long recordings: a third of the processor time if all cores are busy


class NobodyWaits(Exception):
    """The clients have left, or their deadlines have passed."""


class Hearing:
    """The threads. changed: the condition that guards `waiting`; it is notified when jobs are ready.

    busy: whether answers are being generated. The threads then use only half of the cores.
    """

    def __init__(
        self, listener: Listener, waiting: FairQueue[Job], changed: threading.Condition, metrics: Metrics
    ) -> None:
        self.listener, self.metrics = listener, metrics
        self.busy = self.stopping = False
        self._waiting, self._changed = waiting, changed
        self._cores = torch.get_num_threads()

    def start(self) -> None:
        for long in (False, True):
            threading.Thread(target=self._work, args=(long,), name=f"hearing-{long}", daemon=True).start()

    def next(self, long: bool) -> list[Job]:
        """The jobs to encode next, in the order of the queue."""
        jobs: list[Job] = []
        for job in self._waiting:
            if job.ready or job.hearing or job.over or (job.seconds > LONG) != long:
                continue
            seconds = sum(other.seconds for other in jobs) + job.seconds
            if jobs and (len(jobs) == MAX_TOGETHER or seconds > MAX_TOGETHER_SECONDS or job.readout != jobs[0].readout):
                break
            jobs.append(job)
        return jobs

    def hear(self, jobs: list[Job]) -> None:
        """Encode the clips of `jobs` in one batch; if that fails, job by job."""
        clips = [clip for job in jobs for clip in job.clips]
        try:
            readout = jobs[0].readout
            with Interruptible(jobs):
                embeds = iter(self.listener.embed_audio(clips, rescore=readout or None, keep_states=readout))
                heard = [[next(embeds) for _ in job.clips] for job in jobs]
                for job, own in zip(jobs, heard, strict=True):
                    job.read = self._read(job, own) if readout else None
        except NobodyWaits:
            return
        except Exception as error:  # an error in one request is reported to that one only
            if len(jobs) > 1:
                for job in jobs:
                    self.hear([job])
            else:
                jobs[0].failure = error
            return
        self.metrics.speech.inc(sum(job.seconds for job in jobs))
        for job, own in zip(jobs, heard, strict=True):
            job.heard = [replace(clip, states=None) for clip in own]  # last, as it makes the job ready

    def _read(self, job: Job, clips: list[AudioEmbeds]) -> Done:
        """The read-out of the job's clips, and the times of its words if they are wanted."""
        texts = self.listener.readout(clips)
        words: list[list[Word]] = []
        if job.starts_at is not None:
            words = times_of_words(self.listener, [Piece(job.starts_at, clip) for clip in job.clips], clips, texts)
        return Done(text=" ".join(filter(None, texts)), words=tuple(chain.from_iterable(words)))

    def _work(self, long: bool) -> None:
        if long:
            with suppress(OSError, AttributeError):  # systems without priorities of threads
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        while jobs := self._wait(long):
            # more threads than free cores are slow: after each operation all wait for the slowest thread
            torch.set_num_threads(max(1, self._cores // 2) if self.busy or long else self._cores)
            self.hear(jobs)
            with self._changed:
                self._changed.notify_all()

    def _wait(self, long: bool) -> list[Job]:
        """Wait for jobs to encode; none if the server stops and all are encoded."""
        with self._changed:
            while not (jobs := self.next(long)):
                if self.stopping:
                    return []
                self._changed.wait()
            for job in jobs:
                job.hearing = True
        return jobs


class Interruptible(TorchFunctionMode):
    """Raises NobodyWaits before the next tensor operation of this thread, if all jobs are over."""

    def __init__(self, jobs: list[Job]) -> None:
        super().__init__()
        self._jobs = jobs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        restores = func is torch._C._set_grad_enabled  # as `no_grad` does at its end: it must not be kept from it
        if not restores and all(job.over for job in self._jobs):
            raise NobodyWaits
        return func(*args, **(kwargs or {}))
