"""Weights of the frozen LLM in 16, 8 or 4 bits; the products stay in bfloat16.

In:  a loaded LLM on its device, and a format: bfloat16, int8 (a scale for each row) or int4 (a scale and a zero point
     for each 32 weights).
Out: the same LLM, whose linear layers hold their weights in the format. Embeddings, head and norms are bfloat16.
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

    torchao's own product converts all weights to bfloat16 first, which was 4 times slower for one token (docs/log.md).
    """

    int8: Tensor
    scale: Tensor

    def __init__(self, weight: Any, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("int8", weight.qdata.contiguous())
        self.register_buffer("scale", weight.scale.flatten().to(torch.bfloat16))
        self.bias = bias

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs.reshape(-1, inputs.shape[-1])  # the kernel takes matrices: (rows, K) -> (rows, N)
        outputs = torch._weight_int8pack_mm(rows, self.int8, self.scale).view(*inputs.shape[:-1], -1)
        return outputs if self.bias is None else outputs + self.bias


def set_weights(llm: PreTrainedModel, weights: str) -> None:
    """Convert the weights of `llm` in place; raises UnsupportedModelError if the device has no kernel for them."""
    decoder = decoder_of(llm)
    for part in (decoder, llm.get_output_embeddings()):
        for parameter in part.parameters():  # not `part.to`: the rotary frequencies stay in float32
            parameter.data = parameter.data.to(torch.bfloat16)
    if weights == "bfloat16":
        if llm.device.type == "cpu" and not computes_bfloat16(llm.device):
            log.warning("this processor emulates bfloat16, so prompts are read slowly; --weights int8 is faster")
        return
    linear = {name: layer for name, layer in decoder.named_modules() if isinstance(layer, nn.Linear)}
    fitting = {name: layer for name, layer in linear.items() if weights == "int8" or _fits_int4(layer)}
    convert = _converter(weights, llm.device.type)
    for number, (name, layer) in enumerate(fitting.items()):
        try:
            converted = convert(layer)
            if number == 0:  # find a missing kernel now, not in the first answer
                converted(torch.zeros(1, layer.in_features, dtype=torch.bfloat16, device=llm.device))
        except (RuntimeError, NotImplementedError, AssertionError, ImportError) as error:
            raise UnsupportedModelError(
                f"--weights {weights}: {name} ({layer.out_features} x {layer.in_features}) cannot be computed on "
                f"{llm.device}: {error}; take --weights bfloat16, or leave the flag out"
            ) from error
        decoder.set_submodule(name, converted)
    log.info("%s: %d of the LLM's %d linear layers, without the head", weights, len(fitting), len(linear))


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
