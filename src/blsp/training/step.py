"""One micro-batch through the adapter and the frozen LLM, down to the sums that are minimised.

In:  examples that share a prompt prefix, the model, and what is learnt (`Objective`).
Out: `Sums`: the loss sums of that micro-batch and how many positions were padding.
Try: ``step.run(model, examples, objective, prefixes)``
Flow: training/examples.py -> training/batches.py -> **step.py** (adapter -> LLM -> losses.py) ->
      training/loop.py

What is not paid twice: the prefix's key/values are computed once a run and shared by every batch; rows are
``vectors | suffix | response without its last token``, right-padded, without invalid places; the vocabulary
head runs at response positions only, in chunks. Nothing of that changes a number (law 8).

Letters: B batch, T encoder frames, S adapter places, L sequence after the prefix, P prefix, N response
positions, D LLM width, K stored top-k, C read-out classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from blsp.distributed import Runtime
from blsp.llm.language_model import embed, rows_per_chunk, valid_mask
from blsp.llm.prefix import PrefixCache, run_after_prefix
from blsp.model.adapter_parts import BLANK, AdapterOutput
from blsp.model.modeling_blsp import BlspForConditionalGeneration
from blsp.model.speech_encoder import encode_speech
from blsp.training.examples import Example
from blsp.training.losses import ce_loss, chunked, ctc_loss, kl_loss, topk_kl_loss

Loss = Literal["ctc", "ce", "kl"]


@dataclass(frozen=True)
class Objective:
    """What is minimised: mean response loss (`ce` or `kl`) + `ctc_weight` x mean ctc; for `ctc` that term
    alone.
    """

    loss: Loss
    temperature: float = 1.0
    stored_teacher: bool = False
    ctc_weight: float = 0.0
    negatives: int = 0  # for `ctc`: see shortlist.py


@dataclass(frozen=True)
class Counts:
    """What the sums are divided by: of the whole step, over all micro-batches and ranks."""

    responses: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Sums:
    """Loss sums (scalars, differentiable) of a micro-batch; positions that went through the LLM (frames for
    ctc).
    """

    response: Tensor
    ctc: Tensor
    positions: int = 0
    padding: int = 0


def autocast(runtime: Runtime) -> torch.autocast:
    """The adapter's float32 weights compute in bfloat16 where the frozen parts do."""
    return torch.autocast(runtime.device.type, torch.bfloat16, enabled=runtime.dtype == torch.bfloat16)


def counts_of(examples: Sequence[Example], objective: Objective) -> Counts:
    """What `run` would sum over these examples, known before anything is computed."""
    responses = 0 if objective.loss == "ctc" else sum(len(example.response) for example in examples)
    tokens = (
        sum(max(1, len(e.readout)) for e in examples if e.readout is not None) if objective.ctc_weight else 0
    )
    return Counts(responses, tokens)


def objective_value(sums: Sums, counts: Counts, objective: Objective) -> Tensor:
    """The share of the step's loss that a micro-batch contributes; the step's `counts` make shares add up."""
    # T^2 keeps the size of the gradient when the temperature changes (Hinton et al. 2015)
    scale = objective.temperature**2 if objective.loss == "kl" else 1.0
    response = scale * sums.response / max(1, counts.responses)
    return response + objective.ctc_weight * sums.ctc / max(1, counts.tokens)


def run(
    model: BlspForConditionalGeneration,
    examples: Sequence[Example],
    objective: Objective,
    prefixes: PrefixCache,
) -> Sums:
    """Sums of one micro-batch; all its examples have the same prefix."""
    states, lengths = speech_states(model, examples)
    if objective.loss == "ctc":
        ctc = _grounding_term(model, states, lengths, examples, objective.negatives)
        frames = states.shape[0] * states.shape[1]
        return Sums(ctc.new_zeros(()), ctc, frames, frames - int(lengths.sum()))
    heard = model.model.listen(states, lengths)
    zero = heard.vectors.sum() * 0
    ctc = (
        _ctc_term(heard.log_probs, heard.num_audio_tokens, examples) if heard.log_probs is not None else zero
    )
    spoken = [row for row, example in enumerate(examples) if example.response]
    if not spoken:
        return Sums(zero, ctc)
    answering = [examples[row] for row in spoken]
    vectors = speech_vectors(heard, spoken)
    hidden, padding = response_states(model, answering, vectors, prefixes)
    positions = sum(
        len(v) + len(e.template.suffix_ids) + len(e.response) - 1
        for v, e in zip(vectors, answering, strict=True)
    )
    response = _response_loss(model, answering, hidden, objective, prefixes)
    return Sums(response, ctc, positions + padding, padding)


def speech_states(model: BlspForConditionalGeneration, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Encoder states (B, T, E) and lengths (B,): from the cache, or encoded here from log-mel features."""
    device = next(model.model.multi_modal_projector.parameters()).device
    if examples[0].features is not None:
        lengths = torch.tensor([len(example.features) for example in examples])  # type: ignore[arg-type]
        width = int(lengths.max())
        states = np.zeros((len(examples), width, examples[0].features.shape[1]), dtype=np.float32)
        for row, example in enumerate(examples):
            states[row, : lengths[row]] = example.features
        return torch.from_numpy(states).to(device), lengths.to(device)
    mels = [torch.from_numpy(example.mel) for example in examples]  # (M, Tm) each
    lengths = torch.tensor([example.mel_frames for example in examples], device=device)
    padded = nn.utils.rnn.pad_sequence([mel.T for mel in mels], batch_first=True).transpose(1, 2).to(device)
    mask = valid_mask(lengths, padded.shape[2])
    with torch.no_grad():
        return encode_speech(model.model.audio_tower, padded, mask, full_window=model.config.full_window)


def speech_vectors(heard: AdapterOutput, rows: Sequence[int]) -> list[Tensor]:
    """The valid vectors (n, D) of each of `rows`, invalid places taken out."""
    counts = heard.valid.sum(dim=1).tolist()
    return [heard.vectors[row, : counts[row]] for row in rows]


def transcript_vectors(model: BlspForConditionalGeneration, examples: Sequence[Example]) -> list[Tensor]:
    """The text route: the transcript's own token embeddings (n, D) in the speech's place."""
    with torch.no_grad():
        return [embed(model, example.transcript) for example in examples]


def response_states(
    model: BlspForConditionalGeneration,
    examples: Sequence[Example],
    vectors: Sequence[Tensor],
    prefixes: PrefixCache,
) -> tuple[Tensor, int]:
    """Last hidden states where responses are predicted, flat (N, D), and the padded positions."""
    with torch.no_grad():
        tails = [embed(model, [*e.template.suffix_ids, *e.response[:-1]]) for e in examples]
    rows = [torch.cat([v.to(tail.dtype), tail]) for v, tail in zip(vectors, tails, strict=True)]
    embeds = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B, L, D)
    lengths = [len(row) for row in rows]
    prefix = prefixes.get(examples[0].template.prefix_ids)
    hidden = run_after_prefix(model, prefix, embeds).last_hidden_state  # (B, L, D)
    width = embeds.shape[1]
    places = [
        torch.arange(row * width + length - len(example.response), row * width + length)
        for row, (length, example) in enumerate(zip(lengths, examples, strict=True))
    ]
    index = torch.cat(places).to(hidden.device)
    return hidden.flatten(0, 1)[index], len(rows) * width - sum(lengths)


def _response_loss(
    model: BlspForConditionalGeneration,
    examples: Sequence[Example],
    hidden: Tensor,
    objective: Objective,
    prefixes: PrefixCache,
) -> Tensor:
    """Sum over response positions; `hidden` (N, D). Set answers (no speech) have no teacher and take ce."""
    taught = [
        objective.loss == "kl" and not example.no_speech for example in examples for _ in example.response
    ]
    split = torch.tensor(taught, device=hidden.device)
    targets = torch.tensor([token for e in examples for token in e.response], device=hidden.device)
    rows = rows_per_chunk(model.config.text_config.vocab_size)
    total = hidden.sum() * 0
    if not all(taught):
        fixed = targets[~split]
        total = total + chunked(
            hidden[~split], lambda h, part: ce_loss(model.compute_logits(h), fixed[part])[0], rows
        )
    if any(taught):
        answering = [example for example in examples if not example.no_speech]
        total = total + _divergence(model, answering, hidden[split], objective, prefixes, rows)
    return total


def _divergence(
    model: BlspForConditionalGeneration,
    examples: Sequence[Example],
    hidden: Tensor,
    objective: Objective,
    prefixes: PrefixCache,
    rows: int,
) -> Tensor:
    """Sum of KL(text || speech) over `hidden` (N, D): from the stored top-k, or with the teacher run here."""
    if objective.stored_teacher:
        top = [example.teacher for example in examples if example.teacher is not None]
        ids = torch.from_numpy(np.concatenate([ids for ids, _ in top]).astype(np.int64)).to(hidden.device)
        logp = torch.from_numpy(np.concatenate([logp for _, logp in top])).to(hidden.device)
        return chunked(
            hidden,
            lambda h, part: topk_kl_loss(
                model.compute_logits(h), ids[part], logp[part], objective.temperature
            )[0],
            rows,
        )
    with torch.no_grad():
        read, _ = response_states(model, examples, transcript_vectors(model, examples), prefixes)
    return chunked(
        hidden,
        lambda h, part: kl_loss(
            model.compute_logits(h), model.compute_logits(read[part]), objective.temperature
        )[0],
        rows,
    )


def _grounding_term(
    model: BlspForConditionalGeneration,
    states: Tensor,
    lengths: Tensor,
    examples: Sequence[Example],
    negatives: int,
) -> Tensor:
    """Sum of -log p(transcript), without vectors for the LLM."""
    adapter = model.model.multi_modal_projector
    table = model.model.readout_table()
    if table is None:
        raise TypeError(f"{model.config.adapter}: ctc needs an adapter that reads out")
    hidden, places = adapter.hidden_states(states.to(next(adapter.parameters()).dtype), lengths)
    targets: Sequence[Sequence[int]] = [example.readout or () for example in examples]
    if 0 < negatives < len(table) - len(set().union(*targets)):
        log_probs, targets = shortlist(adapter, hidden, table, targets, negatives)
    else:
        log_probs = adapter.logits(hidden, table).log_softmax(dim=-1)
    return _alignment_term(log_probs, places, targets)


def _ctc_term(log_probs: Tensor, places: Tensor, examples: Sequence[Example]) -> Tensor:
    """Sum of -log p(transcript) over the rows that have a read-out target (no speech: the empty one)."""
    rows = [row for row, example in enumerate(examples) if example.readout is not None]
    if not rows:
        return log_probs.sum() * 0
    if len(rows) < len(examples):
        log_probs, places = log_probs[rows], places[rows]
    return _alignment_term(log_probs, places, [examples[row].readout or () for row in rows])


def _alignment_term(log_probs: Tensor, places: Tensor, targets: Sequence[Sequence[int]]) -> Tensor:
    """Sum of -log p(targets) of log_probs (B, S, C) that are valid for `places` (B,)."""
    each = [torch.tensor(target, dtype=torch.long) for target in targets]
    padded = nn.utils.rnn.pad_sequence(each, batch_first=True).to(log_probs.device)
    sizes = torch.tensor([len(target) for target in targets], device=log_probs.device)
    return ctc_loss(log_probs, places, padded, sizes, BLANK)[0]


def shortlist(
    adapter: Any,
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


def slots(batches: list[list[Example]], runtime: Runtime) -> Iterator[list[Example]]:
    """`batches`, then empty ones, as many as the rank with the most has."""
    most = torch.tensor(len(batches), device=runtime.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    yield from batches
    yield from ([] for _ in range(int(most) - len(batches)))


def idle(prefixes: PrefixCache) -> None:
    """Forward and backward over one position that nobody learns from."""
    weight = prefixes.llm.get_input_embeddings().weight
    nothing = torch.zeros(1, 1, weight.shape[1], dtype=weight.dtype, device=weight.device, requires_grad=True)
    run_after_prefix(prefixes.llm, None, nothing).last_hidden_state.sum().backward()
