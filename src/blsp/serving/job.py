"""One answer to generate, and the reports about it.

In:  messages with decoded clips, how to decode, a deadline, a client.
Out: reports: `Begun`, `Token`s, `Done` or `Failed`.
Try: `Job(messages, decoding, reports.append, deadline=time.monotonic() + 60)`
Flow: exchange.py → **job.py** → fair_queue.py, hearing.py, scheduler.py and back
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import Any

import numpy as np

from blsp.data.audio import SAMPLE_RATE
from blsp.inference.conversation import LaidOut
from blsp.inference.word_times import Word
from blsp.llm.decoding import Decoding
from blsp.model.adapter_parts import AudioEmbeds
from blsp.serving.errors import ApiError


@dataclass(frozen=True)
class Begun:
    """The prompt is accepted. prompt: its positions; speech: positions of speech; reused: positions from the memory."""

    prompt: int
    speech: int
    reused: int = 0


@dataclass(frozen=True)
class Token:
    token: int


@dataclass(frozen=True)
class Done:
    """finish: "stop" or "length". sentence: the no-speech sentence, if no speech was found. text: a read-out.
    words: of the read-out, with times, if requested."""

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
    client: an API key's name or an address. sharing: key/values are shared only between jobs of the same client with
    the same value. starts_at: seconds at which the clip of a read-out begins in its recording; None: the times of its
    words are not needed. hear_only: the job ends when its clips are encoded (`with_embeds`).
    may_shorten: the answer gets the positions that the prompt leaves in the LLM's context, where they are fewer than
    max_new_tokens; otherwise such a job is refused.

    hearing: a thread has taken its clips. heard: their vectors, in order; read: their read-out, if requested;
    failure: why there are none.
    """

    messages: Sequence[dict[str, Any]]
    decoding: Decoding
    report: Callable[[Report], None]
    deadline: float  # of time.monotonic()
    readout: bool = False
    client: str = ""
    starts_at: float | None = None
    sharing: str = ""
    hear_only: bool = False
    may_shorten: bool = False
    key: int = field(default_factory=count().__next__)
    submitted: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    hearing: bool = False
    heard: list[AudioEmbeds] | None = None
    read: Done | None = None
    failure: Exception | None = None
    laid: LaidOut | None = None
    ids: list[int] = field(default_factory=list)

    @cached_property
    def clips(self) -> list[np.ndarray]:
        return [part for message in self.messages for part in message["parts"] if isinstance(part, np.ndarray)]

    @cached_property
    def seconds(self) -> float:
        """Seconds of speech to encode."""
        return sum(map(len, self.clips)) / SAMPLE_RATE

    @property
    def ready(self) -> bool:
        """Whether all its clips are encoded."""
        return not self.clips or self.heard is not None or self.failure is not None

    @property
    def over(self) -> bool:
        """Whether nobody waits for the answer: the job is cancelled or late."""
        return self.cancelled or time.monotonic() > self.deadline

    def with_embeds(self) -> list[dict[str, Any]]:
        """The messages with vectors in the place of the clips."""
        embeds = iter(self.heard or ())
        return [
            message | {"parts": [part if isinstance(part, str) else next(embeds) for part in message["parts"]]}
            for message in self.messages
        ]

    def cancel(self) -> None:
        """Ask the scheduler to remove the job at the next step."""
        self.cancelled = True
