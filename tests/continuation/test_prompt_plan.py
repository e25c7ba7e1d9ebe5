"""The plan: equal prompts once, batches of similar length, decided only by the input. The answers: whole batches."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blsp.continuation.engines import Top, Written
from blsp.continuation.prompt_plan import (
    AnswerReader,
    PromptPlan,
    answer_rows,
    open_answers,
    open_parts,
    read_answers,
    write_plan,
)
from blsp.continuation.requests import PlannedPrompt, PromptSpec, prompt_digest
from blsp.data.files import digest_of
from blsp.data.jobs import Parts

K = 2
SPECS = [PromptSpec("continue", "Continue:", "speech-first"), PromptSpec("repeat", "Repeat:", "instruction-first")]
Row = tuple[int, int, str | None]  # spec, tokens, text; no text: no speech


def planned(rows: list[Row]) -> list[PlannedPrompt]:
    return [
        PlannedPrompt(n, SPECS[spec], tokens, None if text is None else prompt_digest(str(spec), text))
        for n, (spec, tokens, text) in enumerate(rows)
    ]


def random_rows(count: int, texts: int) -> list[Row]:
    draw = random.Random(count)
    kinds = [(draw.randrange(2), draw.randrange(1, 190), str(i)) for i in range(texts)]
    return [draw.choice(kinds) if draw.random() < 0.9 else (0, 5, None) for _ in range(count)]


def numbers(plan: PromptPlan) -> list[int]:
    """The numbers of all prompts in the order in which they are computed."""
    return [number for batch in range(plan.batches) for number, _ in plan.batch(batch)]


# --- the plan ---------------------------------------------------------------------------------------------


def test_equal_prompts_are_one_and_batches_are_sorted(tmp_path: Path) -> None:
    rows = random_rows(1000, 150)
    prompts = planned(rows)
    plan = write_plan(tmp_path / "plan.sqlite", prompts, 16)
    seen: dict[tuple[int, str | None], int] = {}
    firsts = [
        None if text is None else seen.setdefault((spec, text), number) for number, (spec, _, text) in enumerate(rows)
    ]
    assert list(plan.rows()) == list(zip(prompts, firsts, strict=True))
    assert list(plan.firsts()) == firsts
    order = numbers(plan)
    assert sorted(order) == sorted(seen.values()) and plan.prompts == len(order)
    keys = [(prompts[number].spec != prompts[0].spec, -prompts[number].tokens, number) for number in order]
    assert keys == sorted(keys)
    sizes = [len(plan.batch(batch)) for batch in range(plan.batches)]
    assert sizes == [plan.size_of(batch) for batch in range(plan.batches)] and set(sizes[:-1]) == {16}


def test_a_plan_is_a_function_of_its_prompts(tmp_path: Path) -> None:
    prompts = planned(random_rows(300, 50))
    first = write_plan(tmp_path / "one.sqlite", prompts, 8)
    again = write_plan(tmp_path / "two.sqlite", prompts, 8)
    other = write_plan(tmp_path / "three.sqlite", prompts[1:], 8)
    assert first.sha256 == again.sha256 != other.sha256
    assert numbers(PromptPlan(tmp_path / "one.sqlite")) == numbers(again)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(1, 20), st.none() | st.sampled_from("abc")), max_size=30))
def test_any_rows_can_be_planned(tmp_path_factory: pytest.TempPathFactory, rows: list[Row]) -> None:
    plan = write_plan(tmp_path_factory.mktemp("plan") / "plan.sqlite", planned(rows), 4)
    computed = set(numbers(plan))
    assert len(plan) == len(rows)
    assert all(first in computed or first is None for first in plan.firsts())


def test_each_row_may_bring_an_instruction_of_its_own(tmp_path: Path) -> None:
    """More of them than are remembered: the table knows them all."""
    specs = [PromptSpec("continue", f"Do {n % 2000}:", "speech-first") for n in range(4000)]
    prompts = [PlannedPrompt(n, spec, 5, prompt_digest(spec.instruction)) for n, spec in enumerate(specs)]
    plan = write_plan(tmp_path / "plan.sqlite", prompts, 64)
    assert [prompt.spec for prompt, _ in plan.rows()] == specs and plan.prompts == 2000


def test_missing_batches_are_those_of_this_rank_without_answers(tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "plan.sqlite", planned([(0, 5, str(n)) for n in range(22)]), 4)
    done = np.zeros(22, bool)
    done[[number for batch in (0, 3) for number, _ in plan.batch(batch)]] = True
    assert plan.batches == 6 and plan.size_of(5) == 2
    assert plan.missing_batches(done, range(6)) == [1, 2, 4, 5]
    assert plan.missing_batches(done, range(1, 6, 2)) == [1, 5]


def test_digests_do_not_run_together() -> None:
    assert prompt_digest("ab", "c") != prompt_digest("a", "bc") != prompt_digest("a\0b", "c")


# --- answers ----------------------------------------------------------------------------------------------


def batch(*keys: int) -> list[Written]:
    """Answers of 0, 1 or 2 tokens."""
    written = []
    for key in keys:
        steps = key % 3
        ids = np.arange(steps * K, dtype=np.uint32).reshape(steps, K) + 100 * key
        top = Top(ids, np.full((steps, K), -key, np.float16))
        written.append(Written(key, f"text {key}", list(range(steps)), "stop", top))
    return written


def parts_in(folder: Path) -> Parts:
    return open_parts(folder, {}, 0)


def add(parts: Parts, rank: int, written: list[Written]) -> None:
    with open_answers(parts, rank) as log:
        log.append(*answer_rows(written))


def recorded(parts: Parts) -> list[int]:
    return [fields["key"] for path in parts.paths() for _, _, fields in read_answers(path)]


def test_answers_come_back_by_number(tmp_path: Path) -> None:
    parts = parts_in(tmp_path / "parts")
    add(parts, 0, batch(5, 1))
    add(parts, 1, batch(2))
    answers = AnswerReader(parts, 6, K)
    assert recorded(parts) == [5, 1, 2]
    for key in (5, 1, 2):
        ids, logp = answers.top(key)
        assert answers.fields(key)["text"] == f"text {key}"
        assert ids.tolist() == batch(key)[0].top.ids.tolist() and (logp == -key).all()


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.3, 0.5, 0.9, 0.99])
def test_a_torn_batch_is_written_again(tmp_path: Path, fraction: float) -> None:
    """Whatever is left of the second batch's lines, going on ends in the same bytes."""
    whole, torn = parts_in(tmp_path / "whole"), parts_in(tmp_path / "torn")
    for parts in (whole, torn):
        add(parts, 0, batch(5, 1))
        kept = parts.paths()[0].stat().st_size
        add(parts, 0, batch(2, 4, 3))
    (path,) = torn.paths()
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.truncate(kept + int((size - kept) * fraction))
    assert recorded(torn) == [5, 1]
    add(torn, 0, batch(2, 4, 3))
    assert whole.paths()[0].read_bytes() == torn.paths()[0].read_bytes()


def test_zeros_after_a_power_cut_are_not_answers(tmp_path: Path) -> None:
    parts = parts_in(tmp_path / "parts")
    add(parts, 0, [Written(0, "a", [1], "stop")])
    with open(parts.paths()[0], "ab") as file:
        file.write(b"\0" * 64 + b"\n")
    assert recorded(parts) == [0]
    add(parts, 0, [Written(1, "b", None, "length", refused="no")])
    assert recorded(parts) == [0, 1]


@pytest.mark.parametrize("facts", [{"seed": 1}, {"seed": 2}])
def test_answers_of_version_0_1_are_kept_where_the_job_is_the_same(tmp_path: Path, facts: dict) -> None:
    """Its plan was a folder that named the job; its answers were written as today."""
    plan = tmp_path / "parts" / "plan"
    plan.mkdir(parents=True)
    (plan / "state.json").write_text(json.dumps({"identity": digest_of({"seed": 1})}))
    answer = {"key": 4, "left": 0, "text": "a", "ids": [1], "finish": "stop"}
    (plan.parent / "part-00000.jsonl").write_text(json.dumps(answer) + "\n")
    parts = open_parts(plan.parent, facts, 0)
    assert recorded(parts) == ([4] if facts == {"seed": 1} else []) and not plan.exists()


def test_answers_whose_top_k_lies_apart_are_computed_again(tmp_path: Path) -> None:
    """Earlier versions kept it in two files beside the log, and rank 0 may have been done."""
    parts = parts_in(tmp_path / "parts")
    answer = {"key": 4, "left": 0, "text": "a", "ids": [1], "finish": "stop", "top": [0, 2]}
    (parts.folder / "part-00000.jsonl").write_text(json.dumps(answer) + "\n")
    (parts.folder / "part-00000.ids.u32").write_bytes(bytes(16))
    parts.finish(0, 1)
    parts = parts_in(tmp_path / "parts")
    assert recorded(parts) == [] and not parts.is_finished(0, 1)
    add(parts, 0, batch(4))
    parts = parts_in(tmp_path / "parts")
    assert recorded(parts) == [4] and len(AnswerReader(parts, 5, K).top(4)[0]) == 1
