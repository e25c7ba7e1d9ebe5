"""The sorted table finds what was written, however keys collide, and replaces its outdated self."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blsp.features import sorted_table
from blsp.features.sorted_table import KEY, Table, merged_table, read_log

RECORD = np.dtype([*KEY, ("value", "<u4")])


def key_of(high: int, low: int) -> bytes:
    return np.array([high, low], dtype="<u8").tobytes()


def records_of(keys: list[tuple[int, int]]) -> np.ndarray:
    return np.array([(high, low, number) for number, (high, low) in enumerate(keys)], dtype=RECORD)


def table_of(folder: Path, logs: list[np.ndarray], looks: str = "") -> Table:
    return merged_table(folder, "index", lambda: logs, RECORD, [looks])


few = st.integers(0, 5)
any_ = st.integers(0, 2**64 - 1)
KEYS = st.lists(st.tuples(few, few) | st.tuples(any_, any_) | st.tuples(any_, few), max_size=60)


@given(written=KEYS, asked=KEYS, cut=st.integers(0, 60))
def test_it_finds_what_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    written: list[tuple[int, int]],
    asked: list[tuple[int, int]],
    cut: int,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sorted_table, "CHUNK", 7)
        patch.setattr(sorted_table, "BUCKET", 5)
        folder = tmp_path_factory.mktemp("table")
        table = table_of(folder, [records_of(written[:cut]), records_of(written[cut:])])
        assert len(table) == len(set(written))
        everything = [*written, *asked]
        places = table.find([key_of(*key) for key in everything])
        for key, place in zip(everything, places, strict=True):
            if key in written:
                assert tuple(table.records[place])[:2] == key
            else:
                assert place == -1
        assert {path.name for path in folder.iterdir()} == {next(folder.iterdir()).name}, (
            "nothing is left over"
        )


def test_it_is_made_once_for_the_same_logs(tmp_path: Path) -> None:
    table_of(tmp_path, [records_of([(1, 2)])], "a")

    def fail() -> list[np.ndarray]:
        raise AssertionError("merged again")

    again = merged_table(tmp_path, "index", fail, RECORD, ["a"])
    assert again.find([key_of(1, 2)]).tolist() == [0]
    newer = table_of(tmp_path, [records_of([(1, 2), (3, 4)])], "b")
    assert len(newer) == 2 and len(list(tmp_path.iterdir())) == 1, "the outdated one is gone"
    assert again.records["low"].tolist() == [2], "who has it open keeps it"


def test_a_torn_last_record_does_not_count(tmp_path: Path) -> None:
    log = tmp_path / "log"
    content = records_of([(1, 2), (3, 4)]).tobytes()
    for size in range(len(content) + 1):
        log.write_bytes(content[:size])
        assert len(read_log(log, RECORD)) == size // RECORD.itemsize
