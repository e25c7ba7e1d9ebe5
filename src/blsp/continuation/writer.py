"""Step 1: the LLM continues every transcript, and the answers become the targets of step 2.

In:  a manifest, an LLM (in this process, or behind a URL).
Out: `out.jsonl`, the manifest's rows with `continuation` and what led to it; beside it `out.jsonl.meta.json`,
     the header; `out.jsonl.topk/`, if the teacher's distributions are kept; `out.jsonl.skipped.jsonl`, what
     was left out and why.
Try: `blsp continue --manifest in.jsonl --out out.jsonl --llm embedded:smollm2-135m-instruct`
Flow: manifest → **continuations** → speech features → alignment training.

The work is planned from the whole input before the first token, in batches that never change. Ranks take
batches in turn and record each in a part file; a run that was killed at any moment goes on with the batches
that are missing, and the merge writes the same bytes as if nothing had happened. Everything unfinished lies
in `out.jsonl.parts/`; the output appears whole, under its name, at the end.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from blsp.continuation.engines import Engine, Prompt, TransformersEngine
from blsp.continuation.parts import AnswerReader
from blsp.continuation.plan import NO_SPEECH, PromptPlan
from blsp.continuation.provenance import (
    HeaderError,
    changed_surroundings,
    file_digest,
    header_path,
    read_header,
    require_same,
    surroundings,
    text_digest,
    write_header,
)
from blsp.continuation.requests import PromptPolicy, continuation_jobs, parse_mixture, read_text
from blsp.continuation.topk import TopKWriter, topk_folder
from blsp.continuation.work import await_all, compute, open_plan
from blsp.data.jobs import SkippedLog
from blsp.data.manifest import Manifest, Utterance, write_manifest
from blsp.distributed import Runtime, find_runtime
from blsp.llm.decoding import Decoding
from blsp.llm.instructions import NO_SPEECH_SENTENCE, instruction_for
from blsp.llm.prompt import ORDERS, text_ids
from blsp.model.loading import load_language_model
from blsp.settings import ContinueSettings, SettingsError
from blsp.weights.digest import tensor_digest
from blsp.weights.embedded import resolve_weights

DECODING = ("max_new_tokens", "temperature", "top_p", "seed")  # the settings that the header repeats


@dataclass(frozen=True)
class Writing:
    """One run of step 1: its settings, its input, and where things lie."""

    settings: ContinueSettings
    runtime: Runtime
    manifest: Manifest
    tokenizer: PreTrainedTokenizerBase
    asking: PromptPolicy
    decoding: Decoding

    @property
    def out(self) -> Path:
        return Path(self.settings.out)

    @property
    def folder(self) -> Path:
        """What is unfinished."""
        return Path(f"{self.out}.parts")

    @property
    def batch_size(self) -> int:
        """Behind a URL every prompt is a batch of its own: the server groups them as it likes."""
        return 1 if self.settings.engine_url else self.settings.batch_size


def write_continuations(settings: ContinueSettings) -> None:
    """`blsp continue`."""
    check_settings(settings)
    check_top_k(settings)
    if settings.score_only:
        from blsp.continuation.scoring import score_continuations

        return score_continuations(settings)
    runtime = find_runtime(settings.device, settings.dtype)
    writing = _prepare(settings, runtime)
    facts = _facts(writing)
    if writing.out.exists():
        _check_finished(writing, facts)
        if runtime.rank == 0:
            shutil.rmtree(writing.folder, ignore_errors=True)
            _report(writing, "is complete: nothing to do")
        return None
    plan = _begin(writing, facts)
    engine, prompt = partial(_engine, writing), partial(_prompt, writing, plan)
    compute(plan, writing.folder, runtime, settings.top_k, engine, prompt)
    if runtime.rank == 0:
        await_all(writing.folder, runtime)
        rows = _merge(writing, plan, facts)
        shutil.rmtree(writing.folder)
        _report(writing, f"{rows} rows, {len(plan.order)} different prompts")
    return None


def check_settings(settings: ContinueSettings) -> None:
    """Refuse what cannot be done before anything is loaded."""
    behaviours, orders = parse_mixture(settings.behaviours).names, parse_mixture(settings.orders).names
    for behaviour in behaviours:
        instruction_for(behaviour)
    if unknown := set(orders) - set(ORDERS):
        raise SettingsError(f"--orders {', '.join(sorted(unknown))}: there are {' and '.join(ORDERS)}")
    if settings.instruction and len(behaviours) > 1:
        raise SettingsError(f"--instruction is for one behaviour, but --behaviours names {len(behaviours)}")
    _body(settings)


def _body(settings: ContinueSettings) -> dict[str, Any]:
    try:
        body = json.loads(settings.engine_body)
    except ValueError as error:
        raise SettingsError(f"--engine-body {settings.engine_body!r}: is not JSON ({error})") from None
    if not isinstance(body, dict):
        raise SettingsError(f"--engine-body {settings.engine_body!r}: must be a JSON object")
    return body


def check_top_k(settings: ContinueSettings) -> None:
    """Refuse more log-probabilities than the LLM has tokens."""
    if not settings.top_k:  # then a server may write, and a tokenizer is all that is here
        return
    config = AutoConfig.from_pretrained(resolve_weights(settings.llm)).get_text_config()
    if settings.top_k > config.vocab_size:
        raise SettingsError(f"--top-k {settings.top_k}: {settings.llm} has {config.vocab_size} tokens")


def load_tokenizer(llm: str) -> PreTrainedTokenizerBase:
    """The LLM's tokenizer, without its weights."""
    return AutoTokenizer.from_pretrained(resolve_weights(llm))


def _prepare(settings: ContinueSettings, runtime: Runtime) -> Writing:
    asking = PromptPolicy(
        behaviours=parse_mixture(settings.behaviours),
        orders=parse_mixture(settings.orders),
        instruction=settings.instruction or "",
        normalise=settings.normalise,
        max_prompt_tokens=settings.max_prompt_tokens,
        seed=settings.seed,
    )
    decoding = Decoding(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=settings.seed,
        top_k_logprobs=settings.top_k,
        top_k_temperature=settings.top_k_temperature,
    )
    Path(settings.out).absolute().parent.mkdir(parents=True, exist_ok=True)
    manifest, tokenizer = Manifest(settings.manifest), load_tokenizer(settings.llm)
    return Writing(settings, runtime, manifest, tokenizer, asking, decoding)


def _facts(writing: Writing) -> dict[str, Any]:
    """What the job is: the part of the header that must not change while it lasts."""
    settings, paths = writing.settings, writing.manifest.paths
    behaviours = parse_mixture(settings.behaviours).names
    return {
        "format": 1,
        "manifest": {
            "files": [path.name for path in paths],
            "rows": len(writing.manifest),
            "sha256": file_digest(paths),
            "limit": settings.limit,
        },
        "llm": settings.llm,
        "llm_sha256": None if settings.engine_url else tensor_digest(resolve_weights(settings.llm)),
        "chat_template_sha256": text_digest(str(writing.tokenizer.chat_template)),
        "engine": _engine_facts(settings),
        "behaviours": settings.behaviours,
        "orders": settings.orders,
        "instructions": {name: settings.instruction or instruction_for(name) for name in behaviours},
        "no_speech_sentence": NO_SPEECH_SENTENCE,
        "normalise": settings.normalise,
        "max_prompt_tokens": settings.max_prompt_tokens,
        "decoding": {name: getattr(settings, name) for name in DECODING},
        "batch_size": writing.batch_size,
        "continuation_ids": "where the server returns them" if settings.engine_url else "generated",
        "top_k": {"k": settings.top_k, "temperature": settings.top_k_temperature} if settings.top_k else None,
    }


def _engine_facts(settings: ContinueSettings) -> dict[str, Any]:
    if not settings.engine_url:
        return {"name": "transformers"}
    return {"name": "openai", "model": settings.engine_model or settings.llm, "body": _body(settings)}


def _check_finished(writing: Writing, facts: dict[str, Any]) -> None:
    """A finished file must be of this job; `--score-only` may have added to it since."""
    header = read_header(writing.out)
    added = {"continuation_ids"} if writing.settings.top_k else {"continuation_ids", "top_k"}
    if facts["top_k"] and (header["top_k"] is None or not topk_folder(writing.out).is_dir()):
        raise HeaderError(
            f"{writing.out}: is written, but has no top-k; add it: the same command with --score-only"
        )
    require_same(writing.out, header, {name: fact for name, fact in facts.items() if name not in added})


def _begin(writing: Writing, facts: dict[str, Any]) -> PromptPlan:
    """PromptPlan and header, by rank 0, before the first row; the plan again when the job goes on."""
    url = writing.settings.engine_url
    around = surroundings(writing.runtime) | ({"server": {"url": url}} if url else {})
    begun = read_header(writing.out) if header_path(writing.out).exists() else None
    if begun is not None:
        require_same(writing.out, begun, facts)
        if writing.runtime.rank == 0 and (changed := changed_surroundings(begun, around)):
            print(
                f"going on in other surroundings; rows to come may differ in near-ties: {changed}",
                file=sys.stderr,
            )
    plan = open_plan(writing.folder, facts, writing.batch_size, lambda: _jobs(writing), writing.runtime)
    if begun is None and writing.runtime.rank == 0:
        with SkippedLog(writing.out) as skipped:
            counts = {"rows": len(plan), "prompts": len(plan.order), "batches": plan.batches}
            counts |= {"skipped": skipped.count, "sha256": plan.state["sha256"]}
        write_header(writing.out, facts | {"plan": counts} | around)
    return plan


def _jobs(writing: Writing) -> Iterator[Any]:
    rows = tqdm(
        islice(writing.manifest, writing.settings.limit), "planning", len(writing.manifest), unit="row"
    )
    SkippedLog(writing.out).path.unlink(missing_ok=True)  # of a run that was killed while it planned
    with SkippedLog(writing.out) as skipped:
        yield from continuation_jobs(rows, writing.tokenizer, writing.asking, skipped)


def _engine(writing: Writing) -> Engine:
    settings = writing.settings
    if settings.engine_url:
        from blsp.continuation.openai_engine import OpenAIEngine

        return OpenAIEngine(
            url=settings.engine_url,
            model=settings.engine_model or settings.llm,
            decoding=writing.decoding,
            api_key=os.environ.get(settings.api_key_env, ""),
            in_flight=settings.concurrency,
            timeout=settings.timeout,
            attempts=settings.retries + 1,
            body=_body(settings),
            stop_ids=tuple(writing.tokenizer.all_special_ids),
        )
    llm, tokenizer = load_language_model(settings.llm, writing.runtime)
    return TransformersEngine(llm, tokenizer, writing.decoding)


def _prompt(writing: Writing, plan: PromptPlan, job: int) -> Prompt:
    planned = plan.jobs[job]
    ask = plan.asks[int(planned["ask"])]
    text = read_text(writing.manifest[int(planned["row"])], writing.asking.normalise)
    seed = (
        int(planned["prompt"][0]) ^ writing.settings.seed
    ) & 0x7FFFFFFF  # its own, wherever the row stands
    return Prompt(job, ask.instruction, ask.order, text, seed)


def _merge(writing: Writing, plan: PromptPlan, facts: dict[str, Any]) -> int:
    """AnswerLog files -> output rows in input order, and their top-k. Killed here, it is simply done again."""
    k, merged = writing.settings.top_k, writing.folder / "merged.jsonl"
    answers = AnswerReader(writing.folder, len(plan), k)
    with SkippedLog(writing.out) as skipped:
        rows = _rows(writing, plan, answers, skipped)
        count = write_manifest(merged, rows, relative_to=writing.out.absolute().parent)
    if k:
        meta = facts["top_k"] | {"llm_sha256": facts["llm_sha256"], "source": "generated"}
        write_top_k(writing.out, plan, answers, meta)
    answers.close()
    os.replace(merged, writing.out)
    return count


def _rows(
    writing: Writing, plan: PromptPlan, answers: AnswerReader, skipped: SkippedLog
) -> Iterator[dict[str, Any]]:
    silent = {
        "continuation": NO_SPEECH_SENTENCE,
        "continuation_ids": text_ids(writing.tokenizer, NO_SPEECH_SENTENCE),
        "finish": "stop",
    }
    for job in plan.jobs:
        row = writing.manifest[int(job["row"])]
        answer: dict[str, Any] = silent
        if job["first"] != NO_SPEECH:
            fields = answers.fields(int(job["first"]))
            if "refused" in fields:
                skipped.add(row.id, row.audio, fields["refused"])
                continue
            answer = {"continuation": fields["text"], "continuation_ids": fields["ids"]}
            answer["finish"] = fields["finish"]
        asked = asdict(plan.asks[int(job["ask"])])
        kept = {name: value for name, value in answer.items() if value is not None}
        yield _as_read(row, writing.asking.normalise) | asked | kept | {"prompt_tokens": int(job["tokens"])}


def _as_read(row: Utterance, normalise: str) -> dict[str, Any]:
    """The manifest's row; `text` is what the LLM read, and `text_as_given` what it was made from."""
    values, text = row.to_json(), read_text(row, normalise)
    return values | {"text": text, "text_as_given": row.text} if normalise != "none" else values


def write_top_k(out: Path, plan: PromptPlan, answers: AnswerReader, meta: dict[str, Any]) -> None:
    """The top-k folder: steps in the order in which rows first need them, shared by equal prompts."""
    with TopKWriter(topk_folder(out), len(plan), meta["k"]) as writer:
        for number, job in enumerate(plan.jobs):
            first = int(job["first"])
            if first == number:
                ids, logp = answers.top(number)
                writer.point(number, writer.add(ids, logp), len(ids))
            elif first != NO_SPEECH:
                writer.repeat(number, first)
        writer.finish(meta)


def _report(writing: Writing, what: str) -> None:
    with SkippedLog(writing.out) as skipped:
        left_out = f"; {skipped.count} rows left out, listed in {skipped.path}" if skipped.count else ""
    print(f"{writing.out}: {what}{left_out}")
