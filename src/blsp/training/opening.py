"""The model of a run: frozen parts with a fresh adapter, or with the one to start from.

In:  the settings, the data files (for the read-out vocabulary). Out: model and processor; only the adapter learns.
Try: `model, processor = open_model(settings, find_place("cpu"), sources)`
Flow: settings -> **opening.py** -> training/preparation.py
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch
import yaml
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from blsp.continuation.header import header_path, read_header
from blsp.continuation.prompts import NO_SPEECH_SENTENCE
from blsp.model.checkpoint import load_mean, new_blsp
from blsp.model.digest import tensor_digest
from blsp.model.distributed import Place, barrier, shard_language_model
from blsp.model.embedded import resolve_weights
from blsp.model.language_model import stop_ids
from blsp.model.modeling_blsp import BlspForConditionalGeneration
from blsp.model.processing_blsp import BlspProcessor
from blsp.model.prompt import transcript_ids
from blsp.model.readout import widen_readout
from blsp.model.spelling import token_strings
from blsp.settings import SettingsError, TrainSettings
from blsp.training.run_state import write_text
from blsp.training.sources import DataError, Source


def open_model(
    settings: TrainSettings, place: Place, sources: list[Source]
) -> tuple[BlspForConditionalGeneration, BlspProcessor]:
    """The frozen parts with a fresh adapter, or with the one to start from; only the adapter is trainable."""
    if place.dtype == torch.float16:
        raise SettingsError("--dtype float16: its gradients overflow; train in bfloat16 or float32")
    whole = place
    if settings.shard_llm:  # too large for this device until it is spread
        place = replace(place, device=torch.device("cpu"))
    options = {name: yaml.safe_load(value) for name, value in map(_option, settings.adapter_options)}
    if not settings.init_from:
        vocabulary = _readout_vocabulary(settings, place, sources) if settings.adapter == "grounded" else None
        model, processor = new_blsp(
            settings.audio_model,
            settings.llm,
            place,
            adapter=settings.adapter,
            adapter_options=options,
            readout_vocabulary=vocabulary,
            full_window=settings.pad_to_30s,
            seed=settings.seed,
        )
        model.config.no_speech_sentence = NO_SPEECH_SENTENCE
    else:
        model, processor = load_mean(settings.init_from, place)
        _check_start(settings, model, options)
        if model.config.readout_vocabulary is not None:
            tokens = _readout_vocabulary(settings, place, sources)
            widen_readout(
                model.model,
                tokens or range(model.config.text_config.vocab_size),
                lambda ids: token_strings(processor.tokenizer, ids),
            )
    if settings.shard_llm:
        shard_language_model(model.model.language_model, whole)
        model.to(whole.device)
    projector = model.model.multi_modal_projector
    projector.to(torch.float64 if place.dtype == torch.float64 else torch.float32)
    projector.requires_grad_(True).train()
    return model, processor


def _option(flag: str) -> tuple[str, str]:
    name, equals, value = flag.partition("=")
    if not equals:
        raise SettingsError(f"--adapter-options {flag}: must read NAME=VALUE, as in strides=[2,2,1]")
    return name.replace("-", "_"), value


def _check_start(
    settings: TrainSettings, model: BlspForConditionalGeneration, options: dict[str, Any]
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
    for flag, name, digest in (
        ("--audio-model", settings.audio_model, config.audio_model_sha256),
        ("--llm", settings.llm, config.text_model_sha256),
    ):
        if tensor_digest(resolve_weights(name)) != digest:
            raise SettingsError(f"--init-from {start}: was trained with other weights than {flag} {name}")


def _readout_vocabulary(settings: TrainSettings, place: Place, sources: list[Source]) -> list[int] | None:
    """The LLM's tokens that occur in the transcripts, or all of them; kept in the run folder."""
    if settings.readout == "full":
        return None
    path = settings.out / "vocabulary.json"
    if place.rank == 0 and not path.exists():
        tokenizer = AutoTokenizer.from_pretrained(resolve_weights(settings.llm))
        found: set[int] = set()
        for source in sources:
            for row in source.rows:
                found.update(transcript_ids(tokenizer, row.text) if row.text.strip() else ())
        if not found:
            raise DataError(f"{', '.join(settings.data)}: no transcripts, so there is nothing to read out")
        write_text(path, json.dumps(sorted(found)))
    barrier(place)
    return json.loads(path.read_text(encoding="utf-8"))


def check_teacher(sources: list[Source], model: BlspForConditionalGeneration) -> None:
    """The continuations, and their stored teacher, must come from the LLM that is trained against.

    Files that do not say who wrote them (behind a URL, or by other means) are taken at their word.
    """
    for source in sources:
        digest = read_header(source.path).get("llm_sha256") if header_path(source.path).exists() else None
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
