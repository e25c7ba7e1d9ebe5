"""Attention of the LLM: on a CPU, where torch's own is slow in two cases; and which kinds take a mask of one's own.

In:  a frozen LLM. Out: the same LLM, with `cpu_attention` as its attention; an error where a mask would be misread.
Try: `use_cpu_attention(llm)`
Flow: model/loading.py (`load_language_model`) → **attention.py** → every pass of the LLM

- bfloat16, backward: torch's fused attention takes 29 ms for 16 rows of 60 positions after 42 of a prefix (9 heads of
  64, one thread, AVX-512 BF16), plain products 14 ms (docs/log.md, 2026-11-29). Plain products store the attention's
  weights, so only short rows use them.
- several queries after a long prefix: transformers copies each key/value head once for each of its query heads. torch
  can do without: 23 ms instead of 43 for 64 queries and 7,000 keys, with the same bits (docs/log.md, 2026-11-30).

Shapes: B batch, H heads, L queries, K keys, d head width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from blsp.llm.language_model import UnsupportedModelError

NAME = "cpu"
MOST_KEYS = 256  # beyond it the kept weights, 8 bytes a query, key and head, are too much memory


def use_cpu_attention(llm: PreTrainedModel) -> None:
    """Let an LLM that uses torch's attention use `cpu_attention`; others keep their own."""
    if llm.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, cpu_attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        llm.set_attn_implementation(NAME)


def check_takes_masks(decoder: Any) -> None:
    """Raise UnsupportedModelError unless the decoder's attention takes an additive mask (1, 1, L, K).

    Those that do have the masks of `sdpa` or `eager`; flash attention would take it for a mask of padding.
    """
    name = decoder.config._attn_implementation
    if AttentionMaskInterface().get(name) not in (sdpa_mask, eager_mask):
        raise UnsupportedModelError(
            f"--attn-implementation {name}: the LLM cannot choose among read-outs with it, since it takes no mask for "
            "their tree; pass --rescore never, or --attn-implementation sdpa"
        )


def cpu_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """As transformers' `sdpa`: query (B, H, L, d), key and value (B, H or fewer, K, d), mask bool -> (B, L, H, d)."""
    additive = attention_mask is not None and attention_mask.dtype != torch.bool
    learning, shared = torch.is_grad_enabled(), key.shape[1] < query.shape[1]
    if learning and query.dtype == torch.bfloat16 and key.shape[2] <= MOST_KEYS and not additive:
        return _plain_products(query, key, value, attention_mask, scaling), None
    if not learning and shared and query.shape[2] > 1 and attention_mask is not None and not additive:
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, attention_mask, scale=scaling, enable_gqa=True
        )
        return output.transpose(1, 2).contiguous(), None
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    return output, None


def _plain_products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """(B, H, L, d), … -> (B, L, H, d)."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if mask is None:  # causal, and nothing before
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    with torch.autocast(query.device.type, enabled=False):  # it would make bfloat16 of float32 products
        scores = query.float() @ key.float().transpose(2, 3) * scale  # (B, H, L, K)
    # the least number, not -inf: a padded position that may attend to nothing would be NaN, and so would all gradients
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=-1)
    return (weights.to(query.dtype) @ value).transpose(1, 2).contiguous()
