"""AnswerLog files: whole batches or nothing, wherever a write was torn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from blsp.continuation.engines import Top, Written
from blsp.continuation.parts import AnswerLog, AnswerReader, done_keys, read_part

K = 2


def written(key: int, steps: int = 3) -> Written:
    ids = np.arange(steps * K, dtype=np.uint32).reshape(steps, K) + 100 * key
    return Written(
        key, f"text {key}", list(range(steps)), "stop", Top(ids, np.full((steps, K), -key, np.float16))
    )


def batch(*keys: int) -> list[Written]:
    return [written(key, steps=key % 3) for key in keys]


def test_answers_come_back_by_key(tmp_path: Path) -> None:
    with AnswerLog(tmp_path, 0, K) as part:
        part.add(batch(5, 1))
    with AnswerLog(tmp_path, 1, K) as part:
        part.add(batch(2))
    answers = AnswerReader(tmp_path, 6, K)
    assert done_keys(tmp_path, 6).tolist() == [False, True, True, False, False, True]
    for key in (5, 1, 2):
        ids, logp = answers.top(key)
        assert answers.fields(key)["text"] == f"text {key}"
        assert ids.tolist() == batch(key)[0].top.ids.tolist() and (logp == -key).all()


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.3, 0.5, 0.9, 0.99])
def test_a_torn_batch_is_written_again(tmp_path: Path, fraction: float) -> None:
    """Whatever is left of the second batch's lines, going on ends in the same bytes."""
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    for folder in (whole, torn):
        folder.mkdir()
        with AnswerLog(folder, 0, K) as part:
            part.add(batch(5, 1))
            kept = part.path.stat().st_size
            part.add(batch(2, 4, 3))
    size = (torn / "part-00000.jsonl").stat().st_size
    with open(torn / "part-00000.jsonl", "r+b") as file:
        file.truncate(kept + int((size - kept) * fraction))
    assert done_keys(torn, 6).sum() == 2
    with AnswerLog(torn, 0, K) as part:
        part.add(batch(2, 4, 3))
    for name in ("part-00000.jsonl", "part-00000.ids.u32", "part-00000.logp.f16"):
        assert (whole / name).read_bytes() == (torn / name).read_bytes()


def test_lines_of_zeros_after_a_power_cut_are_not_records(tmp_path: Path) -> None:
    with AnswerLog(tmp_path, 0, 0) as part:
        part.add([Written(0, "a", [1], "stop")])
    with open(tmp_path / "part-00000.jsonl", "ab") as file:
        file.write(b"\0" * 64 + b"\n")
    assert [record.fields["key"] for record in read_part(tmp_path / "part-00000.jsonl")] == [0]
