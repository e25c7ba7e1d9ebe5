"""Law 9: the whole-vocabulary KL is the textbook formula; stored top-k bounds it from below and reaches it;
ce is its
limit for a teacher temperature going to 0. (That stored top-k of one temperature refuses another:
test_examples.py.)"""

import pytest
import torch

from blsp.training.losses import ce_loss, kl_loss, topk_kl_loss

N, V = 6, 40


def _pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(N, V, generator=generator, dtype=torch.float64) * 4 for _ in range(2))
    return student, teacher


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_kl_is_the_textbook_formula(temperature: float) -> None:
    student, teacher = _pair()
    p, q = (torch.softmax(x / temperature, -1) for x in (teacher, student))
    loss = kl_loss(student, teacher, temperature)
    torch.testing.assert_close(loss, (p * (p / q).log()).sum(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_is_a_lower_bound_that_reaches_the_whole(temperature: float) -> None:
    student, teacher = _pair()
    whole = kl_loss(student, teacher, temperature)
    logp, ids = torch.log_softmax(teacher / temperature, -1).sort(-1, descending=True)
    bounds = [topk_kl_loss(student, ids[:, :k], logp[:, :k], temperature).item() for k in (1, 2, 4, 8, 16, 32, V)]
    assert bounds == sorted(bounds)
    assert bounds[-2] <= whole.item() + 1e-9
    assert bounds[-1] == pytest.approx(whole.item(), abs=1e-9)


def test_top_k_buckets_the_tail_on_both_sides() -> None:
    student, teacher = _pair()
    logp, ids = torch.log_softmax(teacher, -1).topk(5, -1)
    q = torch.softmax(student, -1).gather(-1, ids)
    p = logp.exp()
    rest_p, rest_q = 1 - p.sum(-1), 1 - q.sum(-1)
    expected = (p * (p / q).log()).sum() + (rest_p * (rest_p / rest_q).log()).sum()
    torch.testing.assert_close(topk_kl_loss(student, ids, logp), expected, rtol=0, atol=1e-9)


def test_ce_is_the_limit_of_a_cold_teacher() -> None:
    student, teacher = _pair()
    expected = ce_loss(student, teacher.argmax(-1))
    cold = kl_loss(student * 1e-3, teacher, temperature=1e-3)  # the student's temperature is 1
    torch.testing.assert_close(cold, expected, rtol=0, atol=1e-9)
