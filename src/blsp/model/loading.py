"""Loading of the frozen parts by name, and of a whole model from an adapter folder.

In:  the weights of an encoder or an LLM, or an adapter folder.
Out: modules in eval mode without gradients, and the mel extractor and tokenizer that belong to them.
Try: `llm, tokenizer = load_language_model(find_weights("embedded:smollm2-135m-instruct"), find_runtime())`
Flow: weights/ → **loading.py** → modeling_blsp.py, checkpoint.py; also `blsp encode` and `blsp continue`.

An adapter fits the very weights it was trained between: their digests are checked, and a mismatch is an
error. No tensor is ever left at a random value.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    WhisperFeatureExtractor,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils import logging as transformers_logging

from blsp.distributed import Runtime, find_runtime
from blsp.llm.chat_template import fix_tokenizer
from blsp.llm.language_model import check_supported
from blsp.model.adapter import load_adapter, set_vocabulary
from blsp.model.configuration_blsp import BlspConfig, CheckpointError
from blsp.weights.digest import Weights, find_weights

ENCODER_KEYS = {r"^(model\.)?encoder\.": ""}  # the encoder's tensors inside a whole Whisper checkpoint


@dataclass(frozen=True)
class FrozenParts:
    """The parts that are never trained, with the mel extractor and the tokenizer they need."""

    tower: WhisperEncoder
    llm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    extractor: WhisperFeatureExtractor


def load_language_model(
    weights: Weights, runtime: Runtime, template_args: Mapping[str, Any] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The text LLM, frozen, in eval mode on `runtime.device`, and its tokenizer."""
    check_supported(AutoConfig.from_pretrained(weights.folder))
    llm = AutoModelForCausalLM.from_pretrained(weights.folder, dtype=runtime.dtype).to(runtime.device)
    return freeze(llm), load_tokenizer(weights, template_args)


def load_tokenizer(weights: Weights, template_args: Mapping[str, Any] | None = None) -> PreTrainedTokenizerBase:
    """The LLM's tokenizer, without its weights; its chat template has these variables and a fixed date."""
    return fix_tokenizer(AutoTokenizer.from_pretrained(weights.folder), template_args)


def load_speech_encoder(weights: Weights, runtime: Runtime) -> tuple[WhisperEncoder, WhisperFeatureExtractor]:
    """The Whisper encoder, frozen, in eval mode on `runtime.device`, and its mel extractor. No decoder is loaded."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # a whole Whisper has a decoder, which is left out on purpose
    try:
        tower, loading = WhisperEncoder.from_pretrained(
            weights.folder, dtype=runtime.dtype, key_mapping=ENCODER_KEYS, output_loading_info=True
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])[0]
        raise CheckpointError(f"{weights.name}: not a Whisper encoder, {missing} is missing")
    return freeze(tower.to(runtime.device)), WhisperFeatureExtractor.from_pretrained(weights.folder)


def load_frozen(
    audio_model: Weights, text_model: Weights, runtime: Runtime, template_args: Mapping[str, Any] | None = None
) -> FrozenParts:
    """Both frozen parts and what belongs to them."""
    tower, extractor = load_speech_encoder(audio_model, runtime)
    llm, tokenizer = load_language_model(text_model, runtime, template_args)
    return FrozenParts(tower, llm, tokenizer, extractor)


def load_checked(config: BlspConfig, runtime: Runtime, folder: Any) -> FrozenParts:
    """The frozen parts that a configuration names; CheckpointError where they hold other weights.

    folder: the adapter's, for the message.
    """
    audio_model, text_model = (find_weights(str(name)) for name in (config.audio_model_id, config.text_model_id))
    for weights, expected in ((audio_model, config.audio_model_sha256), (text_model, config.text_model_sha256)):
        if weights.sha256 != expected:
            raise CheckpointError(
                f"{folder}: was trained with other weights than {weights.name} holds now "
                f"(tensor digest {weights.sha256[:12]}…, config.json says {str(expected)[:12]}…); "
                "load the weights it was trained with"
            )
    return load_frozen(audio_model, text_model, runtime, config.template_args)


def freeze(module: Any) -> Any:
    """The module in eval mode, without gradients."""
    return module.eval().requires_grad_(False)


def assemble(model_class: Any, config: BlspConfig, parts: FrozenParts, adapter: Any, runtime: Runtime) -> Any:
    """A model made of loaded parts; nothing is initialised twice. The adapter stays in float32."""
    for part, name in [(config.audio_config, config.audio_model_id), (config.text_config, config.text_model_id)]:
        part._name_or_path = name  # the name that was asked for, not a folder of the machine it was made on
    with torch.device("meta"):
        model = model_class(config)
    model.model.audio_tower = parts.tower
    model.model.language_model = parts.llm.get_decoder()
    model.lm_head = parts.llm.get_output_embeddings()
    model.model.multi_modal_projector = adapter.to(runtime.device)
    model.generation_config = parts.llm.generation_config
    model.config.readout_vocabulary = None  # from here on it is a tensor of the adapter
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if missing:
        raise CheckpointError(f"{config.text_model_id}: {missing[0]} was not loaded")
    return model.eval()


def load_adapter_folder(model_class: Any, folder: Any, dtype: Any = None, device_map: Any = None, **others: Any) -> Any:
    """The model of an adapter folder, on the device `device_map` (default: CPU), in `dtype` (float32).

    Other arguments of transformers (`config`, `revision`, …) change nothing; those that would change the weights
    are refused.
    """
    for name in ("quantization_config", "attn_implementation", "state_dict"):
        if others.get(name) is not None:
            raise NotImplementedError(f"{folder}: {name} is for merged models; make one with `blsp export`")
    dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    runtime = find_runtime(device="cpu" if device_map in (None, "auto") else str(device_map), dtype="float32")
    dtype = dtype if isinstance(dtype, torch.dtype) else runtime.dtype
    config = BlspConfig.from_pretrained(folder)
    runtime = Runtime(runtime.device, dtype, 0, 1)
    parts = load_checked(config, runtime, folder)
    return assemble(model_class, config, parts, load_adapter(folder, config), runtime)


def check_loaded(folder: Any, model: Any, missing: Collection[str]) -> None:
    """Raise `CheckpointError` when a merged checkpoint lacks tensors of the model.

    The read-out vocabulary may lie in config.json (before November 2026): it is moved into the adapter.
    """
    config = model.config
    if config.readout_vocabulary is not None:
        adapter = getattr(model, model.base_model_prefix, model).multi_modal_projector
        set_vocabulary(adapter, config, config.readout_vocabulary)
        config.readout_vocabulary = None
        missing = [name for name in missing if not name.endswith("multi_modal_projector.vocabulary")]
    if missing:
        raise CheckpointError(f"{folder}: {sorted(missing)[0]} is missing from it; export or download it again")
