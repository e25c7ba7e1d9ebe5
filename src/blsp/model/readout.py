"""Which of the LLM's tokens a `grounded` adapter reads out, and how they are spelled.

In:  a model, more tokens for it, the strings of token ids.
Out: the same model with a wider read-out; what it knew stays as it was.
Try: `widen_readout(model, [123], lambda ids: token_strings(tokenizer, ids))`
Flow: model/ — when an adapter is made, and when one is trained further on texts with other words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from blsp.model.modeling_blsp import BlspModel
from blsp.model.spelling import letter_groups

StringsOf = Callable[[Sequence[int]], list[str]]


def spell_readout(model: BlspModel, strings_of: StringsOf) -> None:
    """Tell the adapter how the read-out tokens are spelled; nothing to tell one that does not ask."""
    spelling = getattr(model.multi_modal_projector, "spelling", None)
    if spelling is not None:
        ids = model.config.readout_vocabulary or range(model.config.text_config.vocab_size)
        spelling.groups = letter_groups(strings_of(list(ids))).to(spelling.groups.device)


def widen_readout(model: BlspModel, tokens: Iterable[int], strings_of: StringsOf) -> None:
    """Add LLM tokens to what is read out; a new token's bias begins at the mean of the others'."""
    known = model.config.readout_vocabulary
    vocabulary = sorted({*(known or ()), *tokens})
    if known is None or len(vocabulary) == len(known):
        return
    adapter: Any = model.multi_modal_projector
    bias = adapter.bias.new_full((len(vocabulary),), float(adapter.bias.detach().mean()))
    place = {token: index for index, token in enumerate(vocabulary)}
    bias[[place[token] for token in known]] = adapter.bias.detach()
    adapter.bias = nn.Parameter(bias)
    whole = len(vocabulary) == model.config.text_config.vocab_size
    model.config.readout_vocabulary = None if whole else vocabulary
    spell_readout(model, strings_of)
