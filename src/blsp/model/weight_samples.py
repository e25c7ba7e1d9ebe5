"""Samples of the frozen weights, to find out when the model is saved whether they were changed.

In:  a model made of frozen parts and an adapter, when it is loaded and when it is saved.
Out: the first frozen tensor whose value changed, for example because a LoRA was merged into the LLM; or None.
Try: `changed_weight(model, sample_weights(model))`
Flow: loading.py → **weight_samples.py** → `save_pretrained` in modeling_blsp.py

A sample is 256 numbers at equal distances: training and merging change nearly all numbers of a tensor.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

ADAPTER = "multi_modal_projector"
LORA = ".lora_"  # in the names of LoRA's weights (lora.py)
NUMBERS = 256  # of each tensor


class UnmergedError(ValueError):
    """A model with layers of PEFT, which cannot be saved in its folder."""


def sample_weights(model: nn.Module) -> dict[str, Tensor]:
    """The sample of each frozen tensor, by name."""
    return {name: _sample(tensor) for name, tensor in _frozen(model)}


def changed_weight(model: nn.Module, before: dict[str, Tensor]) -> str | None:
    """The name of the first frozen tensor whose sample differs from `before`; None if none does.

    Another number format is not a change. Raises UnmergedError if a tensor of `before` has another name now.
    """
    now = dict(_frozen(model))
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if gone := sorted(before.keys() - names):
        raise UnmergedError(
            f"{gone[0]} has another name now: the model has layers of PEFT. Save these with PEFT, or merge them "
            "first (merge_and_unload)"
        )
    for name, sample in before.items():
        if name in now and not torch.equal(_sample(now[name]), sample.to(now[name].dtype)):
            return name
    return None


def _frozen(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The frozen tensors that can be read: not quantised, not sharded, not empty."""
    for name, parameter in model.named_parameters():
        if ADAPTER not in name and LORA not in name and type(parameter) is nn.Parameter and not parameter.is_meta:
            yield name, parameter.detach()


def _sample(tensor: Tensor) -> Tensor:
    return tensor.flatten()[:: max(1, tensor.numel() // NUMBERS)].to("cpu", copy=True)
