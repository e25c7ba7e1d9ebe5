"""Planned batches, computed by any number of ranks, killed at any moment, gone on with.

In:  a plan, an engine, a folder for what is unfinished.
Out: part files that together answer every prompt of the plan.
Try: see `writer.py` and `scoring.py`, its two users.
Flow: continuation/ — the part that step 1 and `--score-only` share.

Ranks meet through files alone: a wait of hours is longer than a collective's time-out. If a rank dies,
torchrun ends the others; started again, with any number of ranks, the job goes on.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from blsp.continuation.engines import Engine, Prompt
from blsp.continuation.parts import AnswerLog, done_keys
from blsp.continuation.plan import PlannedPrompt, PromptPlan, write_plan
from blsp.continuation.provenance import text_digest
from blsp.distributed import Runtime

WAIT = 0.5  # seconds between two looks for what another rank writes


def open_plan(
    folder: Path,
    identity: dict[str, Any],
    batch_size: int,
    jobs: Callable[[], Iterable[PlannedPrompt]],
    runtime: Runtime,
) -> PromptPlan:
    """The plan of the job that `identity` describes: written by rank 0, awaited by the others."""
    stamp, home = text_digest(json.dumps(identity, sort_keys=True)), folder / "plan"
    while not _is_plan_of(home, stamp):
        if runtime.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)  # of a job that got no further than its plan
            folder.mkdir(parents=True)
            return write_plan(home, jobs(), batch_size, {"identity": stamp})
        time.sleep(WAIT)
    return PromptPlan(home)


def _is_plan_of(home: Path, stamp: str) -> bool:
    return (home / "state.json").exists() and PromptPlan(home).state.get("identity") == stamp


def compute(
    plan: PromptPlan,
    folder: Path,
    runtime: Runtime,
    top_k: int,
    engine: Callable[[], Engine],
    prompt: Callable[[int], Prompt],
) -> None:
    """Answer this rank's batches that are not answered yet. The engine is made only if there are any."""
    finished = folder / f"rank-{runtime.rank}-of-{runtime.world}.done"
    if finished.exists():
        return
    done = done_keys(folder, len(plan))
    mine = range(runtime.rank, plan.batches, runtime.world)
    missing = [number for number in mine if not done[plan.order[number * plan.batch_size]]]
    with AnswerLog(folder, runtime.rank, top_k) as part, _progress(plan, mine, missing, runtime) as progress:
        begun, tokens = time.monotonic(), 0
        if missing:
            for batch in engine().write(_prompts(plan, missing, prompt)):
                part.add(batch)
                tokens += sum(len(written.ids or ()) for written in batch)
                progress.set_postfix_str(f"{tokens / (time.monotonic() - begun):.0f} tokens/s", refresh=False)
                progress.update(len(batch))
    finished.touch()


def await_all(folder: Path, runtime: Runtime) -> None:
    """Rank 0 waits here until every rank has answered its share."""
    markers = [folder / f"rank-{rank}-of-{runtime.world}.done" for rank in range(runtime.world)]
    while not all(marker.exists() for marker in markers):
        time.sleep(WAIT)


def _prompts(plan: PromptPlan, missing: list[int], prompt: Callable[[int], Prompt]) -> Iterator[list[Prompt]]:
    for number in missing:
        yield [prompt(job) for job in plan.batch(number)]


def _progress(plan: PromptPlan, mine: range, missing: list[int], runtime: Runtime) -> tqdm:
    total = sum(len(plan.batch(number)) for number in mine)
    left = sum(len(plan.batch(number)) for number in missing)
    return tqdm(
        total=total, initial=total - left, unit="prompt", disable=runtime.rank != 0, dynamic_ncols=True
    )
