"""The losses against textbook formulas and torch's own, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from blsp.training.losses import can_align, ce_loss, chunked, ctc_loss, kl_loss, topk_kl_loss

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
