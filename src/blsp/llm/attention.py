"""Attention of the LLM in bfloat16 on a CPU, where the backward pass of torch's own is slow.

In:  a frozen LLM, for training. Out: the same LLM, with `short` as its attention.
Try: `use_short_attention(llm)`
Flow: training/run.py (`prepare`) → **attention.py** → training/step.py

torch's fused attention takes 29 ms backward for 16 rows of 60 positions after 42 of a prefix (9 heads of 64, one
thread, AVX-512 BF16), plain products 14 ms (docs/log.md, 2026-11-29). Plain products store the attention's weights,
so only short rows use them; float32, passes without gradient and long rows use torch's own attention.

Shapes: B batch, H heads, L queries, K keys, d head width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "short"
MOST_KEYS = 256  # beyond it the kept weights, 8 bytes a query, key and head, are too much memory


def use_short_attention(llm: PreTrainedModel) -> None:
    """Let the LLM use plain products for short rows in bfloat16 that need a gradient."""
    AttentionInterface.register(NAME, short_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    llm.set_attn_implementation(NAME)


def short_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """As transformers' `sdpa`: query (B, H, L, d), key and value (B, H or fewer, K, d), mask bool -> (B, L, H, d)."""
    plain = torch.is_grad_enabled() and query.dtype == torch.bfloat16 and key.shape[2] <= MOST_KEYS
    if not plain or (attention_mask is not None and attention_mask.dtype != torch.bool):
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
        return output, None
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if attention_mask is None:  # causal, and nothing before
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    with torch.autocast(query.device.type, enabled=False):  # it would make bfloat16 of float32 products
        scores = query.float() @ key.float().transpose(2, 3) * scale  # (B, H, L, K)
    # the least number, not -inf: a padded position that may attend to nothing would be NaN, and so would all gradients
    weights = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min).softmax(dim=-1)
    return (weights.to(query.dtype) @ value).transpose(1, 2).contiguous(), None
