"""The plan: equal prompts once, batches of like length, bounded memory; the input alone decides it."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blsp.continuation import plan as planning
from blsp.continuation.plan import (
    NO_SPEECH,
    PlanError,
    PlannedPrompt,
    PromptPlan,
    PromptSpec,
    prompt_digest,
    write_plan,
)

ASKS = [
    PromptSpec("continue", "Continue:", "speech-first"),
    PromptSpec("repeat", "Repeat:", "instruction-first"),
]


def jobs_of(rows: list[tuple[int, int, str | None]]) -> list[PlannedPrompt]:
    """(ask, tokens, text) -> jobs; text None: no speech."""
    return [
        PlannedPrompt(n, ASKS[ask], tokens, None if text is None else prompt_digest(str(ask), text))
        for n, (ask, tokens, text) in enumerate(rows)
    ]


def random_rows(count: int, texts: int) -> list[tuple[int, int, str | None]]:
    draw = random.Random(count)
    kinds = [(draw.randrange(2), draw.randrange(1, 190), str(i)) for i in range(texts)]
    return [draw.choice(kinds) if draw.random() < 0.9 else (0, 5, None) for _ in range(count)]


def test_equal_prompts_are_one_and_batches_are_sorted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "ROWS_AT_A_TIME", 64)  # several shares and blocks
    rows = random_rows(1000, 150)
    plan = write_plan(tmp_path / "plan", jobs_of(rows), 16, {})
    seen: dict[tuple[int, str | None], int] = {}
    for number, (ask, _, text) in enumerate(rows):
        expected = NO_SPEECH if text is None else seen.setdefault((ask, text), number)
        assert plan.jobs["first"][number] == expected
    order = [int(job) for batch in range(plan.batches) for job in plan.batch(batch)]
    assert sorted(order) == sorted(seen.values())
    keys = [(int(plan.jobs["ask"][job]), -int(plan.jobs["tokens"][job]), job) for job in order]
    assert keys == sorted(keys)
    assert all(len(plan.batch(n)) == 16 for n in range(plan.batches - 1))


def test_a_plan_is_a_function_of_its_jobs(tmp_path: Path) -> None:
    rows = random_rows(300, 50)
    first = write_plan(tmp_path / "one", jobs_of(rows), 8, {})
    again = write_plan(tmp_path / "two", jobs_of(rows), 8, {})
    other = write_plan(tmp_path / "three", jobs_of(rows[1:]), 8, {})
    assert first.state["sha256"] == again.state["sha256"] != other.state["sha256"]
    assert np.array_equal(PromptPlan(tmp_path / "one").jobs, again.jobs)


@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.integers(1, 20), st.none() | st.sampled_from("abc")), max_size=30
    )
)
def test_any_rows_can_be_planned(tmp_path_factory: pytest.TempPathFactory, rows: list) -> None:
    plan = write_plan(tmp_path_factory.mktemp("plan") / "plan", jobs_of(rows), 4, {})
    answered = {job for batch in range(plan.batches) for job in plan.batch(batch)}
    assert len(plan) == len(rows)
    assert all(int(job["first"]) in answered or job["first"] == NO_SPEECH for job in plan.jobs)


def test_digests_do_not_run_together() -> None:
    assert prompt_digest("ab", "c") != prompt_digest("a", "bc") != prompt_digest("a\0b", "c")


def test_a_prompt_past_the_limit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="9000 tokens"):
        write_plan(tmp_path / "plan", [PlannedPrompt(0, ASKS[0], 9000, b"0" * 16)], 4, {})
    assert not (tmp_path / "plan").exists()
