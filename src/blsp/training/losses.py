"""The three losses of the method, pure functions; and how to take them without all logits at once.

In:  logits at response positions, flat over the batch, and what they should be; or the adapter's own
     posteriors.
Out: ``(sum, count)``: the sum in nats (differentiable) and the number of things summed. The caller divides by
     the count of the whole step, over all its micro-batches and ranks, so that 8 x 1 equals 1 x 8.
Try: ``ce_loss(torch.zeros(1, 4), torch.tensor([2]))``  ->  ``(tensor(1.3863), 1)``
Flow: continuations -> training/batches.py -> **losses.py** -> training/loop.py

- ``ce``: cross-entropy on the LLM's own continuation (BLSP, 2309.00916).
- ``kl``: divergence from the LLM that reads to the LLM that listens (BLSP-KD, 2405.19041), teacher run beside
  the student or read from stored top-k log-probabilities.
- ``ctc``: grounding; the adapter's posteriors over the LLM's tokens against the transcript (Graves et al.
  2006).

Letters: N response positions, V vocabulary, K stored top-k, B batch, S adapter places, C read-out classes, U
target tokens, D LLM width.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blsp.llm.language_model import at_least_float32, kl_divergence

Total = tuple[Tensor, int]

IMPOSSIBLE = -1e30  # log-probability of a path that cannot be; finite, so that no gradient becomes NaN


def ce_loss(logits: Tensor, targets: Tensor) -> Total:
    """Cross-entropy of ``targets`` (N,) under ``logits`` (N, V)."""
    return F.cross_entropy(at_least_float32(logits), targets, reduction="sum"), targets.numel()


def kl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    student_temperature: float | None = None,
) -> Total:
    """KL(teacher || student) over the whole vocabulary, (N, V) both, in nats at ``temperature``.

    The student is taken at the teacher's temperature (Hinton et al. 2015) unless ``student_temperature`` is
    given; with the student at 1 and the teacher's going to 0 this becomes ``ce_loss`` on the teacher's best
    token.
    """
    teacher = torch.log_softmax(at_least_float32(teacher_logits) / temperature, dim=-1)
    student = torch.log_softmax(
        at_least_float32(student_logits) / (student_temperature or temperature), dim=-1
    )
    return kl_divergence(teacher, student).sum(), student.shape[0]


def topk_kl_loss(
    student_logits: Tensor, top_ids: Tensor, top_logp: Tensor, temperature: float = 1.0
) -> Total:
    """KL(teacher || student) from the teacher's K best log-probabilities (N, K), taken at ``temperature``.

    What is left of the vocabulary is one bucket on both sides, so this is a lower bound of `kl_loss` (the
    log-sum inequality) that reaches it as K grows.
    """
    logits = at_least_float32(student_logits) / temperature
    teacher, teacher_tail = _teacher_with_tail(top_logp.to(logits.dtype))
    top = logits.gather(-1, top_ids.long())  # (N, K)
    if top_ids.shape[-1] == logits.shape[-1]:
        return (teacher.exp() * (teacher - torch.log_softmax(top, dim=-1))).sum(), logits.shape[0]
    rest = torch.logsumexp(logits.scatter(-1, top_ids.long(), -torch.inf), dim=-1)  # (N,)
    norm = torch.logaddexp(torch.logsumexp(top, dim=-1), rest)
    heads = (teacher.exp() * (teacher - top + norm[:, None])).sum(-1)
    tails = teacher_tail * (teacher_tail.clamp_min(torch.finfo(logits.dtype).tiny).log() - rest + norm)
    return (heads + tails).sum(), logits.shape[0]


def _teacher_with_tail(top_logp: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) log-probabilities and (N,) the probability left over; rounding to float16 must not make the sum
    pass 1.
    """
    total = torch.logsumexp(top_logp, dim=-1, keepdim=True)
    top_logp = top_logp - total.clamp_min(0)
    return top_logp, -torch.expm1(total.squeeze(-1).clamp_max(0))


def ctc_loss(
    log_probs: Tensor, lengths: Tensor, targets: Tensor, target_lengths: Tensor, blank: int
) -> Total:
    """Negative log-likelihood of ``targets`` (B, U; right-padded) under ``log_probs`` (B, S, C) of true
    ``lengths`` (B,).

    Count: target tokens, where an empty target (no speech) counts as one. Every row must be possible
    (`can_align`). Unlike ``torch.nn.functional.ctc_loss`` only the U + 1 classes of a row take part in the
    recursion, so neither it nor its gradient walks over all C classes, and it is deterministic on every
    device.
    """
    labels = torch.cat([torch.full_like(targets[:, :1], blank), targets], dim=1) if targets.shape[1] else None
    if labels is None:
        labels = torch.full((len(targets), 1), blank, dtype=torch.long, device=targets.device)
    labels = labels.clamp(0, log_probs.shape[-1] - 1)
    taken = at_least_float32(
        log_probs.gather(-1, labels[:, None, :].expand(-1, log_probs.shape[1], -1))
    )  # (B, S, 1 + U)
    states = 2 * targets.shape[1] + 1
    of_label = (torch.arange(states, device=targets.device) + 1) // 2
    of_label[::2] = 0  # blank, token 1, blank, token 2, ..., blank
    emissions = taken[:, :, of_label].transpose(0, 1)  # (S, B, 2U+1)
    final = _forward_variables(emissions, lengths, labels[:, of_label])
    ends = torch.stack([2 * target_lengths, (2 * target_lengths - 1).clamp_min(0)], dim=1)
    last = final.gather(1, ends)
    only_blank = (target_lengths == 0)[:, None] & torch.tensor([False, True], device=last.device)
    nll = -torch.logsumexp(last.masked_fill(only_blank, IMPOSSIBLE), dim=1)
    return nll.sum(), int(target_lengths.clamp_min(1).sum())


def _forward_variables(emissions: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
    """The CTC forward recursion: emissions (S, B, X), labels (B, X) -> log-probability of each state at the
    end (B, X).
    """
    steps, batch, states = emissions.shape
    reachable = torch.arange(states, device=emissions.device) < 2
    alpha = torch.where(reachable, emissions[0], IMPOSSIBLE)
    skip = torch.zeros(
        batch, states, dtype=torch.bool, device=emissions.device
    )  # over a blank, to another token
    skip[:, 3::2] = labels[:, 3::2] != labels[:, 1:-2:2]
    for t in range(1, steps):
        one = F.pad(alpha[:, :-1], (1, 0), value=IMPOSSIBLE)
        two = F.pad(alpha[:, :-2], (2, 0), value=IMPOSSIBLE).masked_fill(~skip, IMPOSSIBLE)[:, :states]
        moved = torch.logsumexp(torch.stack([alpha, one, two]), dim=0) + emissions[t]
        alpha = torch.where((t < lengths)[:, None], moved, alpha)
    return alpha


def can_align(places: int, target: list[int]) -> bool:
    """Whether CTC can spell ``target`` in so many places: a place a token and one between two equal ones."""
    return places >= max(1, len(target) + sum(a == b for a, b in pairwise(target)))


def chunked(hidden: Tensor, loss_of: Callable[[Tensor, slice], Tensor], rows: int) -> Tensor:
    """Sum of ``loss_of(hidden[part], part)`` over parts of ``rows`` positions of ``hidden`` (N, D).

    ``loss_of`` goes through the frozen vocabulary head; its (rows, V) logits die with the part. Since nothing
    but ``hidden`` needs a gradient, that gradient (N, D) is taken on the way forward and no logits are kept
    or recomputed.
    """
    if not hidden.shape[0]:
        return hidden.sum()
    return _Chunked.apply(hidden, loss_of, rows)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss_of: Callable[[Tensor, slice], Tensor], rows: int) -> Tensor:
        total, gradients = [], []
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            if not ctx.needs_input_grad[0]:
                total.append(loss_of(hidden[part], part))
                continue
            with torch.enable_grad():
                leaf = hidden[part].detach().requires_grad_()
                loss = loss_of(leaf, part)
            gradients.append(torch.autograd.grad(loss, leaf)[0])
            total.append(loss.detach())
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.stack(total).sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None
