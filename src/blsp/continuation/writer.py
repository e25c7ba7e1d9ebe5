"""`blsp continue`: the LLM continues each transcript; its answers are the targets of step 2.

In:  a manifest, and an LLM in this process or behind a URL. With --score-only: a finished continuations file.
Out: `out.jsonl`, the manifest's rows with `continuation` and how it was made; `out.jsonl.meta.json`, the header;
     `out.jsonl.topk/`, if the teacher's distribution is stored; `out.jsonl.skipped.jsonl`, the rows left out.
Try: `blsp continue --manifest in.jsonl --out out.jsonl --llm embedded:smollm2-135m-instruct`
Flow: manifest → requests.py (prompts) → prompt_plan.py (plan, answers) → **writer.py** (rows, top-k) → training

After a kill, the same command computes the missing batches, and the output is the same to the byte. --score-only runs
the LLM once over prompt and continuation. Rows without `continuation_ids` (from a server that does not return them) get
the ids of their text first, which is noted in the header.
"""

import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoConfig

from blsp.continuation.engines import Engine, Prompt, ScoringEngine, TransformersEngine, Written
from blsp.continuation.prompt_plan import AnswerReader, PromptPlan, compute_answers, open_parts, open_plan
from blsp.continuation.requests import (
    PlannedPrompt,
    PromptPolicy,
    parse_mixture,
    plan_continuations,
    plan_scoring,
    read_text,
    row_as_read,
)
from blsp.continuation.text_model import TextModel, engine_body, server_body, template_args_of
from blsp.continuation.topk import topk_folder, write_top_k
from blsp.data.files import file_digest, write_json
from blsp.data.jobs import WAIT, Job, JobError, Parts, differences
from blsp.data.manifest import CONTINUATION_KEY, Manifest, write_manifest
from blsp.distributed import Runtime, find_runtime
from blsp.llm.decoding import Decoding
from blsp.llm.instructions import NO_SPEECH_SENTENCE, instruction_for
from blsp.llm.prompt import ORDERS, show_args, text_ids
from blsp.settings import ContinueSettings, SettingsError
from blsp.weights.digest import find_weights

DECODING = ("max_new_tokens", "temperature", "top_p", "seed")  # settings that are copied into the header
PACKAGES = ("blsp", "torch", "transformers", "tokenizers", "numpy")
FEW_FAILURES = 10  # prompts that may fail in a job of any size
TOKENISED = "tokenised from the text where the server returned none"


def write_continuations(settings: ContinueSettings) -> None:
    """`blsp continue`."""
    check_settings(settings)
    runtime = find_runtime(
        settings.device, settings.dtype, shard_llm=settings.shard_llm, attention=settings.attn_implementation
    )
    llm = TextModel(find_weights(settings.llm), template_args_of(settings))
    check_top_k(settings, llm)
    with Job(settings.out, runtime.rank) as job:
        run = Step1(settings, llm, runtime, job)
        score_continuations(run) if settings.score_only else continue_manifest(run)


# --- settings ---------------------------------------------------------------------------------------------
def check_settings(settings: ContinueSettings) -> None:
    """Raise SettingsError for settings that cannot be used, before anything is loaded."""
    behaviours, orders = parse_mixture(settings.behaviours).names, parse_mixture(settings.orders).names
    for behaviour in behaviours:
        instruction_for(behaviour)
    if unknown := set(orders) - set(ORDERS):
        raise SettingsError(f"--orders {', '.join(sorted(unknown))}: there are {' and '.join(ORDERS)}")
    if settings.instruction and len(behaviours) > 1:
        raise SettingsError(f"--instruction is for one behaviour, but --behaviours names {len(behaviours)}")
    engine_body(settings)


def check_top_k(settings: ContinueSettings, llm: TextModel) -> None:
    """Raise SettingsError if --top-k is larger than the LLM's vocabulary."""
    if not settings.top_k:  # with a server, this machine may have only the tokenizer
        return
    tokens = AutoConfig.from_pretrained(llm.weights.folder, trust_remote_code=False).get_text_config().vocab_size
    if settings.top_k > tokens:
        raise SettingsError(f"--top-k {settings.top_k}: {llm.weights.name} has {tokens} tokens")


def top_k_facts(settings: ContinueSettings) -> dict[str, Any]:
    return {"k": settings.top_k, "temperature": settings.top_k_temperature}


@dataclass(frozen=True)
class Step1:
    """One run of step 1: its settings, and the objects made from them."""

    settings: ContinueSettings
    llm: TextModel
    runtime: Runtime
    job: Job

    @cached_property
    def manifest(self) -> Manifest:
        return Manifest(self.settings.manifest)

    @property
    def batch_size(self) -> int:
        """Prompts in a batch; with a server 1, as the server forms its own batches."""
        return 1 if self.settings.engine_url else self.settings.batch_size

    def facts(self) -> dict[str, Any]:
        """The facts that decide the output: the part of the header that must not change until the job is done."""
        settings, paths = self.settings, self.manifest.paths
        url, behaviours = settings.engine_url, parse_mixture(settings.behaviours).names
        engine = {"name": "openai", "model": settings.engine_model or settings.llm}
        return {
            "format": 1,
            "manifest": {
                "files": [path.name for path in paths],
                "rows": len(self.manifest),
                "sha256": file_digest(*paths),
                "limit": settings.limit,
            },
            "llm": settings.llm,
            "llm_sha256": None if url else self.llm.weights.sha256,
            "chat_template_sha256": self.llm.template_digest,
            "template_args": self.llm.template_args or None,
            "engine": engine | {"body": server_body(settings, self.llm)} if url else {"name": "transformers"},
            "behaviours": settings.behaviours,
            "orders": settings.orders,
            "instructions": {name: settings.instruction or instruction_for(name) for name in behaviours},
            "no_speech_sentence": NO_SPEECH_SENTENCE,
            "normalise": settings.normalise,
            "max_prompt_tokens": settings.max_prompt_tokens,
            "decoding": {name: getattr(settings, name) for name in DECODING},
            "batch_size": self.batch_size,
            "continuation_ids": "where the server returns them" if url else "generated",
            "top_k": top_k_facts(settings) if settings.top_k else None,
        }

    def environment(self) -> dict[str, Any]:
        """Versions and hardware, which may change rounding. They are in the header; a change is only a warning."""
        numerics = {
            "device": self.runtime.device.type,
            "dtype": str(self.runtime.dtype),
            "threads": torch.get_num_threads(),
        }
        versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
        url = self.settings.engine_url
        return {"versions": versions, "numerics": numerics} | ({"server": {"urls": list(url)}} if url else {})


# --- step 1 -----------------------------------------------------------------------------------------------
def continue_manifest(run: Step1) -> None:
    """Write the continuations of a manifest, or those that are missing."""
    job, facts, rank = run.job, run.facts(), run.runtime.rank
    if job.out.exists():
        _check_finished(job, facts)
        if rank == 0:
            shutil.rmtree(job.parts_folder, ignore_errors=True)
            _report(job, "is complete: nothing to do")
        return
    header = job.header()
    if header is not None:
        job.require_same(header, facts)
        _warn_of_changes(run, header)
    parts = open_parts(job.parts_folder, facts, rank)
    plan = open_plan(parts, run.batch_size, lambda: _plan(run), rank)
    if not len(plan):
        raise JobError(f"{job.out}: no row can be continued; {job.skipped_path} says why")
    if header is None and rank == 0:  # before the first row
        counts = {"rows": len(plan), "prompts": plan.prompts, "batches": plan.batches}
        counts |= {"skipped": job.skipped.count, "sha256": plan.sha256}
        write_json(job.header_path, facts | {"plan": counts} | run.environment())

    def make_prompt(number: int, planned: PlannedPrompt) -> Prompt:
        text = read_text(run.manifest[planned.row], run.settings.normalise)
        seed = int.from_bytes((planned.digest or b"")[:8], "little") ^ run.settings.seed
        spec = planned.spec  # the seed is the prompt's own, wherever its row stands
        return Prompt(number, spec.instruction, spec.order, text, seed & 0x7FFFFFFF)

    make_engine, check = partial(_make_engine, run), partial(_check_refusals, run, plan)
    compute_answers(plan, parts, run.runtime, make_engine, make_prompt, check)
    if rank == 0:
        parts.wait(run.runtime.world)
        rows = _merge(run, parts, plan, facts)
        _report(job, f"{rows} rows, {plan.prompts} different prompts")


def _check_finished(job: Job, facts: dict[str, Any]) -> None:
    """Raise JobError unless the finished file has this job's settings; `--score-only` may have added a top-k."""
    header = job.require_header()
    if facts["top_k"] and (header.get("top_k") is None or not topk_folder(job.out).is_dir()):
        raise JobError(f"{job.out}: is written, but has no top-k; add it: the same command with --score-only")
    job.require_same(header, facts, {"continuation_ids"} if facts["top_k"] else {"continuation_ids", "top_k"})


def _warn_of_changes(run: Step1, header: dict[str, Any]) -> None:
    changes = [differences(header.get(name, {}), group) for name, group in run.environment().items()]
    if run.runtime.rank == 0 and any(changes):
        print(
            f"{run.job.out}: was started in another environment ({'; '.join(filter(None, changes))}); if two "
            "tokens are almost equally likely, the next rows may differ from those of an uninterrupted run",
            file=sys.stderr,
        )


def _plan(run: Step1) -> Iterator[PlannedPrompt]:
    run.job.skipped_path.unlink(missing_ok=True)  # of a run that was killed while it planned
    settings = run.settings
    policy = PromptPolicy(
        parse_mixture(settings.behaviours),
        parse_mixture(settings.orders),
        settings.instruction or "",
        settings.normalise,
        settings.max_prompt_tokens,
        settings.seed,
    )
    rows = tqdm(islice(run.manifest, settings.limit), "planning", len(run.manifest), unit="row")
    return plan_continuations(rows, run.llm.tokenizer, policy, run.job.skipped)


def _make_engine(run: Step1) -> Engine:
    settings = run.settings
    fields: dict[str, Any] = {name: getattr(settings, name) for name in DECODING}
    decoding = Decoding(**fields, top_k_logprobs=settings.top_k, top_k_temperature=settings.top_k_temperature)
    if not settings.engine_url:
        return TransformersEngine(*run.llm.load(run.runtime), decoding)
    from blsp.continuation.openai_engine import OpenAIEngine

    return OpenAIEngine(
        urls=settings.engine_url,
        model=settings.engine_model or settings.llm,
        decoding=decoding,
        api_key=os.environ.get(settings.api_key_env, ""),
        in_flight=settings.concurrency,
        timeout=settings.timeout,
        retries=settings.retries,
        retry_minutes=settings.retry_minutes,
        body=server_body(settings, run.llm),
        stop_ids=tuple(run.llm.tokenizer.all_special_ids),
    )


def _check_refusals(run: Step1, plan: PromptPlan, refused: list[Written]) -> None:
    """Raise JobError if a server has refused more prompts than --max-failures allows."""
    if len(refused) <= max(FEW_FAILURES, run.settings.max_failures * plan.prompts / run.runtime.world):
        return
    row = run.manifest[plan.row(refused[-1].key)]
    raise JobError(
        f"{run.job.out}: {len(refused)} prompts cannot be answered, more than --max-failures "
        f"{run.settings.max_failures:g} of {plan.prompts}; the last one, of row {row.id!r}: {refused[-1].refused}. "
        "Answered rows are kept, and the same command asks for the others again"
    )


def _merge(run: Step1, parts: Parts, plan: PromptPlan, facts: dict[str, Any]) -> int:
    """Write the output from the answers and return its number of rows; after a kill it is done again."""
    merged, answers = parts.folder / "merged.jsonl", AnswerReader(parts, len(plan), run.settings.top_k)
    out, rows = run.job.out, _output_rows(run, plan, answers)
    count = write_manifest(merged, rows, relative_to=out.absolute().parent)
    if not count:
        raise JobError(f"{out}: no prompt was answered; {run.job.skipped_path} says why")
    if run.settings.top_k:
        meta = facts["top_k"] | {"llm_sha256": facts["llm_sha256"], "source": "generated"}
        write_top_k(topk_folder(out), parts.folder / "topk", plan.firsts(), len(plan), answers.top, meta)
    run.job.finish(merged)
    return count


def _output_rows(run: Step1, plan: PromptPlan, answers: AnswerReader) -> Iterator[dict[str, Any]]:
    silence = {
        "continuation": NO_SPEECH_SENTENCE,
        "continuation_ids": text_ids(run.llm.tokenizer, NO_SPEECH_SENTENCE),
        "finish": "stop",
    }
    for planned, first in plan.rows():
        row = run.manifest[planned.row]
        answer: dict[str, Any] = silence
        if first is not None:
            fields = answers.fields(first)
            if "refused" in fields:
                run.job.skipped.add(row.id, row.audio, fields["refused"])
                continue
            ids = {} if fields["ids"] is None else {"continuation_ids": fields["ids"]}
            answer = {"continuation": fields["text"]} | ids | {"finish": fields["finish"]}
        step1_fields = asdict(planned.spec) | answer | {"prompt_tokens": planned.tokens}
        yield row_as_read(row, run.settings.normalise) | step1_fields


def _report(job: Job, what: str) -> None:
    skipped = job.skipped.count
    left_out = f"; {skipped} rows left out, listed in {job.skipped_path}" if skipped else ""
    print(f"{job.out}: {what}{left_out}")


# --- the top-k of finished rows ---------------------------------------------------------------------------
def score_continuations(run: Step1) -> None:
    """Add the top-k to the finished rows of `--out`; the manifest is not read again."""
    job, folder, top_k = run.job, topk_folder(run.job.out), top_k_facts(run.settings)
    if not job.out.exists():
        raise JobError(f"{job.out}: does not exist; --score-only adds to what blsp continue has written")
    header = job.require_header()
    _check_teacher(run, header)
    if header["top_k"] is None or not folder.is_dir():
        _ensure_ids(run, header)
        _score_rows(run, Manifest(job.out, key=CONTINUATION_KEY), folder, top_k)
    elif header["top_k"] != top_k:
        raise JobError(f"{folder}: holds {header['top_k']}, not {top_k}; remove it to score anew")
    elif run.runtime.rank == 0:
        shutil.rmtree(_scoring_folder(job), ignore_errors=True)
        print(f"{folder}: is complete: nothing to do")


def _scoring_folder(job: Job) -> Path:
    return Path(f"{job.out}.scoring")


def _check_teacher(run: Step1, header: dict[str, Any]) -> None:
    """Raise JobError unless the teacher is the LLM that wrote; for a server only the template can be compared."""
    written, template, llm = header["llm_sha256"], header["chat_template_sha256"], run.llm
    args = header.get("template_args") or {}
    if args != llm.template_args:
        raise JobError(
            f"{run.job.out}: was written with {show_args(args)}, not with {show_args(llm.template_args)}; leave "
            "--template-arg out: the header names them"
        )
    if written not in (None, llm.weights.sha256) or template != llm.template_digest:
        raise JobError(
            f"{run.job.out}: was written by {header['llm']} (tensors {str(written)[:12]}…, template "
            f"{template[:12]}…); {llm.weights.name} is another LLM: the teacher must be the LLM that wrote"
        )


def _ensure_ids(run: Step1, header: dict[str, Any]) -> None:
    """Give each row its `continuation_ids`; after a kill it is done again."""
    if header["continuation_ids"] in ("generated", TOKENISED):
        return
    job = run.job
    if run.runtime.rank == 0:
        write_manifest(job.out, _rows_with_ids(run), relative_to=job.out.absolute().parent)
        write_json(job.header_path, header | {"continuation_ids": TOKENISED})
    while job.require_header()["continuation_ids"] != TOKENISED:
        time.sleep(WAIT)


def _rows_with_ids(run: Step1) -> Iterator[dict[str, Any]]:
    for row in Manifest(run.job.out, key=CONTINUATION_KEY):
        values = row.to_json()
        if "continuation_ids" not in values:
            values["continuation_ids"] = text_ids(run.llm.tokenizer, values["continuation"])
        yield values


def _score_rows(run: Step1, rows: Manifest, folder: Path, top_k: dict[str, Any]) -> None:
    job, rank, digest, size = run.job, run.runtime.rank, run.llm.weights.sha256, run.settings.batch_size
    facts = {"rows_sha256": file_digest(*rows.paths), "llm_sha256": digest, "batch_size": size} | top_k
    parts = open_parts(_scoring_folder(job), facts, rank)
    plan = open_plan(parts, size, lambda: plan_scoring(rows, run.llm.tokenizer, str(job.out)), rank)

    def make_engine() -> Engine:
        return ScoringEngine(*run.llm.load(run.runtime), top_k["k"], top_k["temperature"])

    def make_prompt(number: int, planned: PlannedPrompt) -> Prompt:
        row, spec = rows[planned.row], planned.spec
        ids, finish = tuple(row.extra["continuation_ids"]), row.extra["finish"]
        return Prompt(number, spec.instruction, spec.order, row.text, answer=ids, finish=finish)

    compute_answers(plan, parts, run.runtime, make_engine, make_prompt)
    if rank == 0:
        parts.wait(run.runtime.world)
        meta = top_k | {"llm_sha256": digest, "source": "teacher-forced"}
        answers = AnswerReader(parts, len(plan), top_k["k"])
        write_top_k(folder, parts.folder / "topk", plan.firsts(), len(plan), answers.top, meta)
        write_json(job.header_path, job.require_header() | {"top_k": top_k})
        shutil.rmtree(parts.folder)
        print(f"{folder}: top-{top_k['k']} of {len(plan)} rows, {plan.prompts} different")
