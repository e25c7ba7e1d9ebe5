"""The whole of step 1's work, fixed before the first token: what is asked, what is equal, what goes together.

In:  jobs in output order, one an output row (from a manifest, or from finished continuations to be scored).
Out: a folder with the jobs, the first job of each group of equal prompts, and the order in which prompts are
     computed; batch b is prompts [b·B, (b+1)·B) of that order, for good.
Try: `plan = PromptPlan(Path("out.parts/plan")); len(plan), plan.batches, plan.batch(0)`
Flow: continuation/ — rank 0 writes it, every rank reads it. Arrays are files: 10⁷ rows cost disk, not memory.

Prompts are ordered by what is asked (so that a batch shares its prefix), then longest first (so that a batch
holds rows of like length, and what does not fit into memory shows at once).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blsp.llm.prompt import Order

JOB = np.dtype([("row", "<i8"), ("ask", "<i4"), ("tokens", "<i4"), ("prompt", "<u8", (2,)), ("first", "<i8")])
NO_SPEECH = -1  # in `first`: the row is answered by rule, without the LLM
ROWS_AT_A_TIME = 1 << 19
ASK_BITS, TOKEN_BITS, JOB_BITS = 20, 13, 31  # of the sort key: ask | longest first | job


@dataclass(frozen=True)
class PromptSpec:
    """What the LLM is asked to do with a transcript."""

    behaviour: str
    instruction: str
    order: Order


@dataclass(frozen=True)
class PlannedPrompt:
    """One output row. digest: 16 bytes that are equal for equal prompts; None for a no-speech row."""

    row: int
    ask: PromptSpec
    tokens: int
    digest: bytes | None


class PlanError(ValueError):
    """More work than one plan can hold; the message says which limit was met."""


def prompt_digest(*fields: str) -> bytes:
    """16 bytes that name a prompt: its instruction, order and transcript, and what else makes it differ."""
    return hashlib.blake2b(json.dumps(fields).encode(), digest_size=16).digest()


class PromptPlan:
    """A plan on disk, read through memory maps."""

    def __init__(self, folder: Path) -> None:
        self.state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        asks = json.loads((folder / "asks.json").read_text(encoding="utf-8"))
        self.asks = [PromptSpec(**ask) for ask in asks]
        self.jobs = _open(folder / "jobs.bin", JOB, self.state["jobs"])
        self.order = _open(folder / "order.i64", np.dtype("<i8"), self.state["prompts"])
        self.batch_size = int(self.state["batch_size"])

    def __len__(self) -> int:
        return len(self.jobs)

    @property
    def batches(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def batch(self, number: int) -> list[int]:
        """The jobs that batch `number` answers: each one stands for all that are equal to it."""
        return self.order[number * self.batch_size : (number + 1) * self.batch_size].tolist()


def write_plan(
    folder: Path, jobs: Iterable[PlannedPrompt], batch_size: int, state: dict[str, Any]
) -> PromptPlan:
    """Write the plan under a temporary name, then rename it. `state` is kept beside the counts."""
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    count, asks = _write_jobs(temporary, jobs)
    table = np.memmap(temporary / "jobs.bin", JOB, "r+", shape=(count,)) if count else np.empty(0, JOB)
    _find_equal(table)
    prompts = _write_order(temporary, table)
    (temporary / "asks.json").write_text(json.dumps([asdict(ask) for ask in asks]), encoding="utf-8")
    if isinstance(table, np.memmap):
        table.flush()
    digest = _sha256(temporary / "jobs.bin", temporary / "order.i64", temporary / "asks.json")
    counts = {"jobs": count, "prompts": prompts, "batch_size": batch_size, "sha256": digest}
    (temporary / "state.json").write_text(json.dumps(state | counts), encoding="utf-8")
    temporary.rename(folder)
    return PromptPlan(folder)


def _write_jobs(folder: Path, jobs: Iterable[PlannedPrompt]) -> tuple[int, list[PromptSpec]]:
    asks: dict[PromptSpec, int] = {}
    block = np.zeros(4096, JOB)
    count = filled = 0
    with open(folder / "jobs.bin", "wb") as file:
        for job in jobs:
            if not 0 < job.tokens < 1 << TOKEN_BITS:
                raise PlanError(f"a prompt of {job.tokens} tokens; a plan holds 1 to {(1 << TOKEN_BITS) - 1}")
            prompt = np.frombuffer(job.digest or bytes(16), "<u8")
            ask = asks.setdefault(job.ask, len(asks))
            block[filled] = (job.row, ask, job.tokens, prompt, 0 if job.digest else NO_SPEECH)
            count, filled = count + 1, filled + 1
            if filled == len(block):
                file.write(block.tobytes())
                filled = 0
        file.write(block[:filled].tobytes())
    if len(asks) >= 1 << ASK_BITS or count >= 1 << JOB_BITS:
        raise PlanError(f"{count} rows with {len(asks)} instructions; cut the manifest into several")
    return count, list(asks)


def _find_equal(jobs: np.ndarray) -> None:
    """Fill `first`: the number of the first job with the same prompt. One share of the prompts at a time."""
    shares = np.uint64(-(-len(jobs) // ROWS_AT_A_TIME) or 1)
    for share in range(int(shares)):
        numbers = [
            begin + np.flatnonzero((chunk["prompt"][:, 0] % shares == share) & (chunk["first"] != NO_SPEECH))
            for begin in range(0, len(jobs), ROWS_AT_A_TIME)
            for chunk in [jobs[begin : begin + ROWS_AT_A_TIME]]
        ]
        at = np.concatenate(numbers) if numbers else np.empty(0, np.int64)
        if not len(at):
            continue
        prompts = jobs["prompt"][at]
        order = np.lexsort((at, prompts[:, 1], prompts[:, 0]))
        ordered, at = prompts[order], at[order]
        starts = np.r_[True, (ordered[1:] != ordered[:-1]).any(axis=1)]
        jobs["first"][at] = at[starts][np.cumsum(starts) - 1]


def _write_order(folder: Path, jobs: np.ndarray) -> int:
    """Sort the first jobs by (ask, longest first, number), in place in a file; returns how many there are."""
    path, count = folder / "order.i64", 0
    with open(path, "wb") as file:
        for begin in range(0, len(jobs), ROWS_AT_A_TIME):
            chunk = jobs[begin : begin + ROWS_AT_A_TIME]
            number = begin + np.arange(len(chunk))
            first = chunk["first"] == number
            shorter = (1 << TOKEN_BITS) - 1 - chunk["tokens"].astype(np.uint64)
            key = (chunk["ask"].astype(np.uint64) << np.uint64(TOKEN_BITS)) | shorter
            key = (key << np.uint64(JOB_BITS)) | number.astype(np.uint64)
            file.write(key[first].tobytes())
            count += int(first.sum())
    if count:
        keys = np.memmap(path, "<u8", "r+")
        keys.sort()
        keys &= np.uint64((1 << JOB_BITS) - 1)
        keys.flush()
    return count


def _open(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    return np.memmap(path, dtype, "r", shape=(count,)) if count else np.empty(0, dtype)


def _sha256(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
