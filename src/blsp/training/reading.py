"""The examples of each step, read ahead.

In:  a `Run`, and the first step. Out: (step, this rank's micro-batches), one step after another.
Try: ``with closing(step_examples(run, 0)) as steps: next(steps)``
Flow: training/run.py -> **reading.py** (batches.py, examples.py) -> training/loop.py
"""

from collections.abc import Generator, Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np

from blsp.training.batches import Rows, cut, read_ahead
from blsp.training.dataset import Refused
from blsp.training.examples import Example
from blsp.training.run import Run


class Unusable(NamedTuple):
    """A row that turned out not to be learnt from; the fields of the skip list."""

    id: str
    audio: str
    reason: str


def step_examples(run: Run, first: int) -> Generator[tuple[int, list[list[Example]]]]:
    """(step, this rank's micro-batches) from step `first` to the end, read ahead by threads until it is closed."""
    read = partial(_read_example, run)
    with closing(read_ahead(_step_rows(run, first), read, run.settings.readers)) as steps:
        for (step, sizes), rows in steps:
            for row in rows:
                if isinstance(row, Unusable):
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


def _read_example(run: Run, place: tuple[np.void, int]) -> Example | Unusable:
    """The example of a row in an epoch; runs in a thread."""
    row, epoch = place
    try:
        return run.reader.example(row, epoch)
    except Refused as refusal:
        utterance = run.dataset.utterance(row)
        return Unusable(utterance.id, utterance.audio, str(refusal))
