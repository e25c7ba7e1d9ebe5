"""Law 13: rows of one group are never on both sides of a split; a group is what one recording or one text joins."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import tiny_tokenizer
from support.training_examples import write_data

from blsp.data.jobs import SkippedLog
from blsp.data.manifest import Utterance
from blsp.distributed import find_runtime
from blsp.training.dataset import (
    Dataset,
    choose_groups,
    group_keys,
    group_rows,
    learnt_from,
    open_dataset,
    open_sources,
)
from blsp.training.examples import RowMeasurer, RowTexts, Targets


def _dataset(path: Path, folder: Path, hold_out: int) -> Dataset:
    measurer = RowMeasurer(Targets(frozenset({"continuation"})), RowTexts(tiny_tokenizer(), 2, "nothing"))
    with SkippedLog(folder / "run") as skipped:
        return open_dataset(open_sources([str(path)]), measurer, folder, skipped, hold_out, find_runtime("cpu"))


def _write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def rows(tmp_path: Path) -> list[dict]:
    """Forty rows with texts of their own, as `blsp continue` writes them."""
    lines = write_data(tmp_path, rows=40).read_text().splitlines()
    return [json.loads(line) | {"text": f"text number {number}"} for number, line in enumerate(lines)]


def _sides(dataset: Dataset, name: str) -> tuple[set[str], set[str]]:
    """The values of a field of the rows that are learnt from, and of those that are held out."""
    learnt, held_out = (
        {str(getattr(dataset.utterance(row), name)) for row in part} for part in (dataset.rows, dataset.held_out)
    )
    return learnt, held_out


def test_augmented_copies_and_other_behaviours_are_held_out_together(tmp_path: Path, rows: list[dict]) -> None:
    copies = [row | {"id": f"{row['id']}/augmented-{seed}", "text": ""} for row in rows for seed in (1, 2)]
    repeats = [row | {"behaviour": "repeat", "instruction": "repeat"} for row in rows]
    path = _write(tmp_path / "continued.jsonl", [*rows, *copies, *repeats])
    dataset = _dataset(path, tmp_path, hold_out=3)
    learnt, held_out = _sides(dataset, "id")
    recordings = [{id.split("/augmented-")[0] for id in side} for side in (learnt, held_out)]
    assert len(recordings[1]) == 3 and len(dataset.held_out) == 3 * 4
    assert not recordings[0] & recordings[1] and len(dataset.rows) == 37 * 4


def test_one_text_is_on_one_side_whoever_says_it(tmp_path: Path, rows: list[dict]) -> None:
    for number, row in enumerate(rows):  # ten texts, four voices, written a little differently
        row["text"] = [f"Text number {number % 10}.", f"text  number {number % 10}"][number % 2]
    others = [row | {"id": f"filler-{number}", "text": f"other {number}"} for number, row in enumerate(rows * 9)]
    dataset = _dataset(_write(tmp_path / "continued.jsonl", rows + others), tmp_path, hold_out=30)
    words = [{" ".join(text.lower().strip(".").split()) for text in side} for side in _sides(dataset, "text")]
    assert not words[0] & words[1]
    assert any(text.startswith("text number") for text in words[1])


def test_the_manifest_s_own_groups_win(tmp_path: Path, rows: list[dict]) -> None:
    for number, row in enumerate(rows):
        row |= {"group": f"speaker-{number // 2}", "text": "the same text"}
    dataset = _dataset(_write(tmp_path / "continued.jsonl", rows), tmp_path, hold_out=2)
    groups = [{dataset.utterance(row).extra["group"] for row in part} for part in (dataset.rows, dataset.held_out)]
    assert len(groups[1]) == 2 and len(dataset.held_out) == 4 and not groups[0] & groups[1]


def test_a_clip_without_speech_is_not_learnt_from_where_its_group_is_held_out(tmp_path: Path, rows: list[dict]) -> None:
    pauses = [row | {"id": f"{row['id']}-pause", "text": "", "no_speech": True} for row in rows]
    for row, pause in zip(rows, pauses, strict=True):
        row["group"] = pause["group"] = f"recording of {row['id']}"
    dataset = _dataset(_write(tmp_path / "continued.jsonl", rows + pauses), tmp_path, hold_out=4)
    learnt, held_out = _sides(dataset, "id")
    assert len(held_out) == 4 and not any(id.endswith("-pause") for id in held_out)
    assert len(learnt) == 2 * 36 and not {f"{id}-pause" for id in held_out} & learnt


def test_at_most_a_tenth_of_the_groups_and_of_the_rows_is_held_out(tmp_path: Path, rows: list[dict]) -> None:
    path = _write(tmp_path / "continued.jsonl", rows)
    assert len(_dataset(path, tmp_path / "a", hold_out=64).held_out) == 4
    path = _write(tmp_path / "continued.jsonl", rows[:9])
    assert len(_dataset(path, tmp_path / "b", hold_out=64).held_out) == 0
    for row in rows[:36]:  # a text that most clips share is never held out
        row["text"] = "yes"
    for name, hold_out in (("c", 1), ("d", 64)):
        dataset = _dataset(_write(tmp_path / "continued.jsonl", rows), tmp_path / name, hold_out)
        assert _sides(dataset, "text")[1] <= {f"text number {number}" for number in range(36, 40)}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12), st.booleans()), min_size=1, max_size=60))
def test_no_chain_of_shared_keys_crosses_the_split(rows: list[tuple[int, int, bool]]) -> None:
    recordings, texts, silent = (np.array(column) for column in zip(*rows, strict=True))
    groups = group_rows(recordings.astype(np.uint64), texts.astype(np.uint64))
    chosen = choose_groups(groups, silent, hold_out=4)
    for keys in (recordings, texts):
        for key in set(keys.tolist()):
            sides = chosen[keys == key]
            assert sides.all() or not sides.any()
    # groups are no larger than necessary: as many as if sets that share a recording or text are joined one by one
    joined = [{row} for row in range(len(rows))]
    for keys in (recordings, texts):
        for key in set(keys.tolist()):
            touched = [part for part in joined if any(keys[row] == key for row in part)]
            joined = [part for part in joined if part not in touched] + [set().union(*touched)]
    assert len(joined) == len(set(groups.tolist()))


def test_the_split_does_not_depend_on_the_order_of_the_rows_nor_on_other_rows_much() -> None:
    rows = [Utterance(id=f"clip-{number}", audio="a.wav", text=f"text {number}") for number in range(50)]
    kept = {row.id for row in learnt_from(rows, hold_out=3)}
    assert {row.id for row in learnt_from(rows[::-1], hold_out=3)} == kept and len(kept) == 47
    more = [*rows, Utterance(id="clip-50", audio="a.wav", text="text 50")]
    assert len(kept - {row.id for row in learnt_from(more, hold_out=3)}) <= 1


def test_a_row_without_a_text_is_its_recording_s() -> None:
    first, copy, other = (group_keys(Utterance(id=id, audio="a.wav", text="")) for id in ("a", "a/augmented-1", "b"))
    assert first == copy and set(first).isdisjoint(other)


def test_words_that_differ_in_a_vowel_sign_are_other_texts() -> None:
    texts = ("दिन", "दान", " दिन! ")
    first, other, same = (group_keys(Utterance(id=text, audio="a.wav", text=text))[1] for text in texts)
    assert first == same != other
