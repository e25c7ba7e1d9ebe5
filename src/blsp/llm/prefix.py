"""The constant beginning of every prompt, run through the LLM once.

In:  an LLM and the ids of a prompt's prefix (system prompt, instruction before the speech).
Out: `Prefix`: key/values (1, H, P, d) of each layer, expanded to a batch as a view.
Try: `cache = compute_prefix(llm, frame.prefix_ids).expand(32)`
Flow: model/ — training, teacher passes and decoding begin where the prefix ends (law 8: nothing but the time changes).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from blsp.llm.language_model import UnsupportedModelError, decoder_of, embed


@dataclass(frozen=True)
class Prefix:
    """Key/values of a sequence's beginning: one (keys, values) pair a layer, each (1, H, P, d).

    ids: what was run, where it was text; the decode loop's own caches (`Event.cache`) leave it empty.
    """

    ids: tuple[int, ...]
    layers: tuple[tuple[Tensor, Tensor], ...]

    def __len__(self) -> int:
        return self.layers[0][0].shape[2]

    def cut(self, length: int) -> Prefix:
        """The first `length` tokens, as views."""
        layers = tuple((keys[:, :, :length], values[:, :, :length]) for keys, values in self.layers)
        return Prefix(self.ids[:length], layers)

    def expand(self, batch: int) -> DynamicCache:
        """A cache for `batch` rows; the rows are views of one copy until a layer appends to them."""
        cache = DynamicCache()
        cache.layers = [_filled(keys, values, batch) for keys, values in self.layers]
        return cache


def _filled(keys: Tensor, values: Tensor, batch: int) -> DynamicLayer:
    layer = DynamicLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1)
    return layer


@torch.no_grad()
def compute_prefix(llm: PreTrainedModel, ids: Sequence[int]) -> Prefix:
    """Run `ids` (at least one) through the decoder and keep its key/values."""
    if not len(ids):
        raise ValueError("a prefix needs at least one token")
    cache = DynamicCache()
    input_ids = torch.tensor([list(ids)], device=llm.get_input_embeddings().weight.device)
    decoder_of(llm)(input_ids=input_ids, past_key_values=cache, use_cache=True)
    return Prefix(tuple(ids), tuple((layer.keys, layer.values) for layer in cache.layers))


PREFIXES_KEPT = 64  # data whose every row has an instruction of its own would fill the memory otherwise


@dataclass
class PromptedLLM:
    """The frozen LLM after a prompt's prefix, whose key/values are computed once and shared by every batch.

    checkpoint_activations: keep no activations inside the layers of a pass with gradients; transformers then
    drops the key/values without a word, so the prefix is put before the sequence instead.
    reuse_prefix: False puts it there always (lockstep.py).
    """

    model: PreTrainedModel
    checkpoint_activations: bool = False
    reuse_prefix: bool = True
    known: OrderedDict[tuple[int, ...], Prefix] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        if self.checkpoint_activations:
            self.model.model.language_model.activation_checkpointing_enable()

    def states(self, prefix_ids: tuple[int, ...], embeds: Tensor) -> Tensor:
        """Last hidden states (B, L, D) of right-padded embeds (B, L, D).

        No mask: causal attention never looks at the padding on the right, whose states nobody reads.
        """
        batch, width = embeds.shape[:2]
        before = len(prefix_ids)
        positions = torch.arange(before + width, device=embeds.device)[None, :].expand(batch, -1)
        decoder = self.model.model.language_model
        checkpointing = self.checkpoint_activations and torch.is_grad_enabled()
        if checkpointing or not self.reuse_prefix:
            whole = torch.cat([embed(self.model, prefix_ids).expand(batch, -1, -1), embeds], dim=1)
            with _checkpointing(decoder) if checkpointing else nullcontext():
                output = decoder(inputs_embeds=whole, position_ids=positions, use_cache=False)
            return output.last_hidden_state[:, before:]
        return decoder(
            inputs_embeds=embeds,
            position_ids=positions[:, before:],
            past_key_values=self._prefix(prefix_ids).expand(batch),
            use_cache=True,
        ).last_hidden_state

    def _prefix(self, ids: tuple[int, ...]) -> Prefix:
        if ids not in self.known:
            self.known[ids] = compute_prefix(self.model, ids)
        self.known.move_to_end(ids)
        if len(self.known) > PREFIXES_KEPT:
            self.known.popitem(last=False)
        return self.known[ids]


@contextmanager
def _checkpointing(decoder: nn.Module) -> Iterator[None]:
    """The layers, not what is inside them, in training mode: they checkpoint, and no dropout wakes up."""
    layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UnsupportedModelError(f"{type(decoder).__name__}: has no layers that can be checkpointed")
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
