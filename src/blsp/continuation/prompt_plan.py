"""The work of step 1: all prompts, equal prompts, batches, and the answers so far.

In:  planned prompts in the order of the output rows; an engine; the folder of unfinished work.
Out: each different prompt answered once, by any number of ranks, in batches that never change.
Try: `plan = write_plan(Path("plan.sqlite"), prompts, batch_size=64); plan.batch(0)`
Flow: requests.py → **prompt_plan.py** (plan, batches, answer logs) → writer.py, which merges the answers into rows.

    plan.sqlite          prompts   number  row  spec  tokens  digest  first     one for each output row
                         queue     position  number                             one for each different prompt
                         specs     number  behaviour  instruction  prompt_order
    part-00003.jsonl     the answers of rank 3, in whole batches; `left`: how many answers of the batch follow

`first` is the number of the first equal prompt, or NULL if a fixed sentence is the answer. The queue is sorted by spec,
so that a batch shares its prefix, and then longest first, so that a batch has similar lengths and a lack of memory
shows in the first batch. Batch b is always positions b·B + 1 to (b + 1)·B. Rows are on disk, not in memory.
"""

import base64
import hashlib
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from blsp.continuation.engines import Engine, Prompt, Written
from blsp.continuation.requests import PlannedPrompt, PromptSpec
from blsp.data.files import digest_of, take_room, write_atomically, write_json
from blsp.data.jobs import WAIT, Parts, RowLog
from blsp.distributed import Runtime, barrier, gathered

TABLES = """
PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;  -- a file that is not finished is thrown away
CREATE TABLE specs (number INTEGER PRIMARY KEY, behaviour, instruction, prompt_order,
                    UNIQUE (behaviour, instruction, prompt_order));
CREATE TABLE given (number INTEGER PRIMARY KEY, row, spec, tokens, digest);
CREATE TABLE prompts (number INTEGER PRIMARY KEY, row, spec, tokens, digest, first);
CREATE TABLE queue (position INTEGER PRIMARY KEY, number);
CREATE TABLE facts (batch_size, sha256);
"""
FIND_EQUAL = """
INSERT INTO prompts SELECT number, row, spec, tokens, digest,
    CASE WHEN digest IS NOT NULL THEN MIN(number) OVER (PARTITION BY digest) END
    FROM given ORDER BY number
"""
FILL_QUEUE = """
INSERT INTO queue (number) SELECT number FROM prompts WHERE first = number ORDER BY spec, tokens DESC, number
"""
PROMPT = "prompts.row, behaviour, instruction, prompt_order, tokens, digest"
SPEC = "JOIN specs ON specs.number = prompts.spec"


# --- the plan ---------------------------------------------------------------------------------------------
class PromptPlan:
    """A finished plan, read from its file. `len(plan)` is the number of output rows."""

    def __init__(self, path: Path) -> None:
        # immutable: many ranks read the file, on any file system, without locks
        self._database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
        self.batch_size, self.sha256 = self._one("SELECT batch_size, sha256 FROM facts")
        self._rows = self._one("SELECT COALESCE(MAX(number) + 1, 0) FROM prompts")[0]
        self.prompts = self._one("SELECT COALESCE(MAX(position), 0) FROM queue")[0]  # different ones

    def __len__(self) -> int:
        return self._rows

    @property
    def batches(self) -> int:
        return -(-self.prompts // self.batch_size)

    def batch(self, number: int) -> list[tuple[int, PlannedPrompt]]:
        """The prompts of batch `number`, with their own numbers; each one stands for all prompts equal to it."""
        begin = number * self.batch_size
        records = self._database.execute(
            f"SELECT prompts.number, {PROMPT} FROM queue JOIN prompts ON prompts.number = queue.number {SPEC} "
            "WHERE position > ? AND position <= ? ORDER BY position",
            (begin, begin + self.batch_size),
        )
        return [(record[0], _planned(record[1:])) for record in records]

    def rows(self) -> Iterator[tuple[PlannedPrompt, int | None]]:
        """For each output row its prompt, and the number of the first equal prompt (None: not for the LLM)."""
        records = self._database.execute(f"SELECT first, {PROMPT} FROM prompts {SPEC} ORDER BY prompts.number")
        for record in records:
            yield _planned(record[1:]), record[0]

    def row(self, number: int) -> int:
        """The input row of prompt `number`."""
        return int(self._database.execute("SELECT row FROM prompts WHERE number = ?", (number,)).fetchone()[0])

    def firsts(self) -> Iterator[int | None]:
        """For each output row the number of the first prompt that is equal to its prompt."""
        for (first,) in self._database.execute("SELECT first FROM prompts ORDER BY number"):
            yield first

    def missing_batches(self, done: np.ndarray, mine: range) -> list[int]:
        """Those batches of `mine` that are not recorded. Batches are recorded whole, so their first prompt decides."""
        heads = self._database.execute("SELECT number FROM queue WHERE (position - 1) % ? = 0", (self.batch_size,))
        return [batch for batch, (number,) in enumerate(heads) if batch in mine and not done[number]]

    def size_of(self, batch: int) -> int:
        """How many prompts a batch has."""
        return min(self.batch_size, self.prompts - batch * self.batch_size)

    def _one(self, query: str) -> Any:
        return self._database.execute(query).fetchone()


def _planned(record: tuple[Any, ...]) -> PlannedPrompt:
    row, behaviour, instruction, order, tokens, digest = record
    return PlannedPrompt(row, PromptSpec(behaviour, instruction, order), tokens, digest)


def write_plan(path: Path, prompts: Iterable[PlannedPrompt], batch_size: int) -> PromptPlan:
    """Write the plan of these prompts, atomically."""
    with write_atomically(path) as partial, closing(sqlite3.connect(partial)) as database:
        database.executescript(TABLES)
        database.executemany("INSERT INTO given VALUES (?, ?, ?, ?, ?)", _records(database, prompts))
        database.execute(FIND_EQUAL)
        database.execute("DROP TABLE given")
        database.execute(FILL_QUEUE)
        database.execute("INSERT INTO facts VALUES (?, ?)", (batch_size, _plan_digest(database)))
        database.commit()
    return PromptPlan(path)


def _records(database: sqlite3.Connection, prompts: Iterable[PlannedPrompt]) -> Iterator[tuple[Any, ...]]:
    @lru_cache(maxsize=1024)  # each row may have its own instruction, so all of them must not be in memory
    def number_of(spec: PromptSpec) -> int:
        fields = (spec.behaviour, spec.instruction, spec.order)
        database.execute("INSERT OR IGNORE INTO specs (behaviour, instruction, prompt_order) VALUES (?, ?, ?)", fields)
        query = "SELECT number FROM specs WHERE behaviour = ? AND instruction = ? AND prompt_order = ?"
        return int(database.execute(query, fields).fetchone()[0])

    for number, prompt in enumerate(prompts):
        yield number, prompt.row, number_of(prompt.spec), prompt.tokens, prompt.digest


def _plan_digest(database: sqlite3.Connection) -> str:
    """SHA-256 over all prompts, the order of the queue and the specs; it is part of the header."""
    digest = hashlib.sha256()
    for table in ("prompts", "queue", "specs"):
        for record in database.execute(f"SELECT * FROM {table} ORDER BY 1"):
            digest.update(f"{record}\n".encode())
    return digest.hexdigest()


def open_parts(folder: Path, facts: dict[str, Any], rank: int) -> Parts:
    """The folder of unfinished work of the job with these facts."""
    earlier = folder / "plan" / "state.json"  # up to version 0.1 the plan was a folder; the answers are the same
    if rank == 0 and earlier.exists():
        if json.loads(earlier.read_text(encoding="utf-8")).get("identity") == digest_of(facts):
            write_json(folder / "job.json", {"settings": digest_of(facts)})
        shutil.rmtree(earlier.parent)
    if rank == 0 and any(folder.glob("part-*.ids.u32")):  # an earlier version stored the top-k beside the answers
        shutil.rmtree(folder)
    return Parts(folder, facts, rank)


def open_plan(parts: Parts, batch_size: int, prompts: Callable[[], Iterable[PlannedPrompt]], rank: int) -> PromptPlan:
    """The plan of this job: rank 0 writes it if it is missing, the other ranks wait for it."""
    path = parts.folder / "plan.sqlite"
    while not path.exists():
        if rank == 0:
            return write_plan(path, prompts(), batch_size)
        time.sleep(WAIT)
    return PromptPlan(path)


# --- answers ----------------------------------------------------------------------------------------------
def open_answers(parts: Parts, rank: int) -> RowLog:
    """The append-only answers of one rank; an incomplete batch of a killed run is removed."""
    log = parts.log(rank)
    os.truncate(log.path, max((end for _, end, _ in read_answers(log.path)), default=0))
    return log


def answer_rows(batch: list[Written]) -> Iterator[dict[str, Any]]:
    """A batch as rows of the log, which are appended together. Top-k arrays are base64 of their bytes."""
    for left, written in zip(range(len(batch) - 1, -1, -1), batch, strict=True):
        row: dict[str, Any] = {"key": written.key, "left": left}
        if written.refused is not None:
            row["refused"] = written.refused
        else:
            row |= {"text": written.text, "ids": written.ids, "finish": written.finish}
        if written.top is not None:
            arrays = written.top.ids.astype("<u4"), written.top.logp.astype("<f2")
            row["top_k"] = [base64.b64encode(array.tobytes()).decode() for array in arrays]
        yield row


def read_answers(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(first byte, end, fields) of the answers in whole batches; reading stops at an incomplete line."""
    batch: list[tuple[int, int, dict[str, Any]]] = []
    begin = 0
    with open(path, "rb") as lines:
        for line in lines:
            try:
                fields = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:  # zeros, after a power cut
                fields = None
            if not isinstance(fields, dict):
                return
            batch.append((begin, begin + len(line), fields))
            begin += len(line)
            if fields["left"] == 0:
                yield from batch
                batch = []


class AnswerReader:
    """Answers of all ranks by the number of their prompt, for the merge."""

    def __init__(self, parts: Parts, rows: int, top_k: int) -> None:
        self._top_k = top_k
        self._files = [open(path, "rb") for path in parts.paths()]  # noqa: SIM115
        # (rows, 2): file and first byte of each answer, on disk
        self._offsets = np.memmap(parts.folder / "offsets.i64", "<i8", "w+", shape=(max(rows, 1), 2))
        take_room(parts.folder / "offsets.i64")
        answered = np.zeros(rows, bool)
        for number, path in enumerate(parts.paths()):
            for begin, _, fields in read_answers(path):
                key, refused = fields["key"], "refused" in fields
                if not (refused and answered[key]):  # an answer of any rank replaces a refusal
                    self._offsets[key] = (number, begin)
                answered[key] |= not refused

    def fields(self, number: int) -> dict[str, Any]:
        """`text`, `ids` and `finish` of an answer, or `refused` with the reason why there is none."""
        file, begin = self._offsets[number]
        self._files[file].seek(begin)
        return json.loads(self._files[file].readline())

    def top(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """ids (N, K) and logp (N, K) of an answer; N is 0 if it was refused."""
        ids, logp = (base64.b64decode(array) for array in self.fields(number).get("top_k", ("", "")))
        shape = (-1, self._top_k)
        return np.frombuffer(ids, "<u4").reshape(shape), np.frombuffer(logp, "<f2").reshape(shape)


# --- computing --------------------------------------------------------------------------------------------
def compute_answers(
    plan: PromptPlan,
    parts: Parts,
    runtime: Runtime,
    make_engine: Callable[[], Engine],
    make_prompt: Callable[[int, PlannedPrompt], Prompt],
    check_refusals: Callable[[list[Written]], None] = lambda refused: None,
) -> None:
    """Answer this rank's missing batches; the engine is made only if there are any.

    check_refusals: called with all refused prompts after each new one; raises an error if there are too many.
    """
    if parts.is_finished(runtime.rank, runtime.world) and not runtime.shard_llm:
        return
    done = np.zeros(len(plan), bool)  # prompts that any rank has answered; refused ones are asked again
    for path in parts.paths():
        for _, _, fields in read_answers(path):
            done[fields["key"]] |= "refused" not in fields
    mine = range(runtime.rank, plan.batches, runtime.world)
    missing = plan.missing_batches(done, mine)
    asks = any(gathered(bool(missing))) if runtime.shard_llm else bool(missing)  # ranks run a sharded LLM together
    total, left = sum(map(plan.size_of, mine)), sum(map(plan.size_of, missing))
    bar = tqdm(total=total, initial=total - left, unit="prompt", disable=runtime.rank != 0, dynamic_ncols=True)
    with open_answers(parts, runtime.rank) as log, bar:
        started, tokens, refused = time.monotonic(), 0, list[Written]()
        prompts = ([make_prompt(*numbered) for numbered in plan.batch(batch)] for batch in missing)
        for answers in make_engine().write(prompts) if asks else ():
            log.append(*answer_rows(answers))
            if new := [written for written in answers if written.refused is not None]:
                refused += new
                check_refusals(refused)
            tokens += sum(len(written.ids or ()) for written in answers)
            bar.set_postfix_str(f"{tokens / (time.monotonic() - started):.0f} tokens/s", refresh=False)
            bar.update(len(answers))
    parts.finish(runtime.rank, runtime.world)
    if runtime.shard_llm:
        barrier(runtime)  # the others may still run it
