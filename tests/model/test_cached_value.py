"""A cached value is computed again only if one of its tensors has changed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blsp.model.adapter_parts import CachedValue
from blsp.model.grounded import GroundedAdapter


def test_worked_out_once_and_again_after_a_change() -> None:
    calls = []

    def doubled(source: Tensor) -> Tensor:
        calls.append(source)
        return 2 * source

    cached, source = CachedValue(), torch.ones(3)
    assert torch.equal(cached.get(doubled, source), cached.get(doubled, source)) and len(calls) == 1
    source += 1
    assert cached.get(doubled, source).tolist() == [4, 4, 4]
    assert cached.get(doubled, torch.zeros(3)).tolist() == [0, 0, 0] and len(calls) == 3


def test_nothing_that_is_learnt_is_kept() -> None:
    cached, source = CachedValue(), nn.Parameter(torch.ones(3))
    assert cached.get(torch.exp, source).requires_grad
    assert cached.get(torch.exp, source) is not cached.get(torch.exp, source)


@torch.no_grad()
def test_a_table_in_bfloat16_is_read_as_its_float32_self() -> None:
    torch.manual_seed(0)
    adapter = GroundedAdapter(8, 16, classes=5, spelling=4).eval()
    states, lengths, table = torch.randn(2, 20, 8), torch.tensor([20, 12]), torch.randn(5, 16).bfloat16()
    for _ in range(2):
        narrow, wide = (adapter(states, lengths, each) for each in (table, table.float()))
        assert torch.equal(narrow.vectors, wide.vectors) and narrow.readout == wide.readout
        table *= 2
