"""Loading of the frozen parts by name, and of a whole model from an adapter folder.

In:  the weights of an encoder or an LLM, or an adapter folder.
Out: modules in eval mode without gradients, and the mel extractor and tokenizer that belong to them.
Try: `llm, tokenizer = load_language_model(find_weights("embedded:smollm2-135m-instruct"), find_runtime())`
Flow: weights/ → **loading.py** → modeling_blsp.py, checkpoint.py; also `blsp encode` and `blsp continue`.

Digests are checked, since an adapter fits only the weights that it was trained with. A warning is printed for rows in
a language that the encoder does not know.
"""

import copy
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    WhisperConfig,
    WhisperFeatureExtractor,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from blsp.data.files import digest_of
from blsp.data.manifest import Utterance
from blsp.distributed import Runtime, find_runtime
from blsp.llm.attention import use_cpu_attention
from blsp.llm.language_model import check_supported
from blsp.llm.prompt import fix_tokenizer
from blsp.llm.quantise import set_weights
from blsp.llm.sharding import load_sharded
from blsp.llm.template_check import check_template
from blsp.model.adapter import load_adapter
from blsp.model.configuration_blsp import AUDIO_TOKEN, BlspConfig, CheckpointError, open_config
from blsp.model.lora import add_lora, has_lora
from blsp.model.speech_encoder import knows_english_only
from blsp.model.weight_samples import sample_weights
from blsp.weights.digest import Weights, find_weights, local_folder
from blsp.weights.embedded import PREFIX
from blsp.weights.folder import WeightsNotFoundError, naming_folder

SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")  # values of transformers' device_map
LOOKED_AT = 1000  # rows whose language is checked
ENCODER_KEYS = {r"^(model\.)?encoder\.": ""}  # the encoder's tensors inside a whole Whisper checkpoint


@dataclass(frozen=True)
class FrozenParts:
    """The parts that are never trained, with the mel extractor and the tokenizer that they need."""

    tower: WhisperEncoder
    llm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    extractor: WhisperFeatureExtractor


def load_language_model(
    weights: Weights, runtime: Runtime, template_args: Mapping[str, Any] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The text LLM, frozen, in eval mode on `runtime.device`, in the format `runtime.weights`, and its tokenizer."""
    with naming_folder(weights.name):
        config = AutoConfig.from_pretrained(weights.folder, trust_remote_code=False)
    check_supported(config, weights.name)
    check_attention(config, runtime.attention)
    with naming_folder(weights.name):
        if runtime.shard_llm:
            llm = load_sharded(local_folder(weights.folder), config, runtime)
            return _with_attention(llm, runtime), load_tokenizer(weights, template_args)
        dtype = torch.bfloat16 if runtime.weights else runtime.dtype
        llm = AutoModelForCausalLM.from_pretrained(
            weights.folder, dtype=dtype, attn_implementation=runtime.attention, trust_remote_code=False
        )
    llm = freeze(llm.to(runtime.device))
    if runtime.weights:
        set_weights(llm, runtime.weights)
    return _with_attention(llm, runtime), load_tokenizer(weights, template_args)


def _with_attention(llm: PreTrainedModel, runtime: Runtime) -> PreTrainedModel:
    if runtime.device.type == "cpu" and runtime.attention is None:
        use_cpu_attention(llm)
    return llm


def check_attention(config: PreTrainedConfig, name: str | None) -> None:
    """Raise CheckpointError if transformers cannot give the LLM the attention `name`, before weights are read."""
    if name is None:
        return
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=name)
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"--attn-implementation {name}: the LLM ({config.model_type}) cannot use it ({reason:.300}); "
            "leave it out, or take sdpa or eager"
        ) from error


def load_tokenizer(weights: Weights, template_args: Mapping[str, Any] | None = None) -> PreTrainedTokenizerBase:
    """The LLM's tokenizer, without its weights; its chat template has these variables and a fixed date."""
    with naming_folder(weights.name):
        tokenizer = AutoTokenizer.from_pretrained(weights.folder, trust_remote_code=False)
    check_template(fix_tokenizer(tokenizer, template_args))
    return tokenizer


def load_speech_encoder(weights: Weights, runtime: Runtime) -> tuple[WhisperEncoder, WhisperFeatureExtractor]:
    """The Whisper encoder, frozen, in eval mode on `runtime.device`, and its mel extractor. No decoder is loaded."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # a whole Whisper has a decoder, which is left out on purpose
    try:
        with naming_folder(weights.name):
            tower, loading = WhisperEncoder.from_pretrained(
                weights.folder, dtype=runtime.dtype, key_mapping=ENCODER_KEYS, output_loading_info=True
            )
            extractor = WhisperFeatureExtractor.from_pretrained(weights.folder)
    finally:
        transformers_logging.set_verbosity(verbosity)
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])[0]
        raise CheckpointError(f"{weights.name}: not a Whisper encoder, {missing} is missing")
    return freeze(tower.to(runtime.device)), extractor


def load_frozen(
    audio_model: Weights, text_model: Weights, runtime: Runtime, template_args: Mapping[str, Any] | None = None
) -> FrozenParts:
    """Both frozen parts, with mel extractor and tokenizer."""
    tower, extractor = load_speech_encoder(audio_model, runtime)
    llm, tokenizer = load_language_model(text_model, runtime, template_args)
    return FrozenParts(tower, llm, tokenizer, extractor)


def load_checked(
    config: BlspConfig, runtime: Runtime, folder: Any, audio_model: str | None = None, llm: str | None = None
) -> FrozenParts:
    """The frozen parts of an adapter folder, digests checked; their names and configurations are put into `config`."""
    audio_weights, text_weights = frozen_weights(config, folder, audio_model, llm)
    parts = load_frozen(audio_weights, text_weights, runtime, config.template_args)
    if config.tokenizer_sha256 not in (None, tokenizer_digest(parts.tokenizer)):
        raise CheckpointError(
            f"{folder}: was trained with another tokenizer than that of {text_weights.name}; "
            "the tokenizer files in one of the two folders were changed: fetch or copy them again"
        )
    config.audio_model_id, config.text_model_id = audio_weights.name, text_weights.name
    config.audio_config, config.text_config = parts.tower.config, parts.llm.config
    return parts


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over the LLM's tokens and their ids, without the placeholder of the speech."""
    return digest_of(sorted((id, token) for token, id in tokenizer.get_vocab().items() if token != AUDIO_TOKEN))


def frozen_weights(
    config: BlspConfig, folder: Any, audio_model: str | None = None, llm: str | None = None
) -> tuple[Weights, Weights]:
    """Encoder and LLM of the adapter `folder`: those named in its configuration, or `audio_model` and `llm`.

    Raises CheckpointError if they are not found, or if the adapter was trained with other weights.
    """
    return (
        _checked_weights("--audio-model", config.audio_model_id, config.audio_model_sha256, folder, audio_model),
        _checked_weights("--llm", config.text_model_id, config.text_model_sha256, folder, llm),
    )


def _checked_weights(flag: str, name: str | None, sha256: str | None, folder: Any, given: str | None) -> Weights:
    """One frozen part with the digest `sha256`. given: the value of `flag`, which is used instead of `name`."""
    try:
        weights = find_weights(given) if given else _find_beside(name, folder)
        found = weights.sha256
    except WeightsNotFoundError as error:
        raise CheckpointError(f"{folder}: {error}; say with {flag} where these weights are now") from error
    if found != sha256:
        raise CheckpointError(
            f"{folder}: was trained with other weights than {f'{flag} ' if given else ''}{weights.name} holds now "
            f"(tensor digest {found[:12]}…, config.json says {str(sha256)[:12]}…); name the right ones with {flag}"
        )
    return weights


def _find_beside(name: Any, folder: Any) -> Weights:
    """Find a name of config.json as it is, or as a path relative to the adapter's folder or to a folder above it."""
    if not isinstance(name, str) or not name:
        raise WeightsNotFoundError(f"its config.json names {name!r} as a frozen part")
    if not Path(name).exists() and not name.startswith(PREFIX):
        home = Path(folder).absolute()
        for place in (home / name, *(parent / name for parent in home.parents)):
            if place.is_dir():
                return find_weights(place)
    return find_weights(name)


def freeze(module: Any) -> Any:
    """The module in eval mode, without gradients."""
    return module.eval().requires_grad_(False)


def assemble(model_class: Any, config: BlspConfig, parts: FrozenParts, adapter: Any, runtime: Runtime) -> Any:
    """A model made of loaded parts; no part is initialised again. The adapter stays in float32."""
    for part, name in [(config.audio_config, config.audio_model_id), (config.text_config, config.text_model_id)]:
        part._name_or_path = name  # the name that the user gave, not a folder of this machine
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
    model.frozen_sample = sample_weights(model)
    return model.eval()


def assemble_folder(model_class: Any, folder: Any, config: BlspConfig, parts: FrozenParts, runtime: Runtime) -> Any:
    """The model of an adapter folder between loaded parts, with the LoRA that the folder may hold."""
    if has_lora(config, "llm") and runtime.weights in ("int8", "int4"):
        raise CheckpointError(
            f"{folder}: has LoRA on its LLM, which cannot be held in {runtime.weights}: merge it first "
            f"(blsp export --model {folder} --out DIR), then load DIR"
        )
    model = assemble(model_class, config, parts, load_adapter(folder, config), runtime)
    if config.lora:
        add_lora(model, config.lora, load_file(str(cached_file(str(folder), "model.safetensors"))))
    return model


def load_adapter_folder(
    model_class: Any,
    folder: Any,
    dtype: Any = None,
    device_map: Any = None,
    audio_model: str | None = None,
    llm: str | None = None,
    attn_implementation: Any = None,
    max_memory: dict[Any, Any] | None = None,
    offload_folder: str | None = None,
    **others: Any,
) -> Any:
    """The model of an adapter folder, on the device or devices of `device_map` (default: CPU), in `dtype` (float32).

    audio_model, llm: where the frozen parts are now, if not where config.json says.
    Other arguments of transformers (`config`, `revision`, …) are ignored; those that would change the weights raise
    NotImplementedError.
    """
    for name in ("quantization_config", "state_dict"):
        if others.get(name) is not None:
            raise NotImplementedError(f"{folder}: {name} is for merged models; make one with `blsp export`")
    attention = attn_implementation or getattr(others.get("config"), "_attn_implementation", None)  # Auto classes
    dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    device = one_device(device_map)
    runtime = find_runtime(device=device or "cpu", dtype="float32")
    dtype = dtype if isinstance(dtype, torch.dtype) else runtime.dtype
    config = open_config(folder)
    runtime = Runtime(runtime.device, dtype, 0, 1)
    parts = load_checked(config, runtime, folder, audio_model, llm)
    model = assemble_folder(model_class, folder, config, parts, runtime)
    if attention is not None:
        model.set_attn_implementation(attention)
    return model if device else spread(model, device_map, max_memory, offload_folder)


def one_device(device_map: Any) -> str | None:
    """The only device of a transformers `device_map`; None if it spreads the model over several devices."""
    if isinstance(device_map, dict):
        devices = set(device_map.values())
        return one_device(devices.pop()) if len(devices) == 1 and "disk" not in devices else None
    if device_map in SPREADS:
        return None
    return f"cuda:{device_map}" if isinstance(device_map, int) else str(device_map or "cpu")


def spread(model: Any, device_map: Any, max_memory: dict[Any, Any] | None, offload_folder: str | None) -> Any:
    """Spread the model over several devices, main memory and disk, with accelerate."""
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = sorted(model._no_split_modules)
    if not isinstance(device_map, dict):
        if device_map != "sequential":
            low = device_map == "balanced_low_0"
            max_memory = get_balanced_memory(model, max_memory, no_split_module_classes=whole, low_zero=low)
        device_map = infer_auto_device_map(model, max_memory, no_split_module_classes=whole)
    skipped = sorted(model._skip_keys_device_placement)
    return dispatch_model(model, device_map, offload_dir=offload_folder, skip_keys=skipped)


def warn_of_languages(config: WhisperConfig, name: Any, rows: Sequence[Utterance]) -> None:
    """Warn once if rows are in a language that the encoder does not know; only the first rows are checked."""
    languages = [row.language or "en" for row in rows[:LOOKED_AT]]
    others = [language for language in languages if not re.match("en(glish)?([-_]|$)", language, re.IGNORECASE)]
    if others and knows_english_only(config):
        print(
            f"blsp: warning: {name} knows English only, and of the first {len(languages)} rows {len(others)} are in "
            f"{', '.join(sorted(set(others)))} (their field language): it cannot recognise these; a "
            "multilingual encoder is embedded:whisper-base",
            file=sys.stderr,
        )
