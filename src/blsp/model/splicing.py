"""Speech vectors put in the place of the placeholders, and masked columns moved to the front.

In:  embeddings (B, L, D), a mask of the placeholders (B, L), the vectors (N, D) of all clips and which are valid.
Out: embeddings (B, L, D) and a mask; `pack` moves the masked columns to the front.
Try: `pack(torch.zeros(1, 3, 8), torch.tensor([[1, 0, 1]]))`
Flow: adapter → **splicing.py** in modeling_blsp.py → the LLM.

Shapes: B batch, L sequence, N audio tokens of all clips, D LLM width.
"""

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast


def splice(embeds: Tensor, is_audio: Tensor, vectors: Tensor) -> Tensor:
    """Embeddings (B, L, D) with the vectors (N, D) where `is_audio` (B, L) is True, in order."""
    if int(is_audio.sum()) != len(vectors):
        raise ValueError(
            f"{int(is_audio.sum())} audio placeholders in input_ids, but {len(vectors)} "
            "vectors of speech: build both with the same BlspProcessor"
        )
    return embeds.masked_scatter(is_audio[:, :, None], vectors.to(embeds))


def masked(mask: Tensor | None, is_audio: Tensor, valid: Tensor) -> Tensor:
    """The mask (B, past + L), set to 0 at placeholders without a vector; valid (N,): which ones have a vector."""
    mask = torch.ones_like(is_audio, dtype=torch.long) if mask is None else mask.clone()
    columns = mask[:, -is_audio.shape[1] :]  # the last L columns are the input's
    columns[is_audio] = columns[is_audio] * valid.to(mask)
    return mask


def pack(embeds: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Masked columns moved to the front: embeds (B, L, D), mask (B, past + L), and `order` (B, L).

    A sliding window counts columns, not positions: masked columns inside the sequence would make it shorter.

        columns   say  vector  0  0  again   →   0  0  say  vector  again
        mask      1    1       0  0  1       →   0  0  1    1       1
        order                                    2  3  0    1       4
    """
    width = embeds.shape[1]
    past, columns = mask[:, : mask.shape[1] - width], mask[:, -width:].long()
    order = columns.argsort(dim=1, stable=True)
    packed = torch.cat([past, columns.gather(1, order).to(mask.dtype)], dim=1)
    return embeds.gather(1, order[:, :, None].expand_as(embeds)), packed, order


def unpack(outputs: BaseModelOutputWithPast, order: Tensor) -> BaseModelOutputWithPast:
    """Put hidden states (B, L, D) back into the order of the input; key/values stay packed."""
    back = order.argsort(dim=1)[:, :, None]
    outputs.last_hidden_state = outputs.last_hidden_state.gather(1, back.expand_as(outputs.last_hidden_state))
    if outputs.hidden_states is not None:
        outputs.hidden_states = tuple(h.gather(1, back.expand_as(h)) for h in outputs.hidden_states)
    return outputs
