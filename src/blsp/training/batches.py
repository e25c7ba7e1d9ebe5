"""Which rows are learnt from in which step, and in which micro-batches: the position in the data is one
number.

In:  the number of rows of each data file and its weight, the rows' lengths, and the step's number.
Out: `DataOrder.steps(first)`: the rows of each step; `cut`: those rows as micro-batches under a budget of
     positions.
Try: ``next(DataOrder(files=(DataFile(0, 100),), batch_size=8, seed=0).steps(3, lengths_of))``
Flow: training/examples.py -> **batches.py** -> training/loop.py

An epoch is a pure function of (seed, epoch) and the lengths. Blocks of neighbouring rows are shuffled and
laid end to end; windows of them are shuffled row by row, sorted by length and cut into steps, and the steps
of a window are shuffled. So clips of like length meet in a step (little padding), a large cache is read
almost in sequence, and neither memory nor start-up time grows with the number of rows.

What a step learns from depends on `batch_size` alone. The budget of positions and the number of processes
only say how it is cut up, and change nothing but rounding (law 5).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

BLOCK = 32  # neighbouring rows that stay together on their way into a window: one sequential read
WINDOW_STEPS = 128  # steps in a window: the more, the better the sorting and the wider the reads

Rows = NDArray[np.int64]
LengthsOf = Callable[[Rows], NDArray[np.integer]]
Item = TypeVar("Item")


@dataclass(frozen=True)
class DataFile:
    """Rows `start` to `start + count` of the table come from one file; an epoch takes `weight` times as many.

    0.5: half of them in one epoch and the other half in the next; 2: all of them twice.
    """

    start: int
    count: int
    weight: float = 1.0

    @property
    def per_epoch(self) -> int:
        return max(1, round(self.count * self.weight)) if self.count and self.weight > 0 else 0


@dataclass(frozen=True)
class DataOrder:
    """The order of the data."""

    files: tuple[DataFile, ...]
    batch_size: int
    seed: int

    @property
    def per_epoch(self) -> int:
        return sum(file.per_epoch for file in self.files)

    @property
    def steps_per_epoch(self) -> int:
        full, rest = divmod(self.per_epoch, self.batch_size * WINDOW_STEPS)
        return full * WINDOW_STEPS + -(-rest // self.batch_size)

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def steps(self, first: int, lengths_of: LengthsOf) -> Iterator[Rows]:
        """The table rows of step `first` (from 0), of the one after it, and so on without end; shortest row
        first.
        """
        epoch, step = divmod(first, self.steps_per_epoch)
        window, place = divmod(step, WINDOW_STEPS)
        while True:
            yield from _window_steps(self, epoch, window, lengths_of)[place:]
            window, place = window + 1, 0
            if window * WINDOW_STEPS >= self.steps_per_epoch:
                epoch, window = epoch + 1, 0


def _window_steps(plan: DataOrder, epoch: int, window: int, lengths_of: LengthsOf) -> list[Rows]:
    """All steps of one window: like lengths in a step, steps in random order."""
    generator = np.random.default_rng((plan.seed, epoch, window))
    rows = _window_rows(plan, epoch, window)
    rows = rows[generator.permutation(len(rows))]
    rows = rows[np.argsort(lengths_of(rows), kind="stable")]
    steps = np.array_split(rows, -(-len(rows) // plan.batch_size))
    return [steps[i] for i in generator.permutation(len(steps))]


def _window_rows(plan: DataOrder, epoch: int, window: int) -> Rows:
    """The table rows of one window of an epoch: a stretch of the shuffled blocks laid end to end."""
    blocks = -(-plan.per_epoch // BLOCK)
    order = np.random.default_rng((plan.seed, epoch)).permutation(blocks)
    ends = np.cumsum(np.where(order == blocks - 1, plan.per_epoch - (blocks - 1) * BLOCK, BLOCK))
    size = plan.batch_size * WINDOW_STEPS
    begin, end = window * size, min((window + 1) * size, plan.per_epoch)
    first, last = np.searchsorted(ends, [begin, end - 1], side="right")
    drawn = [np.arange(b * BLOCK, min((b + 1) * BLOCK, plan.per_epoch)) for b in order[first : last + 1]]
    skipped = begin - (int(ends[first - 1]) if first else 0)
    return _table_rows(plan, epoch, np.concatenate(drawn)[skipped : skipped + end - begin])


def _table_rows(plan: DataOrder, epoch: int, places: Rows) -> Rows:
    """Places in an epoch -> rows of the table: each file goes round and round at its own pace."""
    rows = np.empty_like(places)
    begin = 0
    for file in plan.files:
        end = begin + file.per_epoch
        inside = (places >= begin) & (places < end)
        rows[inside] = file.start + (places[inside] - begin + epoch * file.per_epoch) % max(file.count, 1)
        begin = end
    return rows


def cut(rows: Rows, lengths: NDArray[np.integer], groups: NDArray[np.integer], budget: int) -> list[Rows]:
    """Micro-batches: rows of one group (they share a prefix), at most `budget` positions with their padding.

    A row that is longer than the budget gets a micro-batch of its own. Groups come in the order of their first
    rows, whatever their numbers are: the order of micro-batches decides roundings and dropout.
    """
    batches = []
    _, first = np.unique(groups, return_index=True)
    for group in groups[np.sort(first)]:
        mine = np.flatnonzero(groups == group)
        mine = mine[np.argsort(-lengths[mine], kind="stable")]  # longest first: it sets the width
        while len(mine):
            fits = max(1, int(budget // max(1, lengths[mine[0]])))
            batches.append(rows[mine[:fits]])
            mine = mine[fits:]
    return batches


def prefetch(items: Iterable[Item], ahead: int) -> Generator[Item]:
    """`items` in their order, made by one thread up to `ahead` in advance; its exception is raised here."""
    ready: queue.Queue[tuple[Item | None, BaseException | None, bool]] = queue.Queue(maxsize=ahead)
    leaving = threading.Event()

    def put(entry: tuple[Item | None, BaseException | None, bool]) -> None:
        while not leaving.is_set():
            try:
                return ready.put(entry, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put((item, None, False))
                if leaving.is_set():
                    return
            put((None, None, True))
        except BaseException as error:  # whatever it is, it belongs to the thread that reads
            put((None, error, True))

    thread = threading.Thread(target=work, name="blsp-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error, ended = ready.get()
            if error is not None:
                raise error
            if ended:
                return
            yield item  # type: ignore[misc]
    finally:
        leaving.set()
        thread.join()
