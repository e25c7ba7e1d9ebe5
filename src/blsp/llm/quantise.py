"""Weights of the frozen LLM in 16, 8 or 4 bits.

In:  a loaded LLM on its device, and a format: bfloat16, int8 (a scale for each row) or int4 (a scale and a zero point
     for each 32 weights).
Out: the same LLM, whose linear layers hold their weights in the format; their kernels take and give bfloat16. All else
     (embeddings, head, norms, attention) is bfloat16 too; with int8 and int4 it is float32 where the processor does
     not compute in bfloat16.
Try: `blsp chat --weights int4`
Flow: model/loading.py → **quantise.py**, once, after the weights are loaded and their digest is checked.

Every new token reads all weights once, so fewer bits are faster; a long prompt is not faster. Adapter and encoder do
not change. The head does not change either, since it is often the same tensor as the embeddings.

Shapes: K input width, N output width of a linear layer.
"""

import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blsp.distributed import computes_bfloat16
from blsp.llm.language_model import UnsupportedModelError, decoder_of

GROUP = 32  # weights that share a scale; 64 would not divide the width of small LLMs
KERNEL_ROWS = 16  # the int4 kernels take N in steps of this

log = logging.getLogger(__name__)


class Int8Linear(nn.Module):
    """A linear layer on the CPU with int8 weights (N, K) and a scale for each row (N,).

    torchao's own product converts all weights to 16 bits first, which was 4 times slower for one token (docs/log.md).
    """

    int8: Tensor
    scale: Tensor

    def __init__(self, weight: Any, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("int8", weight.qdata.contiguous())
        self.register_buffer("scale", weight.scale.flatten().to(weight.dtype))
        self.bias = bias

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs.reshape(-1, inputs.shape[-1])  # the kernel takes matrices: (rows, K) -> (rows, N)
        outputs = torch._weight_int8pack_mm(rows, self.int8, self.scale).view(*inputs.shape[:-1], -1)
        return outputs if self.bias is None else outputs + self.bias


class Bfloat16Linear(nn.Module):
    """A layer that computes in bfloat16, inside an LLM of float32.

    With float32 inputs the kernels for int8 and int4 are 9 to 30 times slower on a CPU without AVX-512 (docs/log.md).
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs.to(torch.bfloat16)).to(inputs.dtype)


def _emulates_bfloat16(device: torch.device) -> bool:
    """A processor without bfloat16, as in most laptops: torch computes it there several times slower than float32."""
    return device.type == "cpu" and not computes_bfloat16(device)


def set_weights(llm: PreTrainedModel, weights: str) -> None:
    """Convert the weights of `llm` in place; raises UnsupportedModelError if the device has no kernel for them."""
    decoder, emulated = decoder_of(llm), _emulates_bfloat16(llm.device)
    if emulated and weights == "bfloat16":
        log.warning("this processor emulates bfloat16, which is slow: --weights int8, int4 or none are faster")
    packed = set() if weights == "bfloat16" else _pack(decoder, weights, emulated)
    dtype = torch.float32 if emulated and weights != "bfloat16" else torch.bfloat16
    for part in (decoder, llm.get_output_embeddings()):
        for parameter in part.parameters():  # not `part.to`: the rotary frequencies stay in float32
            if id(parameter) not in packed:
                parameter.data = parameter.data.to(dtype)


def _pack(decoder: nn.Module, weights: str, emulated: bool) -> set[int]:
    """Give the linear layers of `decoder` their int8 or int4 weights; the ids of the new layers' parameters."""
    linear = {name: layer for name, layer in decoder.named_modules() if isinstance(layer, nn.Linear)}
    fitting = {name: layer for name, layer in linear.items() if weights == "int8" or _fits_int4(layer)}
    device = next(decoder.parameters()).device
    convert, packed = _converter(weights, device.type), set()
    for number, (name, layer) in enumerate(fitting.items()):
        try:
            converted = convert(layer.to(torch.bfloat16))
            converted = Bfloat16Linear(converted) if emulated else converted
            if number == 0:  # find a missing kernel now, not in the first answer
                converted(torch.zeros(1, layer.in_features, dtype=torch.bfloat16, device=device))
        except (RuntimeError, NotImplementedError, AssertionError, ImportError) as error:
            raise UnsupportedModelError(
                f"--weights {weights}: {name} ({layer.out_features} x {layer.in_features}) cannot be computed on "
                f"{device}: {error}; take --weights bfloat16, or leave the flag out"
            ) from error
        decoder.set_submodule(name, converted)
        packed |= {id(parameter) for parameter in converted.parameters()}
    log.info("%s: %d of the LLM's %d linear layers, without the head", weights, len(fitting), len(linear))
    return packed


def _fits_int4(layer: nn.Linear) -> bool:
    return layer.in_features % GROUP == 0 and layer.out_features % KERNEL_ROWS == 0


def _converter(weights: str, device: str) -> Any:
    """A function that converts a linear layer to the format `weights`, for this kind of device."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    def convert(config: Any, layer: nn.Linear) -> nn.Module:
        quantize_(layer, config)
        packed = weights == "int8" and device == "cpu"
        return Int8Linear(layer.weight, layer.bias) if packed else layer

    # set_inductor_config would change torch's settings for the whole process
    if weights == "int8":
        return partial(convert, Int8WeightOnlyConfig(set_inductor_config=False))
    if device == "cpu":
        return partial(convert, PrototypeInt4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False))
    packing: Any = "tile_packed_to_4d" if device == "cuda" else "plain"
    config = Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format=packing, set_inductor_config=False)
    return partial(convert, config)
