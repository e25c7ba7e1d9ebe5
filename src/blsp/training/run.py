"""Everything a run needs before its first step: model, data, plan, probes.

In:  the resolved settings of one run (or one stage) and the place it runs at.
Out: `Run`.
Try: ``prepare(settings, find_runtime("cpu"))``
Flow: settings -> **preparation.py** (sources.py, table.py, examples.py, batches.py) -> training/loop.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import PreTrainedTokenizerBase

from blsp.data.corpora.no_speech import no_speech
from blsp.data.corpora.reading import ReadRequest
from blsp.data.jobs import Job, SkippedLog
from blsp.data.manifest import Utterance, write_manifest
from blsp.distributed import Runtime, barrier, shard_language_model
from blsp.features.encode import open_features
from blsp.llm.instructions import NO_SPEECH_SENTENCE
from blsp.llm.language_model import stop_ids
from blsp.llm.prefix import PrefixCache
from blsp.llm.prompt import transcript_ids
from blsp.model.adapter import ADAPTERS, adapter_class, widen_readout
from blsp.model.adapter_parts import num_audio_tokens
from blsp.model.checkpoint import load_mean, new_blsp
from blsp.model.loading import load_tokenizer
from blsp.model.modeling_blsp import BlspForConditionalGeneration
from blsp.model.processing_blsp import BlspProcessor
from blsp.settings import SettingsError, TrainSettings
from blsp.training.batches import DataFile, DataOrder, Rows, cut
from blsp.training.dataset import DataError, Source, Table, choose_teacher, open_sources, open_table
from blsp.training.examples import Example, ExampleReader, Targets, lengths_for
from blsp.training.probes import Probe
from blsp.training.run_state import write_text
from blsp.training.step import Objective
from blsp.weights.digest import Weights, find_weights

PROBE_ROWS = 24  # of each part: divergence to about a tenth of its value, in seconds


@dataclass
class Run:
    """One run, ready for its first step (or for going on)."""

    settings: TrainSettings
    runtime: Runtime
    model: BlspForConditionalGeneration
    processor: BlspProcessor
    prefixes: PrefixCache
    objective: Objective
    reader: ExampleReader
    sources: list[Source]
    table: Table
    plan: DataOrder
    skipped: SkippedLog
    probes: list[Probe]

    @property
    def steps(self) -> int:
        """Optimiser steps from beginning to end."""
        return self.settings.steps or max(1, round(self.settings.epochs * self.plan.steps_per_epoch))

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """What is trained: the adapter."""
        return list(self.model.model.multi_modal_projector.parameters())


def check_adapter(settings: TrainSettings) -> None:
    """Raise SettingsError where the adapter is unknown or cannot learn by the loss."""
    try:
        reads_out = adapter_class(settings.adapter).reads_out
    except ValueError as error:
        raise SettingsError(f"--adapter: {error}") from error
    if settings.loss == "ctc" and not reads_out:
        able = ", ".join(name for name, kind in ADAPTERS.items() if kind.reads_out)
        raise SettingsError(
            f"--loss ctc: needs an adapter that reads out ({able}); {settings.adapter!r} does not"
        )


def prepare(settings: TrainSettings, runtime: Runtime) -> Run:
    """Open the data and the model; the first process writes what all of them read."""
    folder = settings.out
    folder.mkdir(parents=True, exist_ok=True)
    teacher = choose_teacher(settings.data, settings.teacher) if settings.loss == "kl" else "online"
    sources = open_sources(
        settings.data, settings.data_weights, teacher=teacher, temperature=settings.temperature
    )
    if settings.shard_llm and settings.loss == "kl" and teacher == "online":
        raise SettingsError(
            "--shard-llm --loss kl: needs a stored teacher; write it with blsp continue --top-k"
        )
    model, processor = open_model(settings, runtime, sources)
    check_teacher(sources, model)
    objective = objective_of(settings, stored=teacher == "stored")
    reader = reader_of(settings, model, processor)
    if settings.no_speech:
        sources = [*sources, _no_speech_source(settings, runtime)]
    if settings.cache is not None:
        # a run that goes on has looked at every row already
        rows = [] if (folder / "table.json").exists() else [source.rows for source in sources]
        reader.cache = open_features(settings.cache, model, processor, rows, runtime)
    skipped = SkippedLog(settings.out if runtime.rank == 0 else f"{settings.out}.rank{runtime.rank}")
    if runtime.rank == 0:
        open_table(sources, reader, folder, skipped, settings.held_out, reader.pairs)
    barrier(runtime)
    table = open_table(sources, reader, folder, skipped, settings.held_out, reader.pairs)
    if settings.activation_checkpointing:
        model.model.language_model.activation_checkpointing_enable()
    prefixes = PrefixCache(model, reuse=not settings.shard_llm)
    plan = plan_of(settings, sources, table)
    probes = open_probes(reader, table, sources)
    return Run(
        settings,
        runtime,
        model,
        processor,
        prefixes,
        objective,
        reader,
        sources,
        table,
        plan,
        skipped,
        probes,
    )


# --- what is learnt, and from what ------------------------------------------------------------------------


def objective_of(settings: TrainSettings, stored: bool) -> Objective:
    """ctc alone has weight 1; under ce and kl an adapter that reads out keeps `--ctc-weight` of it."""
    weight = settings.ctc_weight if adapter_class(settings.adapter).reads_out else 0.0
    weight = 1.0 if settings.loss == "ctc" else weight
    return Objective(settings.loss, settings.temperature, stored, weight, settings.negatives)


def reader_of(
    settings: TrainSettings, model: BlspForConditionalGeneration, processor: BlspProcessor
) -> ExampleReader:
    """How rows become examples for this model and this loss."""
    reads_out = model.model.reads_out
    taught = Targets(
        settings.loss, reads_out, reads_out and (settings.loss == "ctc" or settings.ctc_weight > 0)
    )
    strides = model.model.multi_modal_projector.strides
    return ExampleReader(
        taught=taught,
        tokenizer=processor.tokenizer,
        extractor=processor.feature_extractor,
        num_audio_tokens=partial(num_audio_tokens, strides=strides),
        end=end_token(model, processor.tokenizer),
        no_speech_sentence=model.config.no_speech_sentence,
        classes={token: 1 + index for index, token in enumerate(model.model.readout_ids())}
        if taught.ctc
        else {},
        augmentation=settings.augment,
        full_window=settings.pad_to_30s,
        max_seconds=settings.max_seconds,
        seed=settings.seed,
    )


def _no_speech_source(settings: TrainSettings, runtime: Runtime) -> Source:
    """Made silence and noise, weighted to be `--no-speech` of the other rows."""
    folder = settings.out / "no_speech"
    if runtime.rank == 0:
        write_no_speech(folder, settings.seed)
    barrier(runtime)
    (source,) = open_sources([str(write_no_speech(folder, settings.seed))])
    return replace(source, weight=settings.no_speech, share=True)


def plan_of(settings: TrainSettings, sources: list[Source], table: Table) -> DataOrder:
    """The order of the data; a source with `share` is weighted by the others' rows."""
    counts = table.per_source
    others = sum(round(n * s.weight) for n, s in zip(counts, sources, strict=True) if not s.share)
    files, start = [], 0
    for count, source in zip(counts, sources, strict=True):
        weight = source.weight * others / max(1, count) if source.share else source.weight
        files.append(DataFile(start, count, weight))
        start += count
    plan = DataOrder(tuple(files), settings.batch_size, settings.seed)
    if not plan.per_epoch:
        raise DataError(f"{', '.join(settings.data)}: every file has weight 0")
    return plan


def open_probes(reader: ExampleReader, table: Table, sources: list[Source]) -> list[Probe]:
    """The clips that divergence is measured on, always the same ones; never augmented."""
    plain = replace(reader, augmentation=())
    probes = []
    for part, rows in (("held_out", table.held_out), ("train", table.rows)):
        order = np.random.default_rng(0).permutation(len(rows))[: 2 * PROBE_ROWS]
        examples = [plain.example(rows[i], sources, epoch=0) for i in order if not rows[i]["no_speech"]]
        probes.append(Probe(part, [e for e in examples if isinstance(e, Example)][:PROBE_ROWS]))
    return probes


def step_examples(run: Run, first: int) -> Iterator[tuple[int, list[list[Example]]]]:
    """(step, this process' micro-batches) from step `first` to the end; made by the prefetch thread."""
    codes: dict[tuple[int, ...], int] = {}

    def lengths_of(rows: Rows) -> Rows:
        return lengths_for(run.reader, run.table.rows[rows])

    for step, rows in enumerate(run.plan.steps(first, lengths_of), start=first):
        if step >= run.steps:
            return
        places = run.table.rows[rows[run.runtime.rank :: run.runtime.world]]
        groups = [codes.setdefault(run.reader.prompt_of(place).prefix_ids, len(codes)) for place in places]
        batches = cut(
            np.arange(len(places)),
            lengths_for(run.reader, places),
            np.array(groups),
            run.settings.batch_tokens,
        )
        epoch = run.plan.epoch(step)
        made = [[_example(run, places[i], epoch) for i in batch] for batch in batches]
        kept = [[example for example in batch if example is not None] for batch in made]
        yield step, [batch for batch in kept if batch]


def _example(run: Run, place: np.void, epoch: int) -> Example | None:
    """The example, or None with a line in the skip list: what could not be known from the header alone."""
    example = run.reader.example(place, run.sources, epoch)
    if isinstance(example, Example):
        return example
    row = run.sources[int(place["source"])].rows[int(place["row"])]
    run.skipped.add(row.id, row.audio, example)
    return None


def open_model(
    settings: TrainSettings, runtime: Runtime, sources: list[Source]
) -> tuple[BlspForConditionalGeneration, BlspProcessor]:
    """The frozen parts with a fresh adapter, or with the one to start from; only the adapter is trainable."""
    if runtime.dtype == torch.float16:
        raise SettingsError("--dtype float16: its gradients overflow; train in bfloat16 or float32")
    whole = runtime
    if settings.shard_llm:  # too large for this device until it is spread
        runtime = replace(runtime, device=torch.device("cpu"))
    audio_model, llm = find_weights(settings.audio_model), find_weights(settings.llm)
    options = {name: yaml.safe_load(value) for name, value in map(_option, settings.adapter_options)}
    if not settings.init_from:
        reads_out = adapter_class(settings.adapter).reads_out
        vocabulary = _readout_vocabulary(settings, llm, runtime, sources) if reads_out else None
        model, processor = new_blsp(
            audio_model,
            llm,
            runtime,
            adapter=settings.adapter,
            adapter_options=options,
            readout_vocabulary=vocabulary,
            full_window=settings.pad_to_30s,
            seed=settings.seed,
        )
        model.config.no_speech_sentence = NO_SPEECH_SENTENCE
    else:
        model, processor = load_mean(settings.init_from, runtime)
        _check_start(settings, audio_model, llm, model, options)
        if model.config.readout_size is not None:
            tokens = _readout_vocabulary(settings, llm, runtime, sources)
            every = range(model.config.text_config.vocab_size)
            widen_readout(
                model.model.multi_modal_projector, model.config, tokens or every, processor.tokenizer
            )
    if settings.shard_llm:
        shard_language_model(model.model.language_model, whole)
        model.to(whole.device)
    projector = model.model.multi_modal_projector
    projector.to(torch.float64 if runtime.dtype == torch.float64 else torch.float32)
    projector.requires_grad_(True).train()
    return model, processor


def _option(flag: str) -> tuple[str, str]:
    name, equals, value = flag.partition("=")
    if not equals:
        raise SettingsError(f"--adapter-options {flag}: must read NAME=VALUE, as in strides=[2,2,1]")
    return name.replace("-", "_"), value


def _check_start(
    settings: TrainSettings,
    audio_model: Weights,
    llm: Weights,
    model: BlspForConditionalGeneration,
    options: dict[str, Any],
) -> None:
    """The adapter to start from must be what the other flags say."""
    start, config = " ".join(settings.init_from), model.config
    if config.adapter != settings.adapter:
        raise SettingsError(f"--init-from {start}: is a {config.adapter} adapter, not {settings.adapter}")
    differing = {name for name, value in options.items() if (config.adapter_options or {}).get(name) != value}
    if differing:
        raise SettingsError(
            f"--init-from {start}: has other {', '.join(differing)}; leave out --adapter-options"
        )
    if config.full_window != settings.pad_to_30s:
        raise SettingsError(f"--init-from {start}: was trained with --pad-to-30s {config.full_window}")
    for flag, weights, digest in (
        ("--audio-model", audio_model, config.audio_model_sha256),
        ("--llm", llm, config.text_model_sha256),
    ):
        if weights.sha256 != digest:
            raise SettingsError(
                f"--init-from {start}: was trained with other weights than {flag} {weights.name}"
            )


def _readout_vocabulary(
    settings: TrainSettings, llm: Weights, runtime: Runtime, sources: list[Source]
) -> list[int] | None:
    """The LLM's tokens that occur in the transcripts, or all of them; kept in the run folder."""
    if settings.readout == "full":
        return None
    path = settings.out / "vocabulary.json"
    if runtime.rank == 0 and not path.exists():
        tokenizer = load_tokenizer(llm)
        found: set[int] = set()
        for source in sources:
            for row in source.rows:
                found.update(transcript_ids(tokenizer, row.text) if row.text.strip() else ())
        if not found:
            raise DataError(f"{', '.join(settings.data)}: no transcripts, so there is nothing to read out")
        write_text(path, json.dumps(sorted(found)))
    barrier(runtime)
    return json.loads(path.read_text(encoding="utf-8"))


def check_teacher(sources: list[Source], model: BlspForConditionalGeneration) -> None:
    """The continuations, and their stored teacher, must come from the LLM that is trained against.

    Files that do not say who wrote them (behind a URL, or by other means) are taken at their word.
    """
    for source in sources:
        digest = (Job(source.path).header() or {}).get("llm_sha256")
        if source.teacher is not None:
            digest = source.teacher.meta.get("llm_sha256")
        if digest is not None and digest != model.config.text_model_sha256:
            raise DataError(
                f"{source.path}: was written by another LLM (digest {digest[:12]}…) than --llm "
                f"{model.config.text_model_id} ({str(model.config.text_model_sha256)[:12]}…); the LLM "
                "that will listen must be the one that wrote: run blsp continue with it"
            )


def end_token(model: BlspForConditionalGeneration, tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an answer: the tokenizer's end of sequence where the LLM stops at it."""
    ends = stop_ids(model)
    return tokenizer.eos_token_id if tokenizer.eos_token_id in ends else ends[0]


CLIPS = 64


def write_no_speech(folder: Path, seed: int) -> Path:
    """The manifest's path; what is there already is not made again."""
    manifest = folder / "no_speech.jsonl"
    if not manifest.exists():
        folder = folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        request = ReadRequest("", "", None, None, made_audio=folder, limit=CLIPS, seed=seed)
        rows = (row for row in no_speech(request) if isinstance(row, Utterance))
        write_manifest(manifest, rows, relative_to=folder)
    return manifest
