"""Order of the data: the rows of each step, and its micro-batches; and their examples, read ahead.

In:  the number of rows of each data file and its weight, the rows' lengths, and the step's number.
Out: `DataOrder.steps(first)`: the rows of each step; `cut`: rows as micro-batches under a budget of positions;
     `step_examples`: the examples of each step, read by threads before they are needed.
Try: ``next(DataOrder(files=(DataFile(0, 100),), batch_size=8, seed=0).steps(3, lengths_of))``
Flow: training/run.py, examples.py -> **batches.py** -> training/loop.py

An epoch is a pure function of (seed, epoch) and the lengths, so any step can be the first:

    rows of the epoch   [block][block][block] ...   blocks of 32 neighbours, in random order
    window of 128 steps [.........................] its rows are shuffled, sorted by length, cut into steps
    steps of the window in random order

So clips of similar length are in one step (docs/training.md says what that costs), a large cache is read almost in
sequence, and memory does not grow with the number of rows. The rows of a step depend only on `batch_size`; the budget
of positions and the number of processes change only rounding (law 5).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from blsp.distributed import Runtime
from blsp.training.dataset import Refused
from blsp.training.examples import Example

if TYPE_CHECKING:
    from blsp.training.run import Run

BLOCK = 32  # neighbouring rows that stay together in a window, for sequential reading
READ_AHEAD = 4  # rows begun before they are needed, for each thread
WINDOW_STEPS = 128  # steps in a window; more steps mean better sorting, but less sequential reading

Rows = NDArray[np.int64]
LengthsOf = Callable[[Rows], NDArray[np.integer]]
Key = TypeVar("Key")
Row = TypeVar("Row")
Item = TypeVar("Item")


@dataclass(frozen=True)
class DataFile:
    """One file: rows `start` to `start + count` of the dataset; an epoch takes `weight` times as many rows.

    weight 0.5: half of them in one epoch, the other half in the next; 2: each of them twice.
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
        """The dataset's rows of step `first` (from 0) and of all later steps, without end; shortest row first."""
        epoch, step = divmod(first, self.steps_per_epoch)
        window, begun = divmod(step, WINDOW_STEPS)
        while True:
            yield from _window_steps(self, epoch, window, lengths_of)[begun:]
            window, begun = window + 1, 0
            if window * WINDOW_STEPS >= self.steps_per_epoch:
                epoch, window = epoch + 1, 0


def _window_steps(order: DataOrder, epoch: int, window: int, lengths_of: LengthsOf) -> list[Rows]:
    """All steps of one window: similar lengths in a step, steps in random order."""
    generator = np.random.default_rng((order.seed, epoch, window))
    rows = _window_rows(order, epoch, window)
    rows = rows[generator.permutation(len(rows))]  # so that rows of equal length are in random order
    rows = rows[np.argsort(lengths_of(rows), kind="stable")]
    steps = np.array_split(rows, -(-len(rows) // order.batch_size))
    return [steps[i] for i in generator.permutation(len(steps))]


def _window_rows(order: DataOrder, epoch: int, window: int) -> Rows:
    """The dataset's rows of one window of an epoch: a range of the concatenated shuffled blocks.

    Example: 80 rows are blocks 0 (rows 0-31), 1 (32-63) and 2 (64-79). In the order 2, 0, 1 they end at 16, 48 and
    80; the range 40-60 is then the end of block 0 (rows 24-31) and the beginning of block 1 (rows 32-43).
    """
    blocks = -(-order.per_epoch // BLOCK)
    shuffled = np.random.default_rng((order.seed, epoch)).permutation(blocks)
    last_size = order.per_epoch - (blocks - 1) * BLOCK
    ends = np.cumsum(np.where(shuffled == blocks - 1, last_size, BLOCK))

    # Take all blocks that overlap the range, then cut off the rows before its beginning
    size = order.batch_size * WINDOW_STEPS
    begin, end = window * size, min((window + 1) * size, order.per_epoch)
    first, last = np.searchsorted(ends, [begin, end - 1], side="right")
    drawn = [np.arange(b * BLOCK, min((b + 1) * BLOCK, order.per_epoch)) for b in shuffled[first : last + 1]]
    skipped = begin - (int(ends[first - 1]) if first else 0)
    return _dataset_rows(order, epoch, np.concatenate(drawn)[skipped : skipped + end - begin])


def _dataset_rows(order: DataOrder, epoch: int, numbers: Rows) -> Rows:
    """Numbers within an epoch -> rows of the dataset; each file is repeated from its start when it ends."""
    rows = np.empty_like(numbers)
    begin = 0
    for file in order.files:
        end = begin + file.per_epoch
        inside = (numbers >= begin) & (numbers < end)
        rows[inside] = file.start + (numbers[inside] - begin + epoch * file.per_epoch) % max(file.count, 1)
        begin = end
    return rows


def cut(rows: Rows, lengths: NDArray[np.integer], groups: NDArray[np.integer], budget: int) -> list[Rows]:
    """Micro-batches: rows of one group (they share a prefix), at most `budget` positions with padding.

    A row that is longer than the budget is a micro-batch alone. Groups are in the order of their first rows, not of
    their numbers, because rounding and dropout depend on the order of micro-batches.
    """
    batches = []
    _, first = np.unique(groups, return_index=True)
    for group in groups[np.sort(first)]:
        members = np.flatnonzero(groups == group)
        members = members[np.argsort(-lengths[members], kind="stable")]  # longest first: it decides the width
        while len(members):
            fitting = max(1, int(budget // max(1, lengths[members[0]])))
            batches.append(rows[members[:fitting]])
            members = members[fitting:]
    return batches


# --- reading ----------------------------------------------------------------------------------------------
def read_ahead(
    plan: Iterable[tuple[Key, Sequence[Row]]], read: Callable[[Row], Item], threads: int
) -> Generator[tuple[Key, list[Item]]]:
    """Each step of `plan` with its rows read, in order; `threads` read the next ones meanwhile.

    At least one whole step is read ahead. What `read` raises is raised here, at the row's step.

    Why threads and not the worker processes of torch's DataLoader: a thread that waits for storage costs nothing, and
    decoding and spectra let other threads run; nothing is started, sent or left behind (docs/log.md, 2026-11-29).
    """
    steps: deque[tuple[Key, list[Future[Item]]]] = deque()
    begun = 0  # rows of `steps`
    pool = ThreadPoolExecutor(threads, thread_name_prefix="blsp-reader")
    try:
        for key, rows in plan:
            steps.append((key, [pool.submit(read, row) for row in rows]))
            begun += len(rows)
            while len(steps) > 1 and begun - len(steps[0][1]) >= READ_AHEAD * threads:
                key, futures = steps.popleft()
                begun -= len(futures)
                yield key, [future.result() for future in futures]
        for key, futures in steps:
            yield key, [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)


def step_examples(run: Run, first: int) -> Generator[tuple[int, list[list[Example]]]]:
    """(step, this rank's micro-batches) from step `first` to the end, read ahead by threads until it is closed."""
    read = partial(_read_example, run)
    with closing(read_ahead(_step_rows(run, first), read, run.settings.readers)) as steps:
        for (step, sizes), rows in steps:
            for row in rows:
                if not isinstance(row, Example):
                    run.skipped.add(*row)
            left = iter(rows)
            batches = [[row for row in islice(left, size) if isinstance(row, Example)] for size in sizes]
            yield step, [batch for batch in batches if batch]


def _step_rows(run: Run, first: int) -> Iterator[tuple[tuple[int, list[int]], list[tuple[np.void, int]]]]:
    """(step, sizes of this rank's micro-batches) and their rows, each with its epoch."""
    prefix_numbers: dict[tuple[int, ...], int] = {}
    rows_of, reader = run.dataset.rows, run.reader

    def lengths_of(rows: Rows) -> Rows:
        return reader.lengths(rows_of[rows])

    for step, numbers in enumerate(run.order.steps(first, lengths_of), start=first):
        if step >= run.steps:
            return
        rows = rows_of[numbers[run.runtime.rank :: run.runtime.world]]  # this rank's share
        prefixes = [reader.template(row).prefix_ids for row in rows]
        groups = np.array([prefix_numbers.setdefault(ids, len(prefix_numbers)) for ids in prefixes])
        parts = cut(np.arange(len(rows)), reader.lengths(rows), groups, run.settings.batch_tokens)
        epoch = run.order.epoch(step)
        yield (step, list(map(len, parts))), [(row, epoch) for part in parts for row in rows[part]]


def _read_example(run: Run, place: tuple[np.void, int]) -> Example | tuple[str, str, str]:
    """The example of a row in an epoch; if it turns out to be unusable, its id, audio and reason. Runs in a thread."""
    row, epoch = place
    try:
        return run.reader.example(row, epoch)
    except Refused as refusal:
        utterance = run.dataset.utterance(row)
        return utterance.id, utterance.audio, str(refusal)


def pad_micro_batches(batches: list[list[Example]], runtime: Runtime) -> Iterator[list[Example]]:
    """`batches`, then empty ones up to the largest number of any rank, as all ranks run a sharded LLM together."""
    most = torch.tensor(len(batches), device=runtime.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    yield from batches
    yield from ([] for _ in range(int(most) - len(batches)))
