"""Checkpoint folders: the adapter alone, with the names and digests of the frozen parts; or all of it.

In:  names of an encoder and an LLM (folder, hub id, `embedded:` name), or a folder written here.
Out: a model whose frozen parts are frozen, and its processor.
Try: `model, processor = load_blsp("models/blsp-tiny", find_runtime())`
Flow: model/ — training writes these folders, everything after it reads them.

An adapter fits the very weights it was trained between: their digests are checked, and a mismatch is an
error. Nothing is ever left at random values.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    WhisperFeatureExtractor,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from blsp.distributed import Runtime, find_runtime
from blsp.llm.language_model import check_supported, embed
from blsp.model import register
from blsp.model.configuration_blsp import AUDIO_TOKEN, BlspConfig
from blsp.model.grounded import spell_readout, token_strings
from blsp.model.modeling_blsp import BlspForConditionalGeneration, build_adapter
from blsp.model.processing_blsp import BlspProcessor
from blsp.weights.digest import tensor_digest
from blsp.weights.embedded import resolve_weights
from blsp.weights.shipped import find_model

if TYPE_CHECKING:
    from blsp.settings import ExportSettings

ENCODER_KEYS = {r"^(model\.)?encoder\.": ""}  # the encoder's tensors inside a whole Whisper checkpoint


class CheckpointError(ValueError):
    """A folder that is not what it should be; the message names it and the way out."""


@dataclass(frozen=True)
class FrozenParts:
    """What is never trained: the encoder and the LLM, with the mel extractor and tokenizer they need."""

    tower: WhisperEncoder
    llm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    extractor: WhisperFeatureExtractor


def load_language_model(name: str, runtime: Runtime) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The text LLM, frozen, in eval mode on `place`, and its tokenizer."""
    folder = resolve_weights(name)
    check_supported(AutoConfig.from_pretrained(folder))
    llm = AutoModelForCausalLM.from_pretrained(folder, dtype=runtime.dtype).to(runtime.device)
    return _frozen(llm), AutoTokenizer.from_pretrained(folder)


def load_speech_encoder(name: str, runtime: Runtime) -> tuple[WhisperEncoder, WhisperFeatureExtractor]:
    """The Whisper encoder, frozen, in eval mode on `place`, and its mel extractor. No decoder is loaded."""
    folder = resolve_weights(name)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # a whole Whisper holds a decoder that is left out on purpose
    try:
        tower, found = WhisperEncoder.from_pretrained(
            folder, dtype=runtime.dtype, key_mapping=ENCODER_KEYS, output_loading_info=True
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    if found["missing_keys"]:
        raise CheckpointError(f"{name}: not a Whisper encoder, {sorted(found['missing_keys'])[0]} is missing")
    return _frozen(tower.to(runtime.device)), WhisperFeatureExtractor.from_pretrained(folder)


def load_frozen(audio_model: str, text_model: str, runtime: Runtime) -> FrozenParts:
    """Both frozen parts and what belongs to them."""
    tower, extractor = load_speech_encoder(audio_model, runtime)
    llm, tokenizer = load_language_model(text_model, runtime)
    return FrozenParts(tower, llm, tokenizer, extractor)


def _frozen(module: Any) -> Any:
    return module.eval().requires_grad_(False)


def new_blsp(
    audio_model: str,
    text_model: str,
    runtime: Runtime,
    *,
    adapter: str = "conv",
    adapter_options: dict[str, Any] | None = None,
    readout_vocabulary: list[int] | None = None,
    full_window: bool = False,
    seed: int = 0,
) -> tuple[BlspForConditionalGeneration, BlspProcessor]:
    """Two frozen parts and a fresh adapter between them; vectors start as large as the LLM's embeddings."""
    parts = load_frozen(audio_model, text_model, runtime)
    embeddings = embed(parts.llm, readout_vocabulary or range(parts.llm.config.vocab_size))
    parts.tokenizer.add_tokens([AUDIO_TOKEN], special_tokens=True)
    config = BlspConfig(
        audio_config=parts.tower.config,
        text_config=parts.llm.config,
        audio_token_id=parts.tokenizer.convert_tokens_to_ids(AUDIO_TOKEN),
        audio_model_id=audio_model,
        text_model_id=text_model,
        audio_model_sha256=tensor_digest(resolve_weights(audio_model)),
        text_model_sha256=tensor_digest(resolve_weights(text_model)),
        adapter=adapter,
        adapter_options={
            "embedding_std": round(float(embeddings.float().std()), 6),
            **(adapter_options or {}),
        },
        readout_vocabulary=readout_vocabulary,
        full_window=full_window,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        projector = build_adapter(config)
    model = assemble(config, parts, projector, runtime)
    spell_readout(model.model, lambda ids: token_strings(parts.tokenizer, ids))
    return model, new_processor(config, parts)


def new_processor(config: BlspConfig, parts: FrozenParts) -> BlspProcessor:
    """The processor that counts places as `config`'s adapter does."""
    options = config.adapter_options or {}
    defaults = {"conv": [2, 2, 2], "grounded": [2, 2, 1], "stack": [8]}[config.adapter]
    strides = [options["frames"]] if "frames" in options else list(options.get("strides", defaults))
    return BlspProcessor(parts.extractor, parts.tokenizer, strides=strides, full_window=config.full_window)


def assemble(
    config: BlspConfig, parts: FrozenParts, projector: nn.Module, runtime: Runtime
) -> BlspForConditionalGeneration:
    """A model made of loaded parts; nothing is initialised twice. The adapter stays in float32."""
    for part, name in [
        (config.audio_config, config.audio_model_id),
        (config.text_config, config.text_model_id),
    ]:
        part._name_or_path = name  # as it was asked for, not the folder of the machine that it was made on
    with torch.device("meta"):
        model = BlspForConditionalGeneration(config)
    model.model.audio_tower = parts.tower
    model.model.language_model = parts.llm.get_decoder()
    model.lm_head = parts.llm.get_output_embeddings()
    model.model.multi_modal_projector = projector.to(runtime.device)
    model.generation_config = parts.llm.generation_config
    left = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if left:
        raise CheckpointError(f"{config.text_model_id}: {left[0]} was not loaded")
    return model.eval()


def _config_file(folder: Any) -> Path:
    found = cached_file(str(folder), "config.json", _raise_exceptions_for_missing_entries=False)
    if found is None:
        raise CheckpointError(
            f"{folder}: no config.json there; give a folder written by `blsp train` or `blsp export`"
        )
    return Path(found)


def is_adapter_folder(folder: Any) -> bool:
    """True for a checkpoint that holds the adapter alone."""
    config = json.loads(_config_file(folder).read_text())
    return config.get("model_type") == "blsp" and config.get("adapter_only", False)


def refuse_missing(folder: Any, names: Collection[str]) -> None:
    """Raise `CheckpointError` when a checkpoint lacks tensors of the model."""
    if names:
        raise CheckpointError(f"{folder}: {sorted(names)[0]} is missing from it; export or download it again")


def load_adapter_folder(
    folder: Any, dtype: Any = None, device_map: Any = None, **others: Any
) -> BlspForConditionalGeneration:
    """The model of an adapter folder, on the device `device_map` (default: CPU), in `dtype` (float32).

    What else transformers passes on (`config`, `revision`, …) has no part in it; wishes that would change the
    weights are refused.
    """
    for name in ("quantization_config", "attn_implementation", "state_dict"):
        if others.get(name) is not None:
            raise NotImplementedError(f"{folder}: {name} is for merged models; make one with `blsp export`")
    dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    runtime = find_runtime(device="cpu" if device_map in (None, "auto") else str(device_map), dtype="float32")
    dtype = dtype if isinstance(dtype, torch.dtype) else runtime.dtype
    model, _ = _load_adapter(folder, Runtime(runtime.device, dtype, 0, 1))
    return model


def load_blsp(folder: str | Path, runtime: Runtime) -> tuple[BlspForConditionalGeneration, BlspProcessor]:
    """Model and processor of an adapter folder (frozen parts loaded, digests checked) or of a merged export.

    The name of a shipped adapter (`blsp-tiny`) stands for its folder.
    """
    folder = find_model(str(folder))
    if is_adapter_folder(folder):
        return _load_adapter(folder, runtime)
    register()
    model = BlspForConditionalGeneration.from_pretrained(folder, dtype=runtime.dtype)
    return _frozen(model.to(runtime.device)), BlspProcessor.from_pretrained(folder)


def load_mean(
    folders: Sequence[str | Path], runtime: Runtime
) -> tuple[BlspForConditionalGeneration, BlspProcessor]:
    """The first folder's model with the mean of all the folders' adapters, weight by weight.

    Adapters that went different ways from the same weights can be better together than each alone (model soups,
    Wortsman et al. 2022).
    """
    model, processor = load_blsp(folders[0], runtime)
    projector = model.model.multi_modal_projector
    states = [projector.state_dict()]
    for folder in map(str, folders[1:]):
        folder = find_model(folder)
        if _kind(BlspConfig.from_pretrained(_config_file(folder).parent)) != _kind(model.config):
            raise CheckpointError(
                f"{folder}: has no mean with {folders[0]}: other parts, shape or read-out tokens"
            )
        states.append(_adapter_state(folder))
    for name, weight in states[0].items():
        if weight.is_floating_point():
            weight.copy_(torch.stack([state[name].cpu().double() for state in states]).mean(dim=0))
    return model, processor


def _kind(config: BlspConfig) -> tuple[Any, ...]:
    """What adapters share that have a mean."""
    adapter = config.adapter, config.adapter_options, config.readout_vocabulary
    return *adapter, config.full_window, config.audio_model_sha256, config.text_model_sha256


def _load_adapter(folder: str | Path, runtime: Runtime) -> tuple[BlspForConditionalGeneration, BlspProcessor]:
    home = _config_file(folder).parent
    register()  # transformers' own loading of the tokenizer asks for the configuration by its name
    config = BlspConfig.from_pretrained(home)
    for role in ("audio", "text"):
        _check_digest(folder, getattr(config, f"{role}_model_id"), getattr(config, f"{role}_model_sha256"))
    parts = load_frozen(config.audio_model_id, config.text_model_id, runtime)
    projector = build_adapter(config)
    try:
        projector.load_state_dict(_adapter_state(folder), strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: its tensors do not fit its config.json: {error}") from error
    return assemble(config, parts, projector, runtime), BlspProcessor.from_pretrained(folder)


def _adapter_state(folder: str | Path) -> dict[str, Tensor]:
    """An adapter folder's tensors under the adapter's own names, in float32."""
    stored = load_file(str(cached_file(str(folder), "model.safetensors")))
    prefix = "model.multi_modal_projector."
    return {name.removeprefix(prefix): _as_type(tensor, torch.float32) for name, tensor in stored.items()}


def _as_type(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights in `dtype`; whole numbers (how tokens are spelled) stay what they are."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _check_digest(folder: Any, name: str, expected: str | None) -> None:
    found = tensor_digest(resolve_weights(name))
    if found != expected:
        raise CheckpointError(
            f"{folder}: was trained with other weights than {name} holds now "
            f"(tensor digest {found[:12]}…, config.json says {str(expected)[:12]}…); "
            "load the weights it was trained with"
        )


def save_adapter(
    model: BlspForConditionalGeneration,
    processor: BlspProcessor,
    folder: str | Path,
    *,
    card: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the adapter folder under a temporary name, then rename it into place."""
    state = {name: _as_type(tensor, dtype).contiguous() for name, tensor in model.adapter_state().items()}
    _write_folder(
        folder, lambda new: PreTrainedModel.save_pretrained(model, new, state_dict=state), processor, card
    )


def export_merged(model: BlspForConditionalGeneration, processor: BlspProcessor, folder: str | Path) -> None:
    """Write everything, frozen parts included, as one ordinary Hugging Face checkpoint."""
    before, model.config.adapter_only = model.config.adapter_only, False
    try:
        _write_folder(folder, lambda new: PreTrainedModel.save_pretrained(model, new), processor, None)
    finally:
        model.config.adapter_only = before


def _write_folder(folder: str | Path, write: Any, processor: BlspProcessor, card: str | None) -> None:
    folder = Path(folder).absolute()
    if folder.exists() and not (folder / "config.json").is_file() and any(folder.iterdir()):
        raise CheckpointError(f"{folder}: is no checkpoint and is not empty; name another folder")
    fresh, old = (folder.with_name(f".{folder.name}.{state}") for state in ("writing", "old"))
    for left in (fresh, old):
        shutil.rmtree(left, ignore_errors=True)
    fresh.parent.mkdir(parents=True, exist_ok=True)
    write(fresh)
    processor.save_pretrained(fresh)
    if card is not None:
        (fresh / "README.md").write_text(card)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def export(settings: ExportSettings) -> None:
    """`blsp export`: an adapter folder becomes a merged one."""
    folder = find_model(settings.model)
    dtype = _stored_dtype(folder) if settings.dtype == "auto" else settings.dtype
    model, processor = load_blsp(folder, find_runtime(device="cpu", dtype=dtype))
    export_merged(model, processor, settings.out)
    print(f"wrote {settings.out}")


def _stored_dtype(folder: str) -> str:
    """The type in which the LLM of a checkpoint is stored."""
    register()
    config = BlspConfig.from_pretrained(folder)
    text = config.text_config
    if config.adapter_only:
        text = AutoConfig.from_pretrained(resolve_weights(str(config.text_model_id)))
    return str(text.dtype or torch.float32).removeprefix("torch.")
