"""Everything before the first step: model, objective, data, order of the data, probes.

In:  the resolved settings of one run (or of one stage), and the `Runtime`.
Out: `Run`, which does not change during training.
Try: ``prepare(settings, find_runtime("cpu"))``
Flow: settings -> **run.py** (dataset.py, examples.py, batches.py, probes.py) -> training/loop.py
"""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedTokenizerBase

from blsp.data.corpora.no_speech import no_speech
from blsp.data.corpora.reading import ReadRequest
from blsp.data.files import write_text
from blsp.data.jobs import SkippedLog
from blsp.data.manifest import Utterance, write_manifest
from blsp.distributed import Runtime, barrier
from blsp.features.align import TokenTimes
from blsp.features.encode import open_features
from blsp.llm.instructions import NO_SPEECH_SENTENCE
from blsp.llm.language_model import stop_ids
from blsp.llm.prefix import PrefixCache
from blsp.llm.prompt import text_ids, transcript_ids
from blsp.model.adapter import ADAPTERS, AdapterError, adapter_class, check_options, default_options, widen_readout
from blsp.model.adapter_parts import num_audio_tokens, place_centres
from blsp.model.checkpoint import load_mean, new_blsp, set_template_args
from blsp.model.loading import load_tokenizer, warn_of_languages
from blsp.model.lora import add_lora, lora_options, lora_weights
from blsp.model.modeling_blsp import BlspForConditionalGeneration
from blsp.model.processing_blsp import BlspProcessor
from blsp.settings import SettingsError, TrainSettings
from blsp.settings.shared import read_template_args
from blsp.training.batches import DataFile, DataOrder
from blsp.training.dataset import (
    DataError,
    Dataset,
    Source,
    check_teacher,
    choose_teacher,
    open_dataset,
    open_sources,
    shared_template_args,
)
from blsp.training.examples import ExampleReader, RowMeasurer, RowTexts, Targets
from blsp.training.probes import Probe, open_probes, open_validation, validation_sources
from blsp.training.step import LOSSES, Objective
from blsp.weights.digest import Weights, find_weights

NO_SPEECH_CLIPS = 64  # clips that --no-speech makes


@dataclass(frozen=True)
class Run:
    """One run, prepared for its first step, or for the step after its newest checkpoint."""

    settings: TrainSettings
    runtime: Runtime
    model: BlspForConditionalGeneration
    processor: BlspProcessor
    prefixes: PrefixCache
    objective: Objective
    dataset: Dataset
    order: DataOrder
    reader: ExampleReader
    skipped: SkippedLog
    probes: tuple[Probe, ...]

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.settings.steps or max(1, round(self.settings.epochs * self.order.steps_per_epoch))

    @property
    def weights(self) -> dict[str, torch.nn.Parameter]:
        """The trained parameters by name: of the adapter, and of LoRA if it is used."""
        return dict(self.model.model.multi_modal_projector.named_parameters()) | lora_weights(self.model)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The trained parameters, without names."""
        return list(self.weights.values())


def prepare(settings: TrainSettings, runtime: Runtime) -> Run:
    """Open the data and the model; the first process writes the files that all processes read."""
    shard_llm = settings.shard_llm and runtime.world > 1
    runtime = replace(runtime, shard_llm=shard_llm, attention=settings.attn_implementation)

    # The loss and the data files
    stored = has_stored_teacher(settings)
    sources = data_sources(settings, runtime, stored)
    validation = validation_sources(settings.val_data)
    others = list(validation.values())
    objective = objective_of(settings, stored)
    targets = targets_of(settings, objective)

    # The frozen parts and the adapter
    model, processor = open_model(settings, runtime, sources)
    for source in sources if runtime.rank == 0 else ():
        warn_of_languages(model.config.audio_config, model.config.audio_model_id, source.rows)
    check_teacher(sources, model.config.text_model_id, model.config.text_model_sha256)
    if settings.activation_checkpointing:
        model.model.language_model.activation_checkpointing_enable()
    # key/values of a prefix are kept without gradients, and as long as the LLM does not change
    prefixes = PrefixCache(model, reuse=not settings.shard_llm and "llm" not in settings.lora)

    # Features and measured rows; a resumed run has both
    cache = None
    if settings.cache is not None:
        to_encode = [] if (settings.out / "table.json").exists() else [source.rows for source in [*sources, *others]]
        cache = open_features(settings.cache, model, processor, to_encode, runtime, settings.out / "features")
    times = TokenTimes(cache) if cache is not None and "token_times" in targets else None
    if "token_times" in targets or "fits" in targets:
        objective = replace(objective, filler=filler_token(settings, processor.tokenizer))
    if times is not None and not len(times):
        raise SettingsError(f"{settings.cache}: no token times; run blsp align over the manifests, or use embed-ctc")
    end = end_token(model, processor.tokenizer)
    texts = RowTexts(processor.tokenizer, end, model.config.no_speech_sentence)
    measurer = RowMeasurer(targets, texts, cache, settings.max_seconds)
    skipped = SkippedLog(settings.out if runtime.rank == 0 else f"{settings.out}.rank{runtime.rank}")
    dataset = open_dataset(sources, measurer, settings.out, skipped, settings.held_out, runtime)

    # The order of the rows, and the reader of their examples
    classes = {token: 1 + row for token, row in model.model.readout_row().items()}
    strides: Any = model.model.multi_modal_projector.strides
    reader = ExampleReader(
        targets,
        texts,
        dataset,
        processor.feature_extractor,
        partial(num_audio_tokens, strides=strides),
        classes=classes if "readout" in targets else {},
        cache=cache,
        times=times,
        centres=place_centres(model.model.multi_modal_projector),
        augmentation=settings.augment,
        full_window=settings.pad_to_30s,
        seed=settings.seed,
    )
    order, probes = data_order(settings, dataset), open_probes(reader)
    probes += open_validation(reader, validation, measurer, settings.out, runtime)
    return Run(settings, runtime, model, processor, prefixes, objective, dataset, order, reader, skipped, probes)


# --- the loss ---------------------------------------------------------------------------------------------
def check_loss(settings: TrainSettings) -> None:
    """Raise SettingsError if the adapter or the loss is not known, or if they do not fit each other."""
    try:
        reads_out = adapter_class(settings.adapter).reads_out
        check_options(settings.adapter, [_option(flag)[0] for flag in settings.adapter_options])
    except AdapterError as error:
        raise SettingsError(f"--adapter, --adapter-options: {error}") from error
    if settings.loss not in LOSSES:
        raise SettingsError(f"--loss {settings.loss}: must be one of {', '.join(LOSSES)}")
    if "readout" in LOSSES[settings.loss].needs and not reads_out:
        able = ", ".join(name for name, kind in ADAPTERS.items() if kind.reads_out)
        raise SettingsError(
            f"--loss {settings.loss}: needs an adapter that reads out ({able}); {settings.adapter!r} does not"
        )
    if "llm" in settings.lora and not LOSSES[settings.loss].runs_llm:
        raise SettingsError(f"--lora llm: --loss {settings.loss} does not run the LLM; give it in the stage that does")
    if reads_out and (settings.embed_weight or LOSSES[settings.loss].needs & {"token_times", "fits"}):
        raise SettingsError(
            "--loss embed, embed-ctc and --embed-weight: for adapters that do not read out (conv, stack)"
        )
    if settings.cache is None and "token_times" in LOSSES[settings.loss].needs:
        raise SettingsError("--loss embed: needs --cache with token times: run blsp align first, or use embed-ctc")


def has_stored_teacher(settings: TrainSettings) -> bool:
    """Whether the text route's distribution is read from the data; otherwise the LLM is run for it."""
    if "teacher" not in LOSSES[settings.loss].needs:
        return False
    stored = choose_teacher(settings.data, settings.teacher) == "stored"
    if settings.shard_llm and not stored:
        raise SettingsError(
            f"--shard-llm --loss {settings.loss}: needs a stored teacher; write it with blsp continue --top-k"
        )
    return stored


def objective_of(settings: TrainSettings, stored: bool) -> Objective:
    """The loss with weight 1; a loss of the LLM gets a second: ctc (adapters that read out) or embed-ctc (others)."""
    terms: dict[str, float] = {settings.loss: 1.0}
    reads_out = adapter_class(settings.adapter).reads_out
    further, weight = ("ctc", settings.ctc_weight) if reads_out else ("embed-ctc", settings.embed_weight)
    if LOSSES[settings.loss].runs_llm and weight:
        terms[further] = weight
    return Objective(terms, settings.temperature, stored, settings.negatives)


def filler_token(settings: TrainSettings, tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of `--filler`, which must be one token of the LLM."""
    ids = text_ids(tokenizer, settings.filler)
    if len(ids) != 1:
        raise SettingsError(f"--filler {settings.filler!r}: is {len(ids)} tokens of {settings.llm}; name one")
    return ids[0]


def targets_of(settings: TrainSettings, objective: Objective) -> Targets:
    """The targets that examples need for the loss, and may have for its further terms."""
    needs = LOSSES[settings.loss].needs
    extras = frozenset().union(*(LOSSES[name].needs for name in objective.terms)) - needs
    return Targets(needs, extras, objective.runs_llm, adapter_class(settings.adapter).reads_out)


# --- data -------------------------------------------------------------------------------------------------
def data_sources(settings: TrainSettings, runtime: Runtime, stored_teacher: bool) -> list[Source]:
    """The files of --data, and for --no-speech generated clips of silence and noise."""
    sources = open_sources(
        settings.data, settings.data_weights, stored_teacher=stored_teacher, temperature=settings.temperature
    )
    if not settings.no_speech:
        return sources
    manifest = settings.out / "no_speech" / "no_speech.jsonl"
    if runtime.rank == 0:
        write_no_speech(manifest, settings.seed)
    barrier(runtime)
    (silence,) = open_sources([str(manifest)])
    return [*sources, replace(silence, weight=settings.no_speech, share=True)]


def write_no_speech(manifest: Path, seed: int) -> None:
    """Generate clips of silence and noise with their manifest, unless it exists."""
    if manifest.exists():
        return
    folder = manifest.parent.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    request = ReadRequest("", "", None, None, made_audio=folder, limit=NO_SPEECH_CLIPS, seed=seed)
    rows = (row for row in no_speech(request) if isinstance(row, Utterance))
    write_manifest(folder / manifest.name, rows, relative_to=folder)


def data_order(settings: TrainSettings, dataset: Dataset) -> DataOrder:
    """The order of the data; a source with `share` is weighted by the others' rows."""
    counted = list(zip(dataset.per_source, dataset.sources, strict=True))
    others = sum(round(count * source.weight) for count, source in counted if not source.share)
    files, start = [], 0
    for count, source in counted:
        weight = source.weight * others / max(1, count) if source.share else source.weight
        files.append(DataFile(start, count, weight))
        start += count
    order = DataOrder(tuple(files), settings.batch_size, settings.seed)
    if not order.per_epoch:
        raise DataError(f"{', '.join(settings.data)}: every file has weight 0")
    return order


# --- the model --------------------------------------------------------------------------------------------
def open_model(
    settings: TrainSettings, runtime: Runtime, sources: list[Source]
) -> tuple[BlspForConditionalGeneration, BlspProcessor]:
    """The frozen parts with a new adapter, or with the one to start from; it is trainable, and so is LoRA if used."""
    if runtime.dtype == torch.float16:
        raise SettingsError("--dtype float16: its gradients overflow; train in bfloat16 or float32")
    audio_model, llm = find_weights(settings.audio_model), find_weights(settings.llm)
    args = shared_template_args(sources, read_template_args(settings.template_arg, settings.no_thinking))
    options = dict(map(_option, settings.adapter_options))
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
            template_args=args,
            seed=settings.seed,
        )
        model.config.no_speech_sentence = NO_SPEECH_SENTENCE
    else:
        model, processor = load_mean(settings.init_from, runtime, settings.audio_model, settings.llm)
        _check_start(settings, model, options)
        set_template_args(model, processor, args, " ".join(settings.init_from))
        if model.config.readout_size is not None:
            tokens = _readout_vocabulary(settings, llm, runtime, sources)
            every = range(model.config.text_config.vocab_size)
            widen_readout(model.model.multi_modal_projector, model.config, tokens or every, processor.tokenizer)
    lora = lora_options(settings.lora, settings.lora_rank)
    if lora is not None and model.config.lora is None:
        add_lora(model, lora, seed=settings.seed)
    projector = model.model.multi_modal_projector
    projector.to(torch.float64 if runtime.dtype == torch.float64 else torch.float32)
    projector.requires_grad_(True).train()
    for weight in lora_weights(model).values():
        weight.requires_grad_(True)
    return model, processor


def _option(flag: str) -> tuple[str, Any]:
    """The name and the value of a flag of --adapter-options."""
    name, equals, value = flag.partition("=")
    if not equals:
        raise SettingsError(f"--adapter-options {flag}: must read NAME=VALUE, as in strides=[2,2,1]")
    try:
        return name.replace("-", "_"), yaml.safe_load(value)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "a special character"
        raise SettingsError(f"--adapter-options {flag}: its value is not YAML ({problem})") from error


def _check_start(settings: TrainSettings, model: BlspForConditionalGeneration, options: dict[str, Any]) -> None:
    """Raise SettingsError unless the adapter to start from agrees with the other flags."""
    start, config = " ".join(settings.init_from), model.config
    if config.adapter != settings.adapter:
        raise SettingsError(f"--init-from {start}: is a {config.adapter} adapter, not {settings.adapter}")
    built = default_options(config.adapter) | (config.adapter_options or {})
    for name, value in options.items():
        has = list(built[name]) if isinstance(built[name], tuple) else built[name]
        if name != "embedding_std" and has != value:  # that one sets only the first values
            raise SettingsError(
                f"--init-from {start}: was built with {name}={has}, not {value}; name another adapter, or leave out "
                f"{name} (--adapter-options, --paper)"
            )
    if config.full_window != settings.pad_to_30s:
        raise SettingsError(f"--init-from {start}: was trained with --pad-to-30s {config.full_window}")
    if config.lora not in (None, lora_options(settings.lora, settings.lora_rank)):
        raise SettingsError(
            f"--init-from {start}: was trained with --lora {' '.join(config.lora['parts'])} "
            f"--lora-rank {config.lora['rank']}; give these"
        )


def _readout_vocabulary(
    settings: TrainSettings, llm: Weights, runtime: Runtime, sources: list[Source]
) -> list[int] | None:
    """The LLM's tokens that occur in the transcripts (kept in the run folder); None for the whole vocabulary."""
    if settings.readout == "full":
        return None
    path = settings.out / "vocabulary.json"
    if runtime.rank == 0 and not path.exists():
        tokenizer = load_tokenizer(llm)
        tokens: set[int] = set()
        for source in sources:
            for row in source.rows:
                tokens.update(transcript_ids(tokenizer, row.text) if row.text.strip() else ())
        if not tokens:
            raise DataError(f"{', '.join(settings.data)}: no transcripts, so there is nothing to read out")
        write_text(path, json.dumps(sorted(tokens)))
    barrier(runtime)
    return json.loads(path.read_text(encoding="utf-8"))


def end_token(model: BlspForConditionalGeneration, tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an answer: the tokenizer's end of sequence, if the LLM stops at it."""
    ends = stop_ids(model)
    return tokenizer.eos_token_id if tokenizer.eos_token_id in ends else ends[0]
