"""What else a clip may have said: the likeliest token sequences of a read-out, and what the LLM thinks of them.

In:  CTC log-probabilities of one clip (S, K); sequences of the LLM's tokens.
Out: hypotheses, best first; the log-likelihood of each under the LLM.
Try: `n_best(log_probs, beam=8)`
Flow: model/grounded.py (posteriors) → **hypotheses.py** → inference/listener.py (`transcribe`).

The read-out's best path takes each frame for itself. Prefix beam search (Graves et al. 2006, §3.2; Hannun et
al. 2014, algorithm 1, without a language model) adds up all paths of a sequence and keeps the best few; which
of them somebody would have said, the LLM knows.

Letters: S frames of the stack, K classes (blank first), N hypotheses, I inner nodes of their tree, P prefix length.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blsp.llm.language_model import embed, log_probabilities, stop_ids
from blsp.llm.prefix import Prefix, run_after_prefix
from blsp.model.adapter_parts import BLANK, AdapterOutput, Hypothesis

# both chosen on fotaq's development part
LANGUAGE = 0.4  # weight of the LLM's log-likelihood beside the read-out's
LENGTH = 1.5  # nats a token, against what every further token costs under both
CLASSES = 8  # likeliest classes of a frame that are followed
SURE = math.log(0.999)  # a frame as blank as this changes no hypothesis


def n_best(log_probs: Tensor, beam: int) -> list[Hypothesis]:
    """The `beam` likeliest sequences of (S, K), best first; tokens are rows of the read-out table."""
    values, classes = log_probs.float().topk(min(CLASSES, log_probs.shape[1]), dim=-1)
    blanks = log_probs[:, BLANK].tolist()
    found: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, -math.inf)}  # ending in blank, in a token
    for blank, frame in zip(blanks, zip(values.tolist(), classes.tolist(), strict=True), strict=True):
        if blank > SURE:
            found = {prefix: (_log_add(*ends) + blank, -math.inf) for prefix, ends in found.items()}
            continue
        found = _extended(found, blank, [(c, v) for v, c in zip(*frame, strict=True) if c != BLANK], beam)
    best = sorted(found.items(), key=lambda item: -_log_add(*item[1]))[:beam]
    return [Hypothesis(tuple(each - 1 for each in prefix), _log_add(*ends)) for prefix, ends in best]


def _extended(
    found: dict[tuple[int, ...], tuple[float, float]],
    blank: float,
    tokens: list[tuple[int, float]],
    beam: int,
) -> dict[tuple[int, ...], tuple[float, float]]:
    """One frame further; the `beam` best prefixes."""
    after: dict[tuple[int, ...], list[float]] = defaultdict(lambda: [-math.inf, -math.inf])
    for prefix, (in_blank, in_token) in found.items():
        either = _log_add(in_blank, in_token)
        after[prefix][0] = _log_add(after[prefix][0], either + blank)
        for token, value in tokens:
            repeated = bool(prefix) and prefix[-1] == token
            if repeated:  # the same token goes on; a second one needs a blank between
                after[prefix][1] = _log_add(after[prefix][1], in_token + value)
            longer = (*prefix, token)
            before = in_blank if repeated else either
            if before > -math.inf:
                after[longer][1] = _log_add(after[longer][1], before + value)
    best = sorted(after.items(), key=lambda item: -_log_add(*item[1]))[:beam]
    return {prefix: (ends[0], ends[1]) for prefix, ends in best}


def _log_add(a: float, b: float) -> float:
    high, low = (a, b) if a > b else (b, a)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


def hypotheses_of(
    output: AdapterOutput, row: int, beam: int, vocabulary: Sequence[int] | None
) -> tuple[Hypothesis, ...]:
    """The `beam` likeliest transcripts of one clip of a batch; none where nothing is read out.

    vocabulary: the LLM's token ids of the read-out table's rows; None where they are the rows' numbers.
    """
    if not beam or output.log_probs is None:
        return ()
    hypotheses = n_best(output.log_probs[row, : int(output.num_audio_tokens[row])], beam)
    if vocabulary is None:
        return tuple(hypotheses)
    return tuple(replace(h, tokens=tuple(vocabulary[i] for i in h.tokens)) for h in hypotheses)


def weighed(llm: PreTrainedModel, prefix: Prefix | None, hypotheses: Sequence[Hypothesis]) -> tuple[int, ...]:
    """The tokens of the hypothesis that read-out and LLM together find likeliest."""
    read = log_likelihoods(llm, prefix, [each.tokens for each in hypotheses])
    scores = [
        each.log_prob + LANGUAGE * likelihood + LENGTH * len(each.tokens)
        for each, likelihood in zip(hypotheses, read, strict=True)
    ]
    return hypotheses[scores.index(max(scores))].tokens


@torch.no_grad()
def log_likelihoods(
    llm: PreTrainedModel, prefix: Prefix | None, sequences: Sequence[Sequence[int]]
) -> list[float]:
    """log p(sequence | prefix) in nats of each of N sequences of the LLM's tokens; an empty one has 0.

    Hypotheses differ in a word or two, so the LLM reads their tree: a beginning that several share, once; an end
    that nothing follows, not at all.
    """
    tokens, parents, ends = _tree(sequences)
    device = llm.get_input_embeddings().weight.device
    depths, seen = [0], torch.eye(len(tokens) + 1, dtype=torch.bool)  # the nodes that a node comes after
    for node, parent in enumerate(parents, start=1):
        depths.append(depths[parent] + 1)
        seen[node] |= seen[parent]
    inner = sorted({0, *parents})
    place = {node: index for index, node in enumerate(inner)}
    # the prefix's last token predicts the first ones: it is the tree's root (an end of text, without a prefix)
    before = prefix.cut(len(prefix) - 1) if prefix else None
    ids = [prefix.ids[-1] if prefix else stop_ids(llm)[0], *tokens]
    embeds = embed(llm, [ids[node] for node in inner])[None]  # (1, I, D)
    width = len(before) if before else 0
    mask = nn.functional.pad(seen[inner][:, inner], (width, 0), value=True).to(device)  # (I, P - 1 + I)
    additive = torch.zeros_like(mask, dtype=embeds.dtype).masked_fill(~mask, torch.finfo(embeds.dtype).min)
    offsets = torch.tensor([[depths[node] for node in inner]], device=device)  # (1, I)
    hidden = run_after_prefix(llm, before, embeds, mask=additive[None, None], offsets=offsets)
    scores = log_probabilities(llm, hidden.last_hidden_state[0])  # (I, V)
    totals = [0.0]
    edges = scores[[place[parent] for parent in parents], tokens].tolist()
    for parent, score in zip(parents, edges, strict=True):
        totals.append(totals[parent] + score)
    return [totals[end] for end in ends]


def _tree(sequences: Sequence[Sequence[int]]) -> tuple[list[int], list[int], list[int]]:
    """Tokens and parents of the M - 1 nodes after the root (node 0), parents first; the node of each sequence's end."""
    tokens: list[int] = []
    parents: list[int] = []
    known: dict[tuple[int, int], int] = {}  # (parent, token) -> node
    ends = []
    for sequence in sequences:
        node = 0
        for token in sequence:
            if (node, token) not in known:
                tokens.append(token)
                parents.append(node)
                known[node, token] = len(tokens)
            node = known[node, token]
        ends.append(node)
    return tokens, parents, ends
