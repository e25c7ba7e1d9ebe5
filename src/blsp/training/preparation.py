"""Everything a run needs before its first step: model, data, plan, probes.

In:  the resolved settings of one run (or one stage) and the place it runs at.
Out: `Run`.
Try: ``prepare(settings, find_place("cpu"))``
Flow: settings -> **preparation.py** (sources.py, table.py, examples.py, batches.py) -> training/loop.py
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from blsp.data.manifest import SkippedLog
from blsp.model.distributed import Place, barrier
from blsp.model.features import open_features
from blsp.model.modeling_blsp import BlspForConditionalGeneration
from blsp.model.processing_blsp import BlspProcessor
from blsp.settings import SettingsError, TrainSettings
from blsp.training.batches import DataFile, Plan, Rows, cut
from blsp.training.examples import Example, ExampleReader, Taught, lengths_for
from blsp.training.no_speech import write_no_speech
from blsp.training.opening import check_teacher, end_token, open_model
from blsp.training.probes import Probe
from blsp.training.prompted_llm import PromptedLLM
from blsp.training.sources import DataError, Source, choose_teacher, open_sources
from blsp.training.step import Objective
from blsp.training.table import Table, open_table

PROBE_ROWS = 24  # of each part: divergence to about a tenth of its value, in seconds


@dataclass
class Run:
    """One run, ready for its first step (or for going on)."""

    settings: TrainSettings
    place: Place
    model: BlspForConditionalGeneration
    processor: BlspProcessor
    llm: PromptedLLM
    objective: Objective
    reader: ExampleReader
    sources: list[Source]
    table: Table
    plan: Plan
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


def prepare(settings: TrainSettings, place: Place) -> Run:
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
    model, processor = open_model(settings, place, sources)
    check_teacher(sources, model)
    objective = objective_of(settings, stored=teacher == "stored")
    reader = reader_of(settings, model, processor)
    if settings.no_speech:
        sources = [*sources, _no_speech_source(settings, place)]
    if settings.cache is not None:
        # a run that goes on has looked at every row already
        rows = [] if (folder / "table.json").exists() else [source.rows for source in sources]
        reader.cache = open_features(settings.cache, model, processor, rows, place)
    skipped = SkippedLog(settings.out if place.rank == 0 else f"{settings.out}.rank{place.rank}")
    if place.rank == 0:
        open_table(sources, reader, folder, skipped, settings.held_out, reader.pairs)
    barrier(place)
    table = open_table(sources, reader, folder, skipped, settings.held_out, reader.pairs)
    llm = PromptedLLM(model, settings.activation_checkpointing, reuse_prefix=not settings.shard_llm)
    plan = plan_of(settings, sources, table)
    probes = open_probes(reader, table, sources)
    return Run(
        settings, place, model, processor, llm, objective, reader, sources, table, plan, skipped, probes
    )


# --- what is learnt, and from what ------------------------------------------------------------------------


def objective_of(settings: TrainSettings, stored: bool) -> Objective:
    """ctc alone has weight 1; under ce and kl a grounded adapter keeps `--ctc-weight` of it."""
    weight = settings.ctc_weight if settings.adapter == "grounded" else 0.0
    weight = 1.0 if settings.loss == "ctc" else weight
    return Objective(settings.loss, settings.temperature, stored, weight, settings.negatives)


def reader_of(
    settings: TrainSettings, model: BlspForConditionalGeneration, processor: BlspProcessor
) -> ExampleReader:
    """How rows become examples for this model and this loss."""
    grounded = settings.adapter == "grounded"
    taught = Taught(settings.loss, grounded, grounded and (settings.loss == "ctc" or settings.ctc_weight > 0))
    vocabulary = model.config.readout_vocabulary or range(model.config.text_config.vocab_size)
    adapter: Any = model.model.multi_modal_projector
    return ExampleReader(
        taught=taught,
        tokenizer=processor.tokenizer,
        extractor=processor.feature_extractor,
        places=adapter.places,
        end=end_token(model, processor.tokenizer),
        no_speech_sentence=model.config.no_speech_sentence,
        classes={token: 1 + index for index, token in enumerate(vocabulary)} if taught.ctc else {},
        augmentation=settings.augment,
        full_window=settings.pad_to_30s,
        max_seconds=settings.max_seconds,
        seed=settings.seed,
    )


def _no_speech_source(settings: TrainSettings, place: Place) -> Source:
    """Made silence and noise, weighted to be `--no-speech` of the other rows."""
    folder = settings.out / "no_speech"
    if place.rank == 0:
        write_no_speech(folder, settings.seed)
    barrier(place)
    (source,) = open_sources([str(write_no_speech(folder, settings.seed))])
    return replace(source, weight=settings.no_speech, share=True)


def plan_of(settings: TrainSettings, sources: list[Source], table: Table) -> Plan:
    """The order of the data; a source with `share` is weighted by the others' rows."""
    counts = table.per_source
    others = sum(round(n * s.weight) for n, s in zip(counts, sources, strict=True) if not s.share)
    files, start = [], 0
    for count, source in zip(counts, sources, strict=True):
        weight = source.weight * others / max(1, count) if source.share else source.weight
        files.append(DataFile(start, count, weight))
        start += count
    plan = Plan(tuple(files), settings.batch_size, settings.seed)
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
        places = run.table.rows[rows[run.place.rank :: run.place.world]]
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
