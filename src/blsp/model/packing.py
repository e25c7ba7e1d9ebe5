"""Columns of a batch that nobody attends to, moved out of the way of the LLM.

In:  embeddings (B, L, D) and the mask (B, past + L) in which some columns are invalid.
Out: the same with the invalid columns first, and the way back.
Try: `embeds, mask, order = pack(embeds, mask)`
Flow: model/ — places of a `grounded` adapter that hold no vector lie amid the sequence. A sliding window
      counts columns, not positions: they would shorten its reach. Packed, they lie before it all (law 6).

Letters: B batch, L sequence, D LLM width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast


def pack(embeds: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both with invalid columns first: embeds (B, L, D), mask (B, past + L); `order` (B, L): old places."""
    width = embeds.shape[1]
    past, here = mask[:, : mask.shape[1] - width], mask[:, -width:].long()
    order = here.argsort(dim=1, stable=True)
    packed = torch.cat([past, here.gather(1, order).to(mask.dtype)], dim=1)
    return embeds.gather(1, order[:, :, None].expand_as(embeds)), packed, order


def unpack(outputs: BaseModelOutputWithPast, order: Tensor) -> BaseModelOutputWithPast:
    """Hidden states (B, L, D) in the order of the input again; key/values stay packed."""
    back = order.argsort(dim=1)[:, :, None]
    outputs.last_hidden_state = outputs.last_hidden_state.gather(1, back.expand_as(outputs.last_hidden_state))
    if outputs.hidden_states is not None:
        outputs.hidden_states = tuple(h.gather(1, back.expand_as(h)) for h in outputs.hidden_states)
    return outputs
