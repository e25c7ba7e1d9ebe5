"""Possible transcripts of a clip: the likeliest token sequences of a read-out, scored by the LLM.

In:  CTC log-probabilities of one clip (S, K); sequences of the LLM's tokens.
Out: hypotheses, best first; the log-likelihood of each under the LLM.
Try: `n_best(log_probs, beam=8)`
Flow: grounded.py (log-probabilities) → **hypotheses.py** → inference/listener.py (`transcribe`).

Several CTC paths can give the same sequence. Prefix beam search (Graves et al. 2006, §3.2; Hannun et al. 2014,
algorithm 1, without a language model) adds up their probabilities and keeps the best few sequences. The LLM chooses
one of them.

Shapes: S frames of the stack, K classes (blank first), N hypotheses, I inner nodes of their tree, P prefix length,
V vocabulary.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blsp.llm.language_model import embed, log_probabilities, rows_per_chunk, stop_ids
from blsp.llm.prefix import Prefix, run_after_prefix
from blsp.model.adapter_parts import BLANK, AdapterOutput, Hypothesis

# chosen on development clips, with two LLMs (docs/log.md)
LANGUAGE = 0.8  # weight of the LLM's log-likelihood beside that of the read-out
LENGTH = 2.5  # nats added for each token, since every token lowers both log-likelihoods
BEAM = 24  # hypotheses that the LLM chooses from
CLASSES = 16  # the likeliest classes of a frame; the others are left out of the search
NODES = 256  # of the trees of several clips, which the LLM scores in one pass
SURE = math.log(0.999)  # a frame with more blank than this changes no hypothesis

# token prefix -> log-probability of its paths that end in blank, and of those that end in its last token
Beams = dict[tuple[int, ...], tuple[float, float]]


def n_best(log_probs: Tensor, beam: int) -> list[Hypothesis]:
    """The `beam` likeliest sequences of log_probs (S, K), best first; tokens are rows of the read-out table."""
    values, classes = log_probs.float().topk(min(CLASSES, log_probs.shape[1]), dim=-1)  # (S, CLASSES)
    blanks = log_probs[:, BLANK].tolist()
    beams: Beams = {(): (0.0, -math.inf)}
    for blank, frame in zip(blanks, zip(values.tolist(), classes.tolist(), strict=True), strict=True):
        if blank > SURE:
            beams = {prefix: (_log_add(*ends) + blank, -math.inf) for prefix, ends in beams.items()}
            continue
        tokens = [(label, value) for value, label in zip(*frame, strict=True) if label != BLANK]
        beams = _extended(beams, blank, tokens, beam)
    best = sorted(beams.items(), key=lambda item: -_log_add(*item[1]))[:beam]
    # class 1 + i is row i of the table
    return [Hypothesis(tuple(label - 1 for label in prefix), _log_add(*ends)) for prefix, ends in best]


def _extended(beams: Beams, blank: float, tokens: Sequence[tuple[int, float]], beam: int) -> Beams:
    """The `beam` best prefixes after one more frame, given the log-probabilities of blank and of its tokens.

    A prefix with the last token t can continue in these ways:

        blank          the same prefix, ending in blank
        t              the same prefix, ending in t: the run of t continues
        t after blank  prefix + t: equal tokens are two only if a blank is between them
        another token  prefix + that token, whatever the prefix ends in
    """
    after: dict[tuple[int, ...], list[float]] = defaultdict(lambda: [-math.inf, -math.inf])
    for prefix, (in_blank, in_token) in beams.items():
        either = _log_add(in_blank, in_token)
        after[prefix][0] = _log_add(after[prefix][0], either + blank)
        for token, value in tokens:
            repeated = bool(prefix) and prefix[-1] == token
            if repeated:
                after[prefix][1] = _log_add(after[prefix][1], in_token + value)
            longer = (*prefix, token)
            before = in_blank if repeated else either
            if before > -math.inf:
                after[longer][1] = _log_add(after[longer][1], before + value)
    best = sorted(after.items(), key=lambda item: -_log_add(*item[1]))[:beam]
    return {prefix: (ends[0], ends[1]) for prefix, ends in best}


def _log_add(a: float, b: float) -> float:
    """log(exp(a) + exp(b)), without overflow."""
    high, low = (a, b) if a > b else (b, a)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


def hypotheses_of(
    output: AdapterOutput, row: int, beam: int, vocabulary: Sequence[Sequence[int]] | None
) -> tuple[Hypothesis, ...]:
    """The `beam` likeliest transcripts of one clip of a batch; none if the adapter does not read out.

    vocabulary: the LLM's tokens of each row of the read-out table; None if they are equal to the row numbers.
    """
    if not beam or output.log_probs is None:
        return ()
    hypotheses = n_best(output.log_probs[row, : int(output.num_audio_tokens[row])], beam)
    if vocabulary is None:
        return tuple(hypotheses)
    return tuple(replace(h, tokens=tuple(token for i in h.tokens for token in vocabulary[i])) for h in hypotheses)


def choose(llm: PreTrainedModel, prefix: Prefix | None, clips: Sequence[Sequence[Hypothesis]]) -> list[tuple[int, ...]]:
    """For each clip the tokens of the hypothesis with the best weighted sum of read-out and LLM log-likelihoods."""
    chosen = []
    for part in _passes(clips):
        scored = log_likelihoods(llm, prefix, [hypothesis.tokens for hypotheses in part for hypothesis in hypotheses])
        likelihoods = iter(scored)
        for hypotheses in part:
            scores = [each.log_prob + LANGUAGE * next(likelihoods) + LENGTH * len(each.tokens) for each in hypotheses]
            chosen.append(hypotheses[scores.index(max(scores))].tokens)
    return chosen


def _passes(clips: Sequence[Sequence[Hypothesis]]) -> Iterator[list[Sequence[Hypothesis]]]:
    """Clips whose hypotheses the LLM scores in one pass, of at most `NODES` nodes if there are several."""
    part: list[Sequence[Hypothesis]] = []
    nodes = 0
    for hypotheses in clips:
        own = len(_tree([each.tokens for each in hypotheses])[0])
        if part and nodes + own > NODES:
            yield part
            part, nodes = [], 0
        part.append(hypotheses)
        nodes += own
    if part:
        yield part


@torch.no_grad()
def log_likelihoods(llm: PreTrainedModel, prefix: Prefix | None, sequences: Sequence[Sequence[int]]) -> list[float]:
    """log p(sequence | prefix) in nats of each of N sequences of the LLM's tokens; an empty one has 0.

    Hypotheses of a clip differ in a word or two, so the LLM runs once over the tree of their tokens, which may hold
    several clips. Common beginnings are run once; a sequence's last token predicts nothing and is not run.

        sequences  the cat sat, the cat is       tree  (root) → the → cat → sat
        inner nodes, which are run: root, the, cat                        ↘ is
    """
    tokens, parents, ends = _tree(sequences)
    device = llm.get_input_embeddings().weight.device
    # a node attends to itself and to the nodes on its way to the root; its position is its depth
    depths, seen = [0], torch.eye(len(tokens) + 1, dtype=torch.bool)
    for node, parent in enumerate(parents, start=1):
        depths.append(depths[parent] + 1)
        seen[node] |= seen[parent]
    inner = sorted({0, *parents})
    row_of = {node: row for row, node in enumerate(inner)}
    # the prefix's last token predicts the first tokens, so it is the tree's root (without a prefix: a stop token)
    before = prefix.cut(len(prefix) - 1) if prefix else None
    ids = [prefix.ids[-1] if prefix else stop_ids(llm)[0], *tokens]
    embeds = embed(llm, [ids[node] for node in inner])[None]  # (1, I, D)
    width = len(before) if before else 0
    mask = nn.functional.pad(seen[inner][:, inner], (width, 0), value=True).to(device)  # (I, P - 1 + I)
    additive = torch.zeros_like(mask, dtype=embeds.dtype).masked_fill(~mask, torch.finfo(embeds.dtype).min)
    offsets = torch.tensor([[depths[node] for node in inner]], device=device)  # (1, I)
    hidden = run_after_prefix(llm, before, embeds, mask=additive[None, None], offsets=offsets)
    scores = _edge_scores(llm, hidden.last_hidden_state[0], [row_of[parent] for parent in parents], tokens)
    # a node's log-likelihood is its parent's, plus the log-probability of its token after the parent
    totals = [0.0]
    for parent, score in zip(parents, scores, strict=True):
        totals.append(totals[parent] + score)
    return [totals[end] for end in ends]


def _edge_scores(llm: PreTrainedModel, hidden: Tensor, rows: Sequence[int], tokens: Sequence[int]) -> list[float]:
    """log p(token | its parent) of each edge of the tree; rows: where its parent lies in hidden (I, D).

    The head runs over a part of the inner nodes at a time: the logits of a long clip's tree would be gigabytes.
    """
    edges: dict[int, list[int]] = defaultdict(list)  # part -> its edges
    size = rows_per_chunk(llm.get_output_embeddings().weight.shape[0])
    for edge, row in enumerate(rows):
        edges[row // size].append(edge)
    scores = [0.0] * len(rows)
    for part, chosen in edges.items():
        log_probs = log_probabilities(llm, hidden[part * size : (part + 1) * size])  # (at most `size`, V)
        found = log_probs[[rows[edge] % size for edge in chosen], [tokens[edge] for edge in chosen]].tolist()
        for edge, score in zip(chosen, found, strict=True):
            scores[edge] = score
    return scores


def _tree(sequences: Sequence[Sequence[int]]) -> tuple[list[int], list[int], list[int]]:
    """Token and parent of each node after the root (node 0), parents first; the last node of each sequence."""
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
