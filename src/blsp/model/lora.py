"""LoRA on the frozen parts, by PEFT: small trained changes of their linear layers, kept beside the adapter.

In:  a model; which parts ("llm", "encoder") and the rank, as in `BlspConfig.lora`.
Out: the same model, whose linear layers give W x + alpha / rank * B A x; W stays as it is, A and B are trained.
Try: `add_lora(model, lora_options(["llm"], rank=8))`
Flow: loading.py, training/run.py → **lora.py** → checkpoint.py, which merges it for an export

Shapes: W (out, in), A (rank, in), B (out, rank). B begins at 0, so that a fresh LoRA changes nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from blsp.model.configuration_blsp import BlspConfig, CheckpointError
from blsp.model.weight_samples import LORA, sample_weights

PARTS = {"llm": "language_model", "encoder": "audio_tower"}
NOTES = {
    "llm": "the LLM does not stay as it is, so text is no longer answered as before (law 1 does not hold)",
    "encoder": "the encoder does not stay as it is, so features of `blsp encode` do not fit it",
}


def lora_options(parts: Sequence[str], rank: int) -> dict[str, Any] | None:
    """What `BlspConfig.lora` holds; None without parts."""
    return {"parts": sorted(set(parts)), "rank": rank, "alpha": 2 * rank} if parts else None


def lora_note(parts: Sequence[str]) -> str:
    """What a user must know of LoRA on these parts."""
    return "; ".join(text for part, text in NOTES.items() if part in parts)


def has_lora(config: BlspConfig, part: str) -> bool:
    """Whether a part ("llm", "encoder") of the model is changed by LoRA."""
    return part in (config.lora or {}).get("parts", ())


def add_lora(model: Any, lora: dict[str, Any], state: Mapping[str, Tensor] | None = None, seed: int = 0) -> None:
    """Put LoRA on every linear layer of the parts: fresh, or with the weights of `state` (names of the whole model).

    Its weights are float32 (float64 beside such), without gradients. Raises CheckpointError where PEFT is not
    installed, or where `state` does not hold exactly these weights.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise CheckpointError("LoRA needs PEFT: pip install 'blsp[lora]'") from error
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for part in lora["parts"]:
            tower = getattr(model.model, PARTS[part])
            linear = [name for name, layer in tower.named_modules() if isinstance(layer, nn.Linear)]
            inject_adapter_in_model(LoraConfig(r=lora["rank"], lora_alpha=lora["alpha"], target_modules=linear), tower)
    weights = lora_weights(model)
    double = model.lm_head.weight.dtype == torch.float64
    for weight in weights.values():
        weight.requires_grad_(False).data = weight.data.to(torch.float64 if double else torch.float32)
    if state is not None:
        load_lora(weights, state)
    model.config.lora = lora
    model.frozen_sample = sample_weights(model)
    model.eval()


def lora_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of LoRA by their names in the whole model; none where there is no LoRA."""
    return {name: weight for name, weight in model.named_parameters() if LORA in name}


@torch.no_grad()
def load_lora(weights: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]) -> None:
    """Copy the tensors of LoRA in `state` into `weights`."""
    stored = {name: tensor for name, tensor in state.items() if LORA in name}
    if odd := sorted(weights.keys() ^ stored.keys()):
        raise CheckpointError(f"{odd[0]}: the stored LoRA has other tensors than its settings say")
    for name, weight in weights.items():
        weight.copy_(stored[name])


@contextmanager
def without_lora(model: Any) -> Iterator[None]:
    """The model as it is without LoRA, for the text route that training compares with. Restored before `backward`."""
    layers = _layers(model) if model.config.lora else []
    for _, layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for _, layer in layers:
            layer.enable_adapters(True)


def merge_lora(model: Any) -> None:
    """Add LoRA to the weights, in their number format. The model is then a whole one: its LLM or encoder is its own."""
    for name, layer in _layers(model):
        layer.merge(safe_merge=True)
        model.set_submodule(name, layer.get_base_layer())
    if model.config.lora:
        model.config.lora, model.config.adapter_only = None, False


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The layers that PEFT has put in the place of linear ones."""
    if not lora_weights(model):
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)]
