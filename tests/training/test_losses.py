"""The losses against textbook formulas and torch's own, in float64."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from blsp.training.losses import (
    FILLER_WEIGHT,
    can_align,
    ce_loss,
    chunked,
    ctc_loss,
    draw_others,
    embed_ctc_loss,
    embed_loss,
    kl_loss,
    topk_kl_loss,
)

TIGHT = dict(rtol=0, atol=1e-9)


def _logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_ctc_equals_torch_in_value_and_gradient(data) -> None:
    batch, places, classes = 4, data.draw(st.integers(1, 9)), 5
    blank = data.draw(st.sampled_from([0, classes - 1]))
    tokens = st.sampled_from([c for c in range(classes) if c != blank])
    lengths, targets = [], []
    for _ in range(batch):
        lengths.append(data.draw(st.integers(1, places)))
        target = data.draw(st.lists(tokens, max_size=lengths[-1]))
        targets.append(target if can_align(lengths[-1], target) else [])
    width = max(map(len, targets))
    padded = torch.tensor([t + [0] * (width - len(t)) for t in targets], dtype=torch.long).reshape(batch, width)
    sizes, length = torch.tensor([len(t) for t in targets]), torch.tensor(lengths)
    ours = _logits(batch, places, classes, seed=places).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    loss = ctc_loss(torch.log_softmax(ours, -1), length, padded, sizes, blank)
    flat = torch.tensor([token for target in targets for token in target], dtype=torch.long)
    log_probs = torch.log_softmax(theirs, -1).transpose(0, 1)
    expected = F.ctc_loss(log_probs, flat, length, sizes, blank=blank, reduction="sum")
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, **TIGHT)
    torch.testing.assert_close(ours.grad, theirs.grad, **TIGHT)


def test_ctc_of_silence_is_the_cost_of_blanks() -> None:
    log_probs = torch.log_softmax(_logits(1, 6, 4), -1)
    loss = ctc_loss(log_probs, torch.tensor([4]), torch.zeros(1, 0, dtype=torch.long), torch.tensor([0]), 3)
    torch.testing.assert_close(loss, -log_probs[0, :4, 3].sum(), **TIGHT)


@pytest.mark.parametrize(
    "places, target, possible", [(3, [1, 2, 3], True), (2, [1, 2, 3], False), (2, [1, 1], False), (1, [], True)]
)
def test_can_align(places: int, target: list[int], possible: bool) -> None:
    assert can_align(places, target) is possible


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_chunked_head_changes_neither_loss_nor_gradient(rows: int) -> None:
    head, hidden = _logits(11, 5, seed=1), _logits(7, 5, seed=2).requires_grad_()
    targets = torch.arange(7)
    plain = hidden.detach().clone().requires_grad_()
    whole = ce_loss(plain @ head.T, targets)
    parts = chunked(hidden, lambda h, part: ce_loss(h @ head.T, targets[part]), rows)
    (whole * 0.5).backward()
    (parts * 0.5).backward()
    torch.testing.assert_close(parts, whole, **TIGHT)
    torch.testing.assert_close(hidden.grad, plain.grad, **TIGHT)


def test_chunked_of_nothing_is_zero() -> None:
    hidden = torch.zeros(0, 5, requires_grad=True)
    loss = chunked(hidden, lambda h, part: h.sum(), 4)
    loss.backward()
    assert loss.item() == 0


def test_half_precision_logits_are_widened() -> None:
    logits = _logits(3, 50).bfloat16()
    assert ce_loss(logits, torch.tensor([1, 2, 3])).dtype == torch.float32
    assert kl_loss(logits, logits).item() == 0


def test_rounded_top_k_never_gives_an_infinite_or_nan_loss() -> None:
    sharp = torch.tensor([[40.0, 0.0, -3.0, -5.0, -8.0]])
    logp = torch.log_softmax(sharp, -1)
    for top in (1, 2, 4, 5):
        student = torch.tensor([[-30.0, 60.0, 0.0, 0.0, 0.0]], requires_grad=True)
        ids = torch.arange(top)[None]
        loss = topk_kl_loss(student, ids, logp[:, :top].half())
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(student.grad).all()


def test_embed_loss_is_least_at_the_embeddings_themselves_and_ignores_their_mean() -> None:
    table = _logits(7, 4) + 5.0
    mean, variance = table.mean(dim=0), (table - table.mean(dim=0)).square().mean().item()
    classes, weight = torch.tensor([2, 0, 6]), torch.tensor([1.0, 0.3, 1.0], dtype=torch.float64)
    here = embed_loss(table[classes], classes, table, weight, mean, variance)
    cosines = F.cosine_similarity((table[classes] - mean)[:, None], (table - mean)[None], dim=-1)
    expected = (weight * F.cross_entropy(15 * cosines, classes, reduction="none")).sum()
    torch.testing.assert_close(here, expected, **TIGHT)
    away = embed_loss(table[classes] + 0.5, classes, table, weight, mean, variance)
    assert away > here
    shifted = embed_loss(table[classes] + 3.0, classes, table + 3.0, weight, mean + 3.0, variance)
    torch.testing.assert_close(shifted, here, rtol=1e-9, atol=0)


def test_embed_ctc_sums_embed_over_all_placements() -> None:
    table, vectors = _logits(6, 4), _logits(2, 5, 4)
    mean, variance = table.mean(dim=0), (table - table.mean(dim=0)).square().mean().item()
    lengths, sizes = torch.tensor([5, 3]), torch.tensor([2, 1])
    targets = torch.tensor([[2, 2], [4, 0]])  # equal tokens need no filler between them; row 2 has one token
    expected = torch.zeros((), dtype=table.dtype)
    for row, length, target in zip(vectors, (5, 3), ([2, 2], [4]), strict=True):
        costs = []
        for places in combinations(range(length), len(target)):
            classes = torch.zeros(length, dtype=torch.long)
            classes[list(places)] = torch.tensor(target)
            weight = torch.where(classes == 0, FILLER_WEIGHT, torch.ones(length, dtype=table.dtype))
            costs.append(embed_loss(row[:length], classes, table, weight, mean, variance))
        expected = expected - torch.logsumexp(-torch.stack(costs), dim=0)
    found = embed_ctc_loss(vectors, lengths, table, targets, sizes, mean, variance)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_others_are_drawn_from_what_the_batch_does_not_hold() -> None:
    own = torch.tensor([3, 7])
    every, some = draw_others(own, 10, 0, seed=7), draw_others(own, 10, 4, seed=7)
    assert every.tolist() == [0, 1, 2, 4, 5, 6, 8, 9]
    assert len(set(some.tolist())) == 4 and set(some.tolist()) <= set(every.tolist())
    assert torch.equal(some, draw_others(own, 10, 4, seed=7))
