"""`blsp continue --score-only`: the teacher's top-k for continuations that are already written.

In:  a finished continuations file (written by a URL, or without --top-k), the local LLM.
Out: `out.jsonl.topk/` beside it, and its mention in the header. Deterministic, resumable, sharded by rank.
Try: `blsp continue --score-only --out out.jsonl --llm embedded:smollm2-135m-instruct --top-k 32`
Flow: continuation/ — after step 1, before `blsp train --loss kl`.

The LLM is run once over prompt and continuation (teacher forcing) instead of once a token. Rows without
`continuation_ids`, from servers that do not return them, get those of their text first; the header says so.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from blsp.continuation.engines import Engine, Prompt, ScoringEngine
from blsp.continuation.parts import AnswerReader
from blsp.continuation.plan import PromptPlan
from blsp.continuation.provenance import HeaderError, file_digest, read_header, text_digest, write_header
from blsp.continuation.requests import scoring_jobs
from blsp.continuation.topk import topk_folder
from blsp.continuation.work import WAIT, await_all, compute, open_plan
from blsp.continuation.writer import load_tokenizer, write_top_k
from blsp.data.manifest import CONTINUATION_KEY, Manifest, write_manifest
from blsp.distributed import Runtime, find_runtime
from blsp.llm.prompt import text_ids
from blsp.model.loading import load_language_model
from blsp.weights.digest import tensor_digest
from blsp.weights.embedded import resolve_weights

if TYPE_CHECKING:
    from blsp.settings import ContinueSettings

TOKENISED = "tokenised from the text where the server returned none"


def score_continuations(settings: ContinueSettings) -> None:
    """Add the top-k to `settings.out`; the manifest is not read again."""
    runtime = find_runtime(settings.device, settings.dtype)
    out = Path(settings.out)
    tokenizer, wanted = (
        load_tokenizer(settings.llm),
        {"k": settings.top_k, "temperature": settings.top_k_temperature},
    )
    header = read_header(out)
    digest = tensor_digest(resolve_weights(settings.llm))
    _check_teacher(settings, header, digest, tokenizer)
    if header["top_k"] is not None and topk_folder(out).is_dir():
        if header["top_k"] != wanted:
            raise HeaderError(
                f"{topk_folder(out)}: holds {header['top_k']}, not {wanted}; remove it to score anew"
            )
        if runtime.rank == 0:
            shutil.rmtree(_folder(out), ignore_errors=True)
            print(f"{topk_folder(out)}: is complete: nothing to do")
        return
    _ensure_ids(out, header, tokenizer, runtime)
    rows = Manifest(out, key=CONTINUATION_KEY)
    facts = {
        "rows_sha256": file_digest(rows.paths),
        "llm_sha256": digest,
        "batch_size": settings.batch_size,
    } | wanted
    plan = open_plan(
        _folder(out), facts, settings.batch_size, lambda: scoring_jobs(rows, tokenizer, str(out)), runtime
    )
    compute(
        plan,
        _folder(out),
        runtime,
        settings.top_k,
        partial(_engine, settings, runtime),
        partial(_prompt, rows, plan),
    )
    if runtime.rank == 0:
        await_all(_folder(out), runtime)
        answers = AnswerReader(_folder(out), len(plan), settings.top_k)
        write_top_k(out, plan, answers, wanted | {"llm_sha256": digest, "source": "teacher-forced"})
        answers.close()
        write_header(out, read_header(out) | {"top_k": wanted})
        shutil.rmtree(_folder(out))
        print(f"{topk_folder(out)}: top-{settings.top_k} of {len(plan)} rows, {len(plan.order)} different")


def _folder(out: Path) -> Path:
    return Path(f"{out}.scoring")


def _check_teacher(
    settings: ContinueSettings, header: dict[str, Any], digest: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The teacher must be the LLM that wrote; of a server's LLM only the template can be compared."""
    template = text_digest(str(tokenizer.chat_template))
    if header["llm_sha256"] not in (None, digest) or header["chat_template_sha256"] != template:
        raise HeaderError(
            f"{settings.out}: was written by {header['llm']} (tensors {str(header['llm_sha256'])[:12]}…, "
            f"template {header['chat_template_sha256'][:12]}…); {settings.llm} is another LLM: "
            "the teacher must be the writer"
        )


def _ensure_ids(
    out: Path, header: dict[str, Any], tokenizer: PreTrainedTokenizerBase, runtime: Runtime
) -> None:
    """Give every row its `continuation_ids`; killed here, it is simply done again."""
    if header["continuation_ids"] in ("generated", TOKENISED):
        return
    if runtime.rank == 0:
        write_manifest(out, _rows_with_ids(out, tokenizer), relative_to=out.absolute().parent)
        write_header(out, header | {"continuation_ids": TOKENISED})
    while read_header(out)["continuation_ids"] != TOKENISED:
        time.sleep(WAIT)


def _rows_with_ids(out: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Any]]:
    for row in Manifest(out, key=CONTINUATION_KEY):
        values = row.to_json()
        if "continuation_ids" not in values:
            values["continuation_ids"] = text_ids(tokenizer, values["continuation"])
        yield values


def _engine(settings: ContinueSettings, runtime: Runtime) -> Engine:
    llm, tokenizer = load_language_model(settings.llm, runtime)
    return ScoringEngine(llm, tokenizer, settings.top_k, settings.top_k_temperature)


def _prompt(rows: Manifest, plan: PromptPlan, job: int) -> Prompt:
    planned = plan.jobs[job]
    ask, row = plan.asks[int(planned["ask"])], rows[int(planned["row"])]
    answer = tuple(row.extra["continuation_ids"])
    return Prompt(job, ask.instruction, ask.order, row.text, answer=answer, finish=row.extra["finish"])
