"""Grounding over a shortlist estimates grounding over the whole read-out vocabulary."""

from __future__ import annotations

from itertools import count

import pytest
import torch

from blsp.model.grounded import GroundedAdapter
from blsp.training.losses import draw_others, shortlist

TARGETS = [[3, 7, 7], [], [40, 3]]


def adapter_and_table() -> tuple[GroundedAdapter, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    adapter = GroundedAdapter(8, 16, classes=60, bottleneck=4).double()
    torch.nn.init.normal_(adapter.bias)
    return adapter, torch.randn(3, 5, 16, dtype=torch.float64), torch.randn(60, 16, dtype=torch.float64)


def test_with_every_other_token_drawn_nothing_changes() -> None:
    adapter, hidden, table = adapter_and_table()
    whole = adapter.logits(hidden, table).log_softmax(dim=-1)
    few, targets = shortlist(adapter, hidden, table, TARGETS, negatives=57)
    for place, target in zip((1, 2, 3), (3, 7, 40), strict=True):
        torch.testing.assert_close(few[..., place], whole[..., target], atol=1e-12, rtol=0)
    torch.testing.assert_close(few[..., 0], whole[..., 0], atol=1e-12, rtol=0)
    assert targets == [[1, 2, 2], [], [3, 1]]


def test_the_normaliser_is_estimated_without_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, hidden, table = adapter_and_table()
    whole = adapter.logits(hidden, table)
    seeds = count()  # another draw each time
    monkeypatch.setattr(
        "blsp.training.losses.draw_others",
        lambda own, vocabulary, negatives, seed: draw_others(own, vocabulary, negatives, next(seeds)),
    )
    with torch.no_grad():
        estimates = [
            (whole[..., 0] - shortlist(adapter, hidden, table, TARGETS, negatives=20)[0][..., 0]).exp()
            for _ in range(3000)
        ]
        ratio = torch.stack(estimates).mean(dim=0) / whole.logsumexp(dim=-1).exp()
    torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=0.08, rtol=0)


def test_the_same_transcripts_draw_the_same() -> None:
    adapter, hidden, table = adapter_and_table()
    first, again = (shortlist(adapter, hidden, table, TARGETS, negatives=20)[0] for _ in range(2))
    assert torch.equal(first, again)
