"""The losses, as pure functions; and their computation in parts, without all logits at once.

In:  logits at response positions, flat over the batch, and their targets; or the adapter's own output.
Out: the sum in nats, differentiable. The caller divides it by a count of the whole step, over all micro-batches
     and ranks, so that 8 x 1 equals 1 x 8 (law 5).
Try: ``ce_loss(torch.zeros(1, 4), torch.tensor([2]))``  ->  ``tensor(1.3863)``
Flow: training/step.py -> **losses.py** -> training/loop.py

- ``ce``: cross-entropy of the LLM's own continuation (BLSP, 2309.00916; AZeroS, 2601.06086, has top results with it).
- ``kl``: divergence between the text route and the speech route (BLSP-KD, 2405.19041). The teacher is run beside the
  student, or its top-k log-probabilities were stored. On held-out speech it predicts task scores (SALAD, 2510.13632).
  DiVA (2410.02678) uses the distance of the states before the head instead.
- ``embed``: distance of the adapter's vectors from the embeddings of the tokens that are spoken there (SpeechMapper,
  2601.20417, also trains a projector without the LLM). ``embed-ctc``: the same if the tokens' times are not known.
- ``ctc``: the transcript under the adapter's posteriors over the LLM's tokens (Graves et al. 2006).

Shapes: N response positions, V vocabulary, K stored top-k, B batch, S adapter places,
C classes, U target tokens, X = 2U + 1 CTC states, D LLM width.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blsp.llm.language_model import at_least_float32, kl_divergence
from blsp.model.adapter_parts import IMPOSSIBLE


# --- at response positions --------------------------------------------------------------------------------
def ce_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of ``targets`` (N,) under ``logits`` (N, V)."""
    return F.cross_entropy(at_least_float32(logits), targets, reduction="sum")


def kl_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) over the whole vocabulary, (N, V) both, in nats at ``temperature`` (Hinton et al. 2015).

    If only the teacher's temperature goes to 0, it becomes ``ce_loss`` on the teacher's best token.
    """
    teacher, student = (at_least_float32(logits) / temperature for logits in (teacher_logits, student_logits))
    return kl_divergence(teacher.log_softmax(dim=-1), student.log_softmax(dim=-1)).sum()


def topk_kl_loss(student_logits: Tensor, top_ids: Tensor, top_logp: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) from the teacher's K best log-probabilities (N, K), taken at ``temperature``.

    The rest of the vocabulary is one bucket on both sides, so this is a lower bound of `kl_loss` (by the log-sum
    inequality), equal to it if K is the vocabulary.
    """
    logits = at_least_float32(student_logits) / temperature  # (N, V)
    teacher, teacher_rest = _teacher_with_rest(top_logp.to(logits.dtype))  # (N, K), (N,)
    top = logits.gather(-1, top_ids.long())  # (N, K)
    if top_ids.shape[-1] == logits.shape[-1]:  # no rest
        return kl_divergence(teacher, torch.log_softmax(top, dim=-1)).sum()

    # Logarithms of the student's K tokens and of its rest, before normalisation
    rest = torch.logsumexp(logits.scatter(-1, top_ids.long(), -torch.inf), dim=-1)  # (N,)
    norm = torch.logaddexp(torch.logsumexp(top, dim=-1), rest)  # (N,)

    # p log(p / q) of the K tokens and of the rest; a rest of 0 adds 0
    tokens = (teacher.exp() * (teacher - top + norm[:, None])).sum(-1)  # (N,)
    tiny = torch.finfo(logits.dtype).tiny
    bucket = teacher_rest * (teacher_rest.clamp_min(tiny).log() - rest + norm)  # (N,)
    return (tokens + bucket).sum()


def _teacher_with_rest(top_logp: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N, K) and the probability of all other tokens (N,).

    They are stored in float16: if rounding makes their sum larger than 1, they are normalised.
    """
    total = torch.logsumexp(top_logp, dim=-1, keepdim=True)  # (N, 1)
    top_logp = top_logp - total.clamp_min(0)
    return top_logp, -torch.expm1(total.squeeze(-1).clamp_max(0))


# --- on the adapter's own output --------------------------------------------------------------------------
def ctc_loss(
    log_probs: Tensor, lengths: Tensor, targets: Tensor, target_lengths: Tensor, blank: int, *, repeats: bool = True
) -> Tensor:
    """-log p(targets), for ``targets`` (B, U; right-padded) and ``log_probs`` (B, S, C) of true ``lengths`` (B,).

    Every row must be possible (`can_align`). repeats: whether a token may last several places, as in CTC; if not, it
    takes exactly one, and equal tokens need no blank between them.

    Why not ``torch.nn.functional.ctc_loss``: this function uses only the U + 1 classes of a row, and not all C classes,
    for value and gradient. With 14,000 classes, 32 clips of 50 places and 12 tokens they take 0.32 s, with torch's
    function 1.38 s (torch 2.13, one busy CPU core). And torch's gradient is not deterministic on CUDA, so a resumed run
    would not have the same bits (law 4).
    """
    # Classes of each row's states: blank, token 1, blank, token 2, …, blank
    blanks = torch.full((len(targets), 1), blank, dtype=torch.long, device=targets.device)
    labels = torch.cat([blanks, targets.long()], dim=1).clamp(0, log_probs.shape[-1] - 1)  # (B, 1 + U)
    states = torch.arange(2 * targets.shape[1] + 1, device=targets.device)  # (X,)
    label_of_state = torch.where(states % 2 == 0, 0, (states + 1) // 2)  # U = 2: [0, 1, 0, 2, 0]

    # Scores of those classes at each place
    index = labels[:, None, :].expand(-1, log_probs.shape[1], -1)  # (B, S, 1 + U)
    emissions = at_least_float32(log_probs.gather(-1, index))[:, :, label_of_state].transpose(0, 1)  # (S, B, X)
    final = _forward_variables(emissions, lengths, labels[:, label_of_state], repeats)  # (B, X)

    # A path ends in the last token or in the blank after it; for an empty target only in the blank
    ends = torch.stack([2 * target_lengths, (2 * target_lengths - 1).clamp_min(0)], dim=1)  # (B, 2)
    no_token = (target_lengths == 0)[:, None] & torch.tensor([False, True], device=final.device)
    return -torch.logsumexp(final.gather(1, ends).masked_fill(no_token, IMPOSSIBLE), dim=1).sum()


def _forward_variables(emissions: Tensor, lengths: Tensor, labels: Tensor, repeats: bool) -> Tensor:
    """The CTC forward recursion: emissions (S, B, X), labels (B, X) -> log-probability of each state at the
    end (B, X).
    """
    places, batch, states = emissions.shape
    reachable = torch.arange(states, device=emissions.device) < 2  # a path begins with a blank or with token 1
    alpha = torch.where(reachable, emissions[0], IMPOSSIBLE)  # (B, X)

    # A path may go from a token directly to the next one, unless they are equal: then it needs the blank between them
    skip = torch.zeros(batch, states, dtype=torch.bool, device=emissions.device)
    skip[:, 3::2] = (labels[:, 3::2] != labels[:, 1:-2:2]) | (not repeats)
    leave = torch.arange(states, device=emissions.device) % 2 == 1  # tokens, which then take one place

    # Each state is reached from itself, from the state before it, or by skipping a blank
    for place in range(1, places):
        one_back = F.pad(alpha[:, :-1], (1, 0), value=IMPOSSIBLE)
        two_back = F.pad(alpha[:, :-2], (2, 0), value=IMPOSSIBLE).masked_fill(~skip, IMPOSSIBLE)[:, :states]
        stay = alpha if repeats else alpha.masked_fill(leave, IMPOSSIBLE)
        moved = torch.logsumexp(torch.stack([stay, one_back, two_back]), dim=0) + emissions[place]
        alpha = torch.where((place < lengths)[:, None], moved, alpha)  # rows that have ended do not change
    return alpha


COSINE_SCALE = 15.0  # logits of the embed loss are the cosine of centred vectors times this
FILLER_WEIGHT = 0.3  # of a place without a spoken token; a place with one has weight 1


def embed_loss(
    vectors: Tensor, classes: Tensor, candidates: Tensor, weight: Tensor, mean: Tensor, variance: float
) -> Tensor:
    """Weighted sum of the distances of ``vectors`` (N, D) from the embeddings of their ``classes`` (N,).

    candidates: (C, D) embeddings, among them the targets. weight: (N,) of each place. mean (D,), variance: of the LLM's
    whole table. A distance is the cross-entropy over the candidates (nats) plus the squared error divided by the
    variance.
    """
    vectors, candidates = at_least_float32(vectors) - mean, at_least_float32(candidates) - mean

    # Which token: cosines after the mean was subtracted (before, two random tokens have 0.46)
    cosines = F.normalize(vectors, dim=-1) @ F.normalize(candidates, dim=-1).T  # (N, C)
    wrong_token = F.cross_entropy(COSINE_SCALE * at_least_float32(cosines), classes, reduction="none")  # (N,)

    # Distance: the LLM gets the vector itself, so its length matters too
    distance = (vectors - candidates[classes]).square().mean(dim=-1) / variance  # (N,)
    return (weight * (wrong_token + distance)).sum()


def embed_ctc_loss(
    vectors: Tensor,
    lengths: Tensor,
    candidates: Tensor,
    targets: Tensor,
    target_lengths: Tensor,
    mean: Tensor,
    variance: float,
) -> Tensor:
    """`embed_loss` if it is not known where each token is spoken: the sum over all placements, as in CTC.

    vectors (B, S, D) of true lengths (B,). candidates (C, D): the embedding of the filler, then of other tokens, among
    them the targets (B, U; rows of `candidates`, right-padded). A placement gives each token one place, in order, and
    the filler the others; its cost is `embed_loss`. The loss is -log sum exp(-cost) over the placements.
    """
    vectors, candidates = at_least_float32(vectors) - mean, at_least_float32(candidates) - mean

    # The cost of each candidate at each place: which token it is, and its squared error
    cosines = F.normalize(vectors, dim=-1) @ F.normalize(candidates, dim=-1).T  # (B, S, C)
    right_token = (COSINE_SCALE * cosines).log_softmax(dim=-1)  # (B, S, C)
    squares = vectors.square().mean(dim=-1, keepdim=True) + candidates.square().mean(dim=-1)  # (B, S, C)
    distance = (squares - 2 * (vectors @ candidates.T) / vectors.shape[-1]) / variance  # (B, S, C)

    # A place of the filler weighs less, as in `embed_loss`
    weight = torch.ones_like(candidates[:, 0])  # (C,)
    weight[0] = FILLER_WEIGHT
    scores = weight * (right_token - distance)  # (B, S, C)
    return ctc_loss(scores, lengths, targets, target_lengths, blank=0, repeats=False)


def draw_others(own: Tensor, vocabulary: int, negatives: int, seed: int) -> Tensor:
    """(n,) tokens below `vocabulary` that are not among `own`: `negatives` of them, or all for 0."""
    others = torch.ones(vocabulary, dtype=torch.bool)
    others[own.cpu()] = False
    tokens = others.nonzero().flatten()
    if negatives:
        tokens = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))[:negatives]]
    return tokens.to(own.device)


def can_align(places: int, target: list[int]) -> bool:
    """Whether CTC can spell ``target``: it needs one place for each token, and one between two equal tokens."""
    return places >= max(1, len(target) + sum(a == b for a, b in pairwise(target)))


def shortlist(
    adapter: Any, hidden: Tensor, table: Tensor, targets: Sequence[Sequence[int]], negatives: int
) -> tuple[Tensor, list[list[int]]]:
    """Log-probabilities (B, S, C) over the batch's own tokens and a sample of the others; targets among those C.

    hidden (B, S, D), table (classes - 1, D), targets in read-out classes (blank is 0). Each drawn token represents
    others / negatives tokens, so that the normaliser is right on average.
    Example: targets [[3, 7], [40, 3]] become [[1, 2], [3, 1]]; class 0 stays blank, classes from 4 on are drawn.
    """
    # The batch's own tokens, and `negatives` others, which depend only on the batch
    own = sorted(set().union(*targets))
    tokens = torch.tensor([token - 1 for token in own], dtype=torch.long)
    drawn = draw_others(tokens, len(table), negatives, seed=sum(map(sum, targets)))

    # Drawn tokens get more weight: log(others / negatives) is added to their logits
    logits = adapter.logits(hidden, table, torch.cat([tokens, drawn]).to(hidden.device))  # (B, S, C)
    weight = torch.zeros(logits.shape[-1], dtype=logits.dtype, device=logits.device)
    weight[1 + len(own) :] = math.log(max(1, len(table) - len(own)) / negatives)
    number = {token: column for column, token in enumerate(own, start=1)}
    return (logits + weight).log_softmax(dim=-1), [[number[token] for token in row] for row in targets]


# --- computation in parts ---------------------------------------------------------------------------------
def chunked(hidden: Tensor, loss_of: Callable[[Tensor, slice], Tensor], rows: int) -> Tensor:
    """Sum of ``loss_of(hidden[part], part)`` over parts of ``rows`` positions of ``hidden`` (N, D).

    ``loss_of`` runs the frozen vocabulary head; its (rows, V) logits are freed after each part. Only ``hidden`` needs a
    gradient (N, D), which is computed in the forward pass, so no logits are kept or computed twice.
    """
    if not hidden.shape[0]:
        return hidden.sum()
    return _Chunked.apply(hidden, loss_of, rows)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss_of: Callable[[Tensor, slice], Tensor], rows: int) -> Tensor:
        totals, gradients = [], []
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            if not ctx.needs_input_grad[0]:
                totals.append(loss_of(hidden[part], part))
                continue
            with torch.enable_grad():
                leaf = hidden[part].detach().requires_grad_()  # (rows, D)
                loss = loss_of(leaf, part)
            gradients.append(torch.autograd.grad(loss, leaf)[0])
            totals.append(loss.detach())
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))  # (N, D)
        return torch.stack(totals).sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None
