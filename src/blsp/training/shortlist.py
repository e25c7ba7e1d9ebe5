"""Grounding over a shortlist: the batch's own tokens and a drawn sample of the others.

In:  frames (B, S, D), the read-out table, the transcripts of a micro-batch.
Out: CTC log-probabilities over blank, own tokens and sample, and the transcripts renumbered to them.
Try: ``shortlist(adapter, hidden, table, targets, negatives=2000)``
Flow: training/step.py -> **shortlist.py** -> training/losses.py (`ctc_loss`).

Most of a grounding step is the softmax over 14,000 read-out tokens, of which a micro-batch's transcripts hold
some hundred. CTC needs the others in the normaliser alone, and there a uniform sample does: its sum, times the
number of tokens that it stands for, is an unbiased estimate of theirs (importance sampling of the partition
function; Bengio & Senécal 2003, Jean et al. 2015). The sample is a function of the transcripts, so that a
resumed run draws the same.

Letters: B batch, S frames of the stack, D LLM width, C own tokens + sample + blank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from blsp.model.grounded import GroundedAdapter


def shortlist(
    adapter: GroundedAdapter,
    hidden: Tensor,
    table: Tensor,
    targets: Sequence[Sequence[int]],
    negatives: int,
) -> tuple[Tensor, list[list[int]]]:
    """hidden (B, S, D), targets in read-out classes (blank is 0) -> log-probabilities (B, S, C), targets among C."""
    own = sorted(set().union(*targets))
    tokens = torch.tensor([each - 1 for each in own], dtype=torch.long)
    others = torch.ones(len(table), dtype=torch.bool)
    others[tokens] = False
    sample = _draw(others.nonzero().flatten(), negatives, seed=sum(map(sum, targets)))
    stands_for = math.log(max(1, int(others.sum())) / negatives)
    logits = adapter.logits(hidden, table, torch.cat([tokens, sample]).to(hidden.device))
    weight = torch.zeros(logits.shape[-1], dtype=logits.dtype, device=logits.device)
    weight[1 + len(own) :] = stands_for
    number = {each: place for place, each in enumerate(own, start=1)}
    return (logits + weight).log_softmax(dim=-1), [[number[each] for each in target] for target in targets]


def _draw(tokens: Tensor, count: int, seed: int) -> Tensor:
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
    return tokens[order[:count]]
