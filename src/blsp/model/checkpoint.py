"""Checkpoint folders: the adapter alone, with the names and digests of the frozen parts; or the whole model.

In:  names of an encoder and an LLM (folder, hub id, `embedded:` name), or a folder written here.
Out: a model whose frozen parts are frozen, and its processor; folders.
Try: `model, processor = load_blsp("models/blsp-tiny", find_runtime())`
Flow: training/ → **checkpoint.py** → inference/, evaluation/, serving/
"""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from blsp.data.files import write_atomically
from blsp.distributed import Runtime, find_runtime
from blsp.llm.language_model import embed
from blsp.llm.prompt import show_args
from blsp.llm.quantise import set_weights
from blsp.llm.template_check import check_template
from blsp.model import register
from blsp.model.adapter import adapter_class, adapter_state, as_dtype, build_adapter
from blsp.model.card_parts import card_of, measured, merged_card
from blsp.model.configuration_blsp import AUDIO_TOKEN, BlspConfig, CheckpointError, is_adapter_folder, open_config
from blsp.model.grounded import token_strings
from blsp.model.loading import (
    assemble,
    assemble_folder,
    check_attention,
    freeze,
    frozen_weights,
    load_checked,
    load_frozen,
    tokenizer_digest,
)
from blsp.model.lora import merge_lora
from blsp.model.modeling_blsp import BlspForConditionalGeneration
from blsp.model.portable import add_code, add_stub
from blsp.model.processing_blsp import BlspProcessor
from blsp.settings import ExportSettings
from blsp.weights.digest import Weights
from blsp.weights.embedded import require_on_hub
from blsp.weights.folder import naming_folder
from blsp.weights.shipped import find_model


def new_blsp(
    audio_model: Weights,
    text_model: Weights,
    runtime: Runtime,
    *,
    adapter: str = "conv",
    adapter_options: dict[str, Any] | None = None,
    readout_vocabulary: list[int] | None = None,
    full_window: bool = False,
    template_args: dict[str, Any] | None = None,
    seed: int = 0,
) -> tuple[BlspForConditionalGeneration, BlspProcessor]:
    """Two frozen parts and a new adapter, whose first vectors are distributed like the LLM's embeddings.

    With the adapter option `embedding_std` they start around 0 with that standard deviation (the paper: 1).
    """
    parts = load_frozen(audio_model, text_model, runtime, template_args)
    embeddings = embed(parts.llm, readout_vocabulary or range(parts.llm.config.vocab_size)).float()  # (V, D)
    kind, mean = adapter_class(adapter), embeddings.mean(dim=0)  # (D,)
    # the standard deviation around the mean, if the adapter starts there; otherwise that around 0
    spread = embeddings - mean if hasattr(kind, "start_around") else embeddings
    options = {"embedding_std": round(float(spread.std()), 6), **getattr(kind, "fresh_options", {})}
    parts.tokenizer.add_tokens([AUDIO_TOKEN], special_tokens=True)
    config = BlspConfig(
        audio_config=parts.tower.config,
        text_config=copy.deepcopy(parts.llm.config),  # the whole model's configuration sets its own attention in it
        audio_token_id=parts.tokenizer.convert_tokens_to_ids(AUDIO_TOKEN),
        audio_model_id=audio_model.name,
        text_model_id=text_model.name,
        audio_model_sha256=audio_model.sha256,
        text_model_sha256=text_model.sha256,
        tokenizer_sha256=tokenizer_digest(parts.tokenizer),
        adapter=adapter,
        adapter_options=options | (adapter_options or {}),
        readout_vocabulary=readout_vocabulary,
        full_window=full_window,
        template_args=template_args or None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapter_module = build_adapter(config)
    if hasattr(adapter_module, "start_around") and "embedding_std" not in (adapter_options or {}):
        adapter_module.start_around(mean.to("cpu"))
    if adapter_module.reads_out:
        ids = readout_vocabulary or range(config.text_config.vocab_size)
        adapter_module.spell(token_strings(parts.tokenizer, ids))
    model = assemble(BlspForConditionalGeneration, config, parts, adapter_module, runtime)
    processor = BlspProcessor(
        parts.extractor, parts.tokenizer, adapter_module.strides, full_window, template_args=template_args
    )
    return model, processor


def load_blsp(
    folder: str | Path, runtime: Runtime, audio_model: str | None = None, llm: str | None = None
) -> tuple[BlspForConditionalGeneration, BlspProcessor]:
    """Model and processor of an adapter folder (frozen parts loaded, digests checked) or of a merged export.

    folder: also the name of a shipped adapter (`blsp-tiny`). audio_model, llm: where the frozen parts are now, if
    not where the adapter's config.json says.
    """
    folder = find_model(str(folder))
    if not Path(folder).exists():
        require_on_hub(folder)
    register()  # transformers' own loading of the tokenizer asks for the configuration by its name
    if not is_adapter_folder(folder):
        if audio_model or llm:
            raise CheckpointError(f"{folder}: holds its own encoder and LLM; leave out --audio-model and --llm")
        if runtime.shard_llm:
            raise CheckpointError(f"{folder}: is a merged model; --shard-llm needs the adapter's own folder")
        check_attention(open_config(folder).text_config, runtime.attention)
        attention = {"text_config": runtime.attention} if runtime.attention else None
        with naming_folder(folder):
            model = BlspForConditionalGeneration.from_pretrained(
                folder, dtype=runtime.dtype, attn_implementation=attention
            )
        freeze(model.to(runtime.device))
        if runtime.weights:
            set_weights(model, runtime.weights)
        return model, _load_processor(folder, model.config.tokenizer_sha256)
    config = open_config(folder)
    if runtime.shard_llm and config.lora:
        raise CheckpointError(
            f"{folder}: has LoRA on its LLM or encoder; leave out --shard-llm, or merge it (blsp export)"
        )
    parts = load_checked(config, runtime, folder, audio_model, llm)
    model = assemble_folder(BlspForConditionalGeneration, folder, config, parts, runtime)
    return model, _load_processor(folder, config.tokenizer_sha256 or tokenizer_digest(parts.tokenizer))


def _load_processor(folder: str, tokenizer_sha256: str | None) -> BlspProcessor:
    """The processor of a checkpoint; CheckpointError if its tokenizer has another digest."""
    with naming_folder(folder):
        processor = BlspProcessor.from_pretrained(folder, trust_remote_code=False)
    check_template(processor.tokenizer)
    if tokenizer_sha256 not in (None, tokenizer_digest(processor.tokenizer)):
        raise CheckpointError(
            f"{folder}: its tokenizer differs from that of the LLM it was trained with; "
            "tokenizer.json was changed: fetch or copy it again"
        )
    return processor


def load_mean(
    folders: Sequence[str | Path], runtime: Runtime, audio_model: str | None = None, llm: str | None = None
) -> tuple[BlspForConditionalGeneration, BlspProcessor]:
    """The first folder's model, with the mean of the weights of all folders' adapters.

    The mean of adapters that were trained differently from the same start can be better than each of them (model
    soups, Wortsman et al. 2022).
    """
    model, processor = load_blsp(folders[0], runtime, audio_model, llm)
    states = [model.model.multi_modal_projector.state_dict()]
    if model.config.lora and len(folders) > 1:
        raise CheckpointError(f"{folders[0]}: has LoRA, whose mean is none of its products; name this folder alone")
    for folder in map(find_model, map(str, folders[1:])):
        config = open_config(folder)
        state = adapter_state(folder, config)
        if _structure(config) != _structure(model.config) or not _same_whole_numbers(state, states[0]):
            raise CheckpointError(
                f"{folder}: cannot be averaged with {folders[0]}: its frozen parts, shape or read-out tokens differ"
            )
        states.append(state)
    for name, weight in states[0].items():
        if weight.is_floating_point():
            weight.copy_(torch.stack([state[name].cpu().double() for state in states]).mean(dim=0))
    return model, processor


def set_template_args(
    model: BlspForConditionalGeneration, processor: BlspProcessor, args: dict[str, Any] | None, folder: str
) -> None:
    """Set the chat template's variables of an adapter that training starts from; None keeps its own.

    An adapter with variables must have the same ones; one without (after `ctc` on a plain manifest) gets them.
    """
    start = model.config.template_args
    if start and args is not None and args != start:
        raise CheckpointError(f"{folder}: was trained with {show_args(start)}, not {show_args(args)}")
    model.config.template_args = args or start
    processor.fix_template(args or start)


def _structure(config: BlspConfig) -> tuple[Any, ...]:
    """What adapters must have in common to be averaged."""
    adapter = config.adapter, config.adapter_options, config.readout_size
    return *adapter, config.lora, config.full_window, config.audio_model_sha256, config.text_model_sha256


def _same_whole_numbers(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two adapters read out the same tokens with the same spelling."""
    names = [name for name, tensor in state.items() if not tensor.is_floating_point()]
    return all(name in other and torch.equal(state[name], other[name].cpu()) for name in names)


def save_adapter(
    model: BlspForConditionalGeneration,
    processor: BlspProcessor,
    folder: str | Path,
    *,
    card: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the adapter folder; it gets its name when it is complete."""
    state = {name: as_dtype(tensor, dtype).contiguous() for name, tensor in model.adapter_state().items()}
    _write_folder(
        folder, lambda new: PreTrainedModel.save_pretrained(model, new, state_dict=state), processor, card, add_stub
    )


def export_merged(
    model: BlspForConditionalGeneration, processor: BlspProcessor, folder: str | Path, **metadata: Any
) -> None:
    """Write one Hugging Face checkpoint with custom code that contains everything, also frozen parts and code.

    LoRA is merged first, in the model itself. metadata: for its card (`card_head`).
    """
    merge_lora(model)
    before, model.config.adapter_only = model.config.adapter_only, False
    try:
        card = merged_card(model.config, Path(folder).name, **metadata)
        _write_folder(folder, lambda new: PreTrainedModel.save_pretrained(model, new), processor, card, add_code)
    finally:
        model.config.adapter_only = before


def _write_folder(
    folder: str | Path,
    write: Callable[[Path], object],
    processor: BlspProcessor,
    card: str | None,
    add_classes: Callable[[Path], object],
) -> None:
    folder = Path(folder).absolute()
    if folder.exists() and not (folder / "config.json").is_file() and any(folder.iterdir()):
        raise CheckpointError(f"{folder}: is not empty and not a checkpoint; name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(folder, through=folder.with_name(f".{folder.name}.writing")) as fresh:
        write(fresh)
        processor.save_pretrained(fresh)
        add_classes(fresh)
        if card is not None:
            (fresh / "README.md").write_text(card, encoding="utf-8")


def export(settings: ExportSettings) -> None:
    """`blsp export`: write a merged folder from an adapter folder."""
    folder = find_model(settings.model)
    metadata = card_of(folder)
    if settings.results is not None:
        metadata["results"] = measured(settings.results)
    dtype = _stored_dtype(folder, settings) if settings.dtype == "auto" else settings.dtype
    model, processor = load_blsp(folder, find_runtime(device="cpu", dtype=dtype), settings.audio_model, settings.llm)
    export_merged(model, processor, settings.out, **metadata)
    print(f"wrote {settings.out}")


def _stored_dtype(folder: str, settings: ExportSettings) -> str:
    """The number format in which the LLM of a checkpoint is stored."""
    register()
    config = open_config(folder)
    text = config.text_config
    if config.adapter_only:
        _, weights = frozen_weights(config, folder, settings.audio_model, settings.llm)
        text = AutoConfig.from_pretrained(weights.folder, trust_remote_code=False)
    return str(text.dtype or torch.float32).removeprefix("torch.")
