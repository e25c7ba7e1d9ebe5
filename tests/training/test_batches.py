"""The plan of an epoch: every row as often as its file's weight says, in an order that depends on nothing
else.
"""

import threading
import time
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blsp.training.batches import READ_AHEAD, DataFile, DataOrder, cut, read_ahead


def _lengths_of(rows: np.ndarray) -> np.ndarray:
    return (rows * 7919) % 101 + 5


def _epoch(plan: DataOrder, epoch: int) -> list[np.ndarray]:
    return list(islice(plan.steps(epoch * plan.steps_per_epoch, _lengths_of), plan.steps_per_epoch))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 9), st.integers(0, 5))
def test_an_epoch_takes_every_row_once(count: int, batch_size: int, seed: int) -> None:
    plan = DataOrder((DataFile(0, count),), batch_size, seed)
    steps = _epoch(plan, 1)
    assert sorted(np.concatenate(steps).tolist()) == list(range(count))
    assert all(1 <= len(step) <= batch_size for step in steps)


def test_epochs_differ_and_seeds_differ_and_the_same_is_the_same() -> None:
    plan, other = DataOrder((DataFile(0, 500),), 8, 0), DataOrder((DataFile(0, 500),), 8, 1)
    order = [np.concatenate(_epoch(p, e)).tolist() for p, e in [(plan, 0), (plan, 1), (other, 0), (plan, 0)]]
    assert order[0] == order[3] and order[0] != order[1] and order[0] != order[2]


@pytest.mark.parametrize("count", [7, 300, 2600])
def test_any_step_can_be_the_first(count: int) -> None:
    plan = DataOrder((DataFile(0, count),), 4, 3)
    steps = list(islice(plan.steps(0, _lengths_of), 2 * plan.steps_per_epoch + 3))
    for first in (1, plan.steps_per_epoch - 1, plan.steps_per_epoch, plan.steps_per_epoch + 2):
        np.testing.assert_array_equal(next(plan.steps(first, _lengths_of)), steps[first])


def test_weights_are_kept_over_epochs() -> None:
    plan = DataOrder((DataFile(0, 100), DataFile(100, 90, 1 / 3), DataFile(190, 10, 2.0)), 16, 0)
    counts = np.zeros(200, dtype=int)
    for epoch in range(3):
        np.add.at(counts, np.concatenate(_epoch(plan, epoch)), 1)
    assert (counts[:100] == 3).all() and (counts[100:190] == 1).all() and (counts[190:] == 6).all()


def test_a_window_is_read_in_blocks_and_holds_like_lengths() -> None:
    plan = DataOrder((DataFile(0, 200_000),), 16, 0)
    steps = list(islice(plan.steps(0, _lengths_of), 128))
    lengths = _lengths_of(steps[77])
    assert (np.diff(lengths) >= 0).all() and lengths[-1] - lengths[0] <= 3
    window = np.unique(np.concatenate(steps))
    assert (np.diff(window) == 1).mean() > 0.9


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 90), st.integers(0, 2)), min_size=1, max_size=40), st.integers(20, 300))
def test_cut_keeps_rows_groups_and_budget(rows: list[tuple[int, int]], budget: int) -> None:
    lengths, groups = (np.array(column) for column in zip(*rows, strict=True))
    numbers = np.arange(len(rows)) + 100
    batches = cut(numbers, lengths, groups, budget)
    assert sorted(np.concatenate(batches).tolist()) == numbers.tolist()
    for batch in batches:
        mine = batch - 100
        assert len(set(groups[mine].tolist())) == 1
        assert len(mine) == 1 or lengths[mine].max() * len(mine) <= budget


def test_cut_does_not_depend_on_how_groups_are_numbered() -> None:
    lengths, groups = np.array([3, 9, 4, 9, 5]), np.array([0, 1, 0, 2, 1])
    batches = [batch.tolist() for batch in cut(np.arange(5), lengths, groups, 12)]
    renamed = [batch.tolist() for batch in cut(np.arange(5), lengths, np.array([7, 0, 7, 5, 0]), 12)]
    assert batches == renamed


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_rows_are_read_ahead_in_the_order_of_the_plan(threads: int) -> None:
    plan = [(step, list(range(step, step + step % 4))) for step in range(40)]  # some steps have no rows

    def read(row: int) -> int:
        time.sleep(0.002 * (row % 3 == 0))  # the later one is ready first
        return row * 10

    assert list(read_ahead(plan, read, threads)) == [(step, [row * 10 for row in rows]) for step, rows in plan]


def test_slow_rows_are_read_at_the_same_time_and_only_some_ahead() -> None:
    begun: list[int] = []

    def read(row: int) -> int:
        begun.append(row)
        time.sleep(0.02)
        return row

    started = time.monotonic()
    steps = read_ahead(((step, [2 * step, 2 * step + 1]) for step in range(1000)), read, threads=16)
    assert [rows for _, rows in islice(steps, 40)] == [[2 * step, 2 * step + 1] for step in range(40)]
    assert time.monotonic() - started < 80 * 0.02 / 2  # one thread would take 80 times 20 ms
    steps.close()
    assert 80 <= len(begun) < 80 + 2 * READ_AHEAD * 16


def test_what_a_reader_raises_is_raised_in_its_place_and_the_others_stop() -> None:
    def read(row: int) -> int:
        if row == 3:
            raise KeyError("here")
        return row

    steps = read_ahead(enumerate([[0, 1], [2, 3], [4]]), read, threads=2)
    assert next(steps) == (0, [0, 1])
    with pytest.raises(KeyError, match="here"):
        next(steps)
    endless = read_ahead(((0, [0]) for _ in iter(int, 1)), read, threads=2)
    assert next(endless) == (0, [0])
    began = time.monotonic()
    endless.close()
    assert time.monotonic() - began < 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("blsp-reader")]
