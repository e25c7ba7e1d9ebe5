"""Queue of waiting requests, in which clients take turns.

In:  jobs, each with its client: the name of an API key, or an address.
Out: the same jobs in the order in which they are served; for a full queue, the jobs that must leave it.
Try: `queue.add(job); next(iter(queue))`
Flow: app.py → **fair_queue.py** in scheduler.py

Each client has its own line. A client that was just served comes after all others:

    arrived   a1 a2 a3 a4 b1 c1      served   a1 b1 c1 a2 a3 a4

A full queue is shared in the same way: the newest job of the client with the largest share leaves it, if the new
client's share would still be smaller.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from itertools import chain, zip_longest
from typing import Generic, Protocol, TypeVar

QUEUED_SECONDS = 30.0  # of speech per job that may wait: the limit of the whole queue


class Waiting(Protocol):
    """The fields of a job that the queue needs. seconds: of its speech."""

    client: str
    cancelled: bool

    @property
    def seconds(self) -> float: ...


T = TypeVar("T", bound=Waiting)


class FairQueue(Generic[T]):
    """At most `most` jobs, and `QUEUED_SECONDS` of speech for each of them; not safe between threads."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lines: OrderedDict[str, deque[T]] = OrderedDict()  # by client; the next one in turn is first

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[T]:
        """The jobs in the order in which they are served."""
        rounds = chain.from_iterable(zip_longest(*self._lines.values()))
        return iter([job for job in rounds if job is not None])

    def add(self, job: T) -> None:
        self._lines.setdefault(job.client, deque()).append(job)

    def take(self, job: T) -> None:
        """Remove a job that is served now; its client gets the last turn."""
        self._lines.move_to_end(job.client)
        self.discard(job)

    def discard(self, job: T) -> None:
        """Remove a job that is not served."""
        line = self._lines[job.client]
        line.remove(job)
        if not line:
            del self._lines[job.client]

    def making_room(self, client: str, seconds: float) -> list[T] | None:
        """The jobs that must leave for one more job of `client` with this much speech; None if it cannot be added.

        An empty queue takes any amount.
        """
        waiting = [job for job in self if not job.cancelled]
        shares: dict[str, float] = defaultdict(float)
        for job in waiting:
            shares[job.client] += self._share(job.seconds)
        own = shares[client] + self._share(seconds)
        yielding: list[T] = []
        while waiting and self._is_full(waiting, seconds):
            busiest = max(shares, key=shares.__getitem__)
            if shares[busiest] <= own:
                return None
            newest = [job for job in waiting if job.client == busiest][-1]
            waiting.remove(newest)
            shares[busiest] -= self._share(newest.seconds)
            yielding.append(newest)
        return yielding

    def _is_full(self, waiting: list[T], seconds: float) -> bool:
        speech = sum(job.seconds for job in waiting)
        return len(waiting) >= self._most or (speech > 0 and speech + seconds > QUEUED_SECONDS * self._most)

    def _share(self, seconds: float) -> float:
        """A job's share of the queue: of its places plus of its speech."""
        return (1 + seconds / QUEUED_SECONDS) / self._most
