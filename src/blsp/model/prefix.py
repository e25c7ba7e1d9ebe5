"""The constant beginning of every prompt, run through the LLM once.

In:  an LLM and the ids of a prompt's prefix (system prompt, instruction before the speech).
Out: `Prefix`: key/values (1, H, P, d) of each layer, expanded to a batch as a view.
Try: `cache = compute_prefix(llm, frame.prefix_ids).expand(32)`
Flow: model/ — training, teacher passes and decoding begin where the prefix ends (law 8: nothing but the time changes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from blsp.model.language_model import decoder_of


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
