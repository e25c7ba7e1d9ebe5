"""The frozen LLM behind the constant beginning of a prompt (system prompt, instruction before the speech).

In:  an LLM, the ids of a prompt's prefix, and the embeddings (B, L, D) that follow it.
Out: the decoder's output at those embeddings. The prefix's key/values are computed once and shared by all rows.
Try: `run_after_prefix(llm, PrefixCache(llm).get(template.prefix_ids), embeds).last_hidden_state`
Flow: prompt.py (ids) → **prefix.py** → training, teacher passes, decoding and scoring. It saves time and changes
      no result (law 8).

                 prefix (P tokens, once)      what follows (L tokens a row, right-padded)
    row 0        [s y s t e m  u s e r]       [speech  suffix  answer]
    row 1         the same key/values         [speech  suffix] . . . .

Shapes: B batch, L sequence after the prefix, P prefix length, H key/value heads, d head width, D LLM width.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from blsp.llm.attention import check_takes_masks
from blsp.llm.language_model import UnsupportedModelError, decoder_of, embed


@dataclass(frozen=True)
class Prefix:
    """The beginning of a sequence: its ids, and its key/values, one (keys, values) pair a layer, each (1, H, P, d).

    ids: empty if the prefix is a row's key/values from the decode loop (`Event.cache`), as speech has no ids.
    layers: empty if key/values must not be reused; the ids are then run again before every row.
    """

    ids: tuple[int, ...]
    layers: tuple[tuple[Tensor, Tensor], ...] = ()

    def __len__(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else len(self.ids)

    def cut(self, length: int) -> "Prefix":
        """The first `length` tokens, as views."""
        layers = tuple((keys[:, :, :length], values[:, :, :length]) for keys, values in self.layers)
        return Prefix(self.ids[:length], layers)

    def expand(self, batch: int) -> DynamicCache:
        """A cache for `batch` rows; the rows are views of one copy until a layer appends to them."""
        cache = DynamicCache()
        cache.layers = [_filled_layer(keys, values, batch) for keys, values in self.layers]
        return cache


def _filled_layer(keys: Tensor, values: Tensor, batch: int) -> DynamicLayer:
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


class PrefixCache:
    """Prefixes of one LLM by their ids; at most `size` of them, the least recently used is dropped first.

    Without a limit, data in which every row has its own instruction would fill the memory.
    reuse: False for an LLM that is sharded over ranks. All ranks must run it equally often, so none may compute
    a prefix alone; the prefixes then hold only their ids.
    """

    def __init__(self, llm: PreTrainedModel, size: int = 64, *, reuse: bool = True) -> None:
        self.llm, self.size, self.reuse = llm, size, reuse
        self._prefixes: OrderedDict[tuple[int, ...], Prefix] = OrderedDict()

    def __len__(self) -> int:
        return len(self._prefixes)

    def get(self, ids: Sequence[int]) -> Prefix | None:
        """The prefix with these ids, the same object while it is in the cache; None if there are no ids."""
        key = tuple(ids)
        if not key:
            return None
        if not self.reuse or _checkpoints_activations(decoder_of(self.llm)):
            return Prefix(key)
        if key not in self._prefixes:
            self._prefixes[key] = compute_prefix(self.llm, key)
        self._prefixes.move_to_end(key)
        if len(self._prefixes) > self.size:
            self._prefixes.popitem(last=False)
        return self._prefixes[key]


def run_after_prefix(
    llm: PreTrainedModel,
    prefix: Prefix | None,
    embeds: Tensor,
    *,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    keep_cache: bool = False,
    every_layer: bool = False,
) -> BaseModelOutputWithPast:
    """The decoder's output at `embeds` (B, L, D), right-padded, after `prefix` (None: nothing comes before).

    Without `mask`, attention is causal: no row attends to the padding on its right, and the states there are unused.
    mask: additive, (1, 1, L, P + L), for sequences that are not simply causal.
    offsets: (1 or B, L), each embedding's position after the prefix; by default 0, 1, 2, …
    keep_cache: return the key/values of prefix and rows, in `past_key_values`.
    every_layer: return the states of all layers, in `hidden_states`.
    """
    decoder, batch = decoder_of(llm), len(embeds)
    if mask is not None:
        check_takes_masks(decoder)
    checkpointing = _checkpoints_activations(decoder)
    again = len(prefix) if prefix and (checkpointing or not prefix.layers) else 0

    # Under activation checkpointing transformers drops a cache silently: put the ids before each row instead.
    if prefix and again:
        assert len(prefix.ids) == again and mask is None and offsets is None, "only plain rows can be run again"
        embeds = torch.cat([embed(llm, prefix.ids).expand(batch, -1, -1), embeds], dim=1)  # (B, P + L, D)
        prefix = None

    # Positions continue those of the prefix; all rows share its key/values as views.
    if offsets is None:
        offsets = torch.arange(embeds.shape[1], device=embeds.device)[None]
    cache = prefix.expand(batch) if prefix else DynamicCache() if keep_cache else None
    with _checkpointed_layers(decoder) if checkpointing else nullcontext():
        output = decoder(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=((len(prefix) if prefix else 0) + offsets).expand(batch, -1),
            past_key_values=cache,
            use_cache=cache is not None,
            output_hidden_states=every_layer,
        )

    # Return only the states of `embeds`.
    if again:
        output.last_hidden_state = output.last_hidden_state[:, again:]
        if every_layer:
            output.hidden_states = tuple(states[:, again:] for states in output.hidden_states)
    return output


def _checkpoints_activations(decoder: nn.Module) -> bool:
    """Whether a pass that starts now checkpoints activations, which saves memory."""
    return torch.is_grad_enabled() and bool(decoder.is_activation_checkpointing)


@contextmanager
def _checkpointed_layers(decoder: nn.Module) -> Iterator[None]:
    """Set the layers to training mode, but not the modules inside them: they checkpoint, and dropout stays off."""
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
