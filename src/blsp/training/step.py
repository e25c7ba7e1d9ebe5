"""One micro-batch through the adapter and the frozen LLM, down to its loss; and the table of losses.

In:  examples that share a prompt prefix, the model, and what is minimised (`Objective`).
Out: `Sums`: the sum of each loss over the micro-batch, and how many positions were computed.
Try: ``step.run(model, examples, Objective({"ce": 1.0}), prefixes).terms["ce"]``
Flow: training/examples.py -> training/batches.py -> **step.py** (adapter -> LLM -> losses.py) -> training/loop.py

    prefix         | speech   suffix    response      computed once and shared | one row, right-padded
    [s y s t e m]  | [v v v v  s s s s  r1 r2 r3]     the states at the last s, r1, r2, r3 predict
                                    ^^^^^^^^^^^^       r1, r2, r3, end

Adapter places without a vector are left out, and the vocabulary head runs only at response positions; this changes no
result (law 8). A loss is an entry in `LOSSES` and a function in losses.py, or both in a plugin (docs/extending.md).

Shapes: B batch, T encoder frames, E encoder width, M mel bins, Tm mel frames, S adapter places, n valid vectors of a
clip, L sequence after the prefix, N response positions, D LLM width, V vocabulary, K stored top-k, C read-out classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from blsp.distributed import Runtime, send
from blsp.llm.language_model import embed, rows_per_chunk, valid_mask
from blsp.llm.prefix import PrefixCache, run_after_prefix
from blsp.model.adapter_parts import BLANK, AdapterOutput, num_audio_tokens
from blsp.model.lora import without_lora
from blsp.model.modeling_blsp import BlspForConditionalGeneration
from blsp.model.speech_encoder import encode_speech
from blsp.training import losses
from blsp.training.examples import Example, Need


@dataclass(frozen=True)
class Loss:
    """A loss: its sum over a micro-batch, the divisor of the sum, and the targets it needs.

    total: the differentiable sum over a micro-batch, a scalar. count: how many terms an example adds to that sum;
    the step's mean is the sum over all micro-batches and ranks, divided by the count over all of them.
    runs_llm: whether the LLM is run over a response; if not, a plain manifest is enough. needs: what an example must
    have: "continuation" (`response`), "teacher" (the text route, run here or stored), "readout" (CTC classes),
    "token_times" (`places`), "fits" (at most as many tokens as places). A row without one of them is skipped, with the
    reason.
    """

    total: Callable[[MicroBatch], Tensor]
    count: Callable[[Example], int]
    runs_llm: bool = True
    needs: frozenset[Need] = frozenset({"continuation"})


@dataclass(frozen=True)
class Objective:
    """What is minimised: the sum of weight x mean loss over `terms` (names in `LOSSES`).

    temperature, stored_teacher: for kl. negatives: for ctc without the LLM, embed and embed-ctc, how many tokens are
    drawn from those that are not in the micro-batch; 0: all of them. filler: for embed and embed-ctc, the token at
    places without speech.
    """

    terms: Mapping[str, float]
    temperature: float = 1.0
    stored_teacher: bool = False
    negatives: int = 0
    filler: int = 0

    @property
    def runs_llm(self) -> bool:
        return any(LOSSES[name].runs_llm for name in self.terms)


@dataclass(frozen=True)
class Sums:
    """Results of a micro-batch: the sum of each term (a scalar), and the positions of its passes through the LLM
    (encoder frames if the LLM is not run), with padding.
    """

    terms: dict[str, Tensor]
    positions: int = 0
    padding: int = 0


def counts_of(examples: Sequence[Example], objective: Objective) -> dict[str, int]:
    """The divisor of each term's sum."""
    return {name: sum(map(LOSSES[name].count, examples)) for name in objective.terms}


def run(
    model: BlspForConditionalGeneration, examples: Sequence[Example], objective: Objective, prefixes: PrefixCache
) -> Sums:
    """The sums of one micro-batch; all its examples have the same prompt prefix."""
    batch = MicroBatch(model, examples, objective, prefixes)
    terms = {name: LOSSES[name].total(batch) for name in objective.terms}
    return Sums(terms, *batch.positions)


def objective_value(sums: Sums, counts: Mapping[str, int], objective: Objective) -> Tensor:
    """The micro-batch's share of the step's loss. `counts` are the whole step's, so that the shares add up."""
    shares = [weight * sums.terms[name] / max(1, counts[name]) for name, weight in objective.terms.items()]
    return torch.stack(shares).sum()


def autocast(runtime: Runtime) -> torch.autocast:
    """Compute the adapter's float32 weights in bfloat16 if the frozen parts are in bfloat16."""
    return torch.autocast(runtime.device.type, torch.bfloat16, enabled=runtime.dtype == torch.bfloat16)


# --- the tensors of a micro-batch -------------------------------------------------------------------------
@dataclass
class MicroBatch:
    """The tensors of a micro-batch; each is computed when a loss first needs it, and shared by all losses."""

    model: BlspForConditionalGeneration
    examples: Sequence[Example]
    objective: Objective
    prefixes: PrefixCache

    @cached_property
    def encoded(self) -> tuple[Tensor, Tensor]:
        """Encoder states (B, T, E) and their lengths (B,)."""
        return speech_states(self.model, self.examples)

    @cached_property
    def audio(self) -> AdapterOutput:
        """The adapter's output, vectors (B, S, D)."""
        return self.model.model.listen(*self.encoded)

    @property
    def zero(self) -> Tensor:
        """A loss of 0 with a gradient, for a micro-batch without targets of a term."""
        return self.audio.vectors.sum() * 0

    @cached_property
    def answered(self) -> list[Example]:
        """The examples with a response, in order."""
        return [example for example in self.examples if example.response]

    @cached_property
    def response(self) -> tuple[Tensor, int, int]:
        """States (N, D) that predict the responses of `answered`; positions of the pass; padding among them."""
        heard = speech_vectors(self.model, self.audio, self.examples)
        vectors = [heard[row] for row, example in enumerate(self.examples) if example.response]
        hidden, padding = response_states(self.model, self.answered, vectors, self.prefixes)
        ends = [len(e.template.suffix_ids) + len(e.response) - 1 for e in self.answered]
        return hidden, sum(map(len, vectors)) + sum(ends) + padding, padding

    @property
    def positions(self) -> tuple[int, int]:
        """(positions, padding) of what was run."""
        if not self.objective.runs_llm:
            rows, width = self.encoded[0].shape[:2]
            return rows * width, rows * width - sum(example.encoder_frames for example in self.examples)
        return self.response[1:] if self.answered else (0, 0)

    def chunked(self, hidden: Tensor, loss_of: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """Sum of ``loss_of(logits, part)`` over parts of `hidden` (N, D): see losses.chunked."""
        rows = rows_per_chunk(self.model.config.text_config.vocab_size)
        return losses.chunked(hidden, lambda part, where: loss_of(self.model.compute_logits(part), where), rows)


def speech_states(model: BlspForConditionalGeneration, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Encoder states (B, T, E) and lengths (B,): from the cache, or encoded here from log-mel features."""
    device = next(model.model.multi_modal_projector.parameters()).device
    if examples[0].features is not None:
        frames = [example.encoder_frames for example in examples]
        states = np.zeros((len(examples), max(frames), examples[0].features.shape[1]), dtype=np.float32)  # (B, T, E)
        for row, example in enumerate(examples):
            states[row, : frames[row]] = example.features
        return send(torch.from_numpy(states), device), send(torch.tensor(frames), device)
    mels = [torch.from_numpy(example.mel).T for example in examples]  # (Tm, M) each
    lengths = send(torch.tensor([example.mel_frames for example in examples]), device)
    padded = send(nn.utils.rnn.pad_sequence(mels, batch_first=True), device).transpose(1, 2)  # (B, M, Tm)
    mask = valid_mask(lengths, padded.shape[2])  # (B, Tm)
    return encode_speech(model.model.audio_tower, padded, mask, full_window=model.config.full_window)


def speech_vectors(
    model: BlspForConditionalGeneration, audio: AdapterOutput, examples: Sequence[Example]
) -> list[Tensor]:
    """The speech route: the valid vectors (n, D) of each example's clip; the valid ones come first."""
    if audio.plain:  # known here: to ask the device would be to wait for it
        strides: Any = model.model.multi_modal_projector.strides
        counts = [num_audio_tokens(example.encoder_frames, strides) for example in examples]
    else:
        counts = audio.valid.sum(dim=1).tolist()
    return [vectors[:count] for vectors, count in zip(audio.vectors, counts, strict=True)]


def transcript_states(
    model: BlspForConditionalGeneration, examples: Sequence[Example], prefixes: PrefixCache
) -> Tensor:
    """The text route: last hidden states (N, D), as of `response_states`, with each transcript in the speech's place.

    It is the plain LLM's, also where LoRA is trained: what is spoken shall be answered as it was on reading.
    """
    with torch.no_grad(), without_lora(model):
        vectors = [embed(model, example.transcript) for example in examples]  # (n, D) each
        return response_states(model, examples, vectors, prefixes)[0]


def response_states(
    model: BlspForConditionalGeneration, examples: Sequence[Example], vectors: Sequence[Tensor], prefixes: PrefixCache
) -> tuple[Tensor, int]:
    """Last hidden states (N, D) at the positions that predict the responses, row by row; and the padding."""
    # One row an example: vectors, suffix, response without its last token (which predicts nothing)
    with torch.no_grad():
        ends = [embed(model, [*e.template.suffix_ids, *e.response[:-1]]) for e in examples]
    rows = [torch.cat([vector.to(end.dtype), end]) for vector, end in zip(vectors, ends, strict=True)]
    embeds = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B, L, D)
    prefix = prefixes.get(examples[0].template.prefix_ids)
    hidden = run_after_prefix(model, prefix, embeds).last_hidden_state  # (B, L, D)

    # The last len(response) positions of each row predict its response; `hidden` is read as (B * L, D)
    width, lengths = embeds.shape[1], [len(row) for row in rows]
    predicting = [
        torch.arange(row * width + length - len(example.response), row * width + length)
        for row, (length, example) in enumerate(zip(lengths, examples, strict=True))
    ]
    index = send(torch.cat(predicting), hidden.device)  # (N,)
    return hidden.flatten(0, 1)[index], len(rows) * width - sum(lengths)


# --- ce and kl --------------------------------------------------------------------------------------------
def _response_tokens(example: Example) -> int:
    return len(example.response)


def _ce(batch: MicroBatch) -> Tensor:
    """Sum of the cross-entropy of all response tokens."""
    if not batch.answered:
        return batch.zero
    return _cross_entropy(batch, batch.answered, batch.response[0])


def _cross_entropy(batch: MicroBatch, examples: Sequence[Example], hidden: Tensor) -> Tensor:
    """Sum over the responses of `examples`, predicted by `hidden` (N, D)."""
    targets = send(torch.tensor([token for e in examples for token in e.response]), hidden.device)  # (N,)
    return batch.chunked(hidden, lambda logits, part: losses.ce_loss(logits, targets[part]))


def _kl(batch: MicroBatch) -> Tensor:
    """Sum of T^2 x KL(text || speech) over all response tokens.

    The fixed answer to a clip without speech has no text route: its loss is the cross-entropy, at temperature 1.
    """
    if not batch.answered:
        return batch.zero
    hidden, total = batch.response[0], batch.zero
    set_answer = torch.tensor([example.no_speech for example in batch.answered for _ in example.response])  # (N,)
    silent = [example for example in batch.answered if example.no_speech]
    spoken = [example for example in batch.answered if not example.no_speech]
    if silent:
        where = send(set_answer.nonzero().flatten(), hidden.device)
        total = total + _cross_entropy(batch, silent, hidden[where])
    if spoken:
        # with T^2 the size of the gradient does not depend on the temperature (Hinton et al. 2015)
        scale = batch.objective.temperature**2
        where = send((~set_answer).nonzero().flatten(), hidden.device)
        total = total + scale * _divergence(batch, spoken, hidden[where])
    return total


def _divergence(batch: MicroBatch, examples: Sequence[Example], hidden: Tensor) -> Tensor:
    """Sum of KL(text || speech) over `hidden` (N, D); the teacher's top-k was stored, or the teacher is run here."""
    temperature = batch.objective.temperature
    if batch.objective.stored_teacher:
        top = [example.teacher for example in examples if example.teacher is not None]
        ids = send(torch.from_numpy(np.concatenate([ids for ids, _ in top]).astype(np.int64)), hidden.device)
        logp = send(torch.from_numpy(np.concatenate([logp for _, logp in top])), hidden.device)  # (N, K), as ids
        return batch.chunked(
            hidden, lambda logits, part: losses.topk_kl_loss(logits, ids[part], logp[part], temperature)
        )
    text = transcript_states(batch.model, examples, batch.prefixes)  # (N, D)
    return batch.chunked(
        hidden, lambda logits, part: losses.kl_loss(logits, batch.model.compute_logits(text[part]), temperature)
    )


# --- ctc --------------------------------------------------------------------------------------------------
def _readout_tokens(example: Example) -> int:
    """Tokens of the CTC target; a clip without speech counts as one."""
    return 0 if example.readout is None else max(1, len(example.readout))


def _ctc(batch: MicroBatch) -> Tensor:
    """Sum of -log p(transcript) over the examples that have a read-out target."""
    rows = [row for row, example in enumerate(batch.examples) if example.readout is not None]
    if not rows:
        return batch.zero
    targets: Sequence[Sequence[int]] = [batch.examples[row].readout or () for row in rows]
    if batch.objective.runs_llm:  # the adapter was run for its vectors
        log_probs, lengths = batch.audio.log_probs, batch.audio.num_audio_tokens
        assert log_probs is not None  # only adapters that read out have this term
        if len(rows) < len(batch.examples):
            log_probs, lengths = log_probs[rows], lengths[rows]
    else:
        log_probs, lengths, targets = _posteriors(batch, targets)
    return losses.ctc_loss(log_probs, lengths, *_padded(targets, log_probs.device), BLANK)


def _padded(targets: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Targets (B, U), right-padded, and their lengths (B,)."""
    rows = [torch.tensor(target, dtype=torch.long) for target in targets]
    sizes = torch.tensor([len(target) for target in targets], device=device)
    return nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device), sizes


def _posteriors(batch: MicroBatch, targets: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Sequence[Sequence[int]]]:
    """Log-probabilities (B, S, C), lengths (B,) and targets among the C classes, without vectors for the LLM."""
    adapter, table = batch.model.model.multi_modal_projector, batch.model.model.readout_table()
    if table is None:
        raise TypeError(f"{batch.model.config.adapter}: ctc needs an adapter that reads out")
    states, lengths = batch.encoded
    hidden, places = adapter.hidden_states(states.to(next(adapter.parameters()).dtype), lengths)  # (B, S, D), (B,)
    negatives = batch.objective.negatives
    if 0 < negatives < len(table) - len(set().union(*targets)):
        log_probs, targets = losses.shortlist(adapter, hidden, table, targets, negatives)
    else:
        log_probs = adapter.logits(hidden, table).log_softmax(dim=-1)
    return log_probs, places, targets


# --- embed ------------------------------------------------------------------------------------------------
def _spoken_tokens(example: Example) -> int:
    """Transcript tokens whose places are known; a clip without speech counts as one."""
    return 0 if example.places is None else max(1, len(example.places))


def _embed(batch: MicroBatch) -> Tensor:
    """Sum over all places of the examples whose token times are known."""
    filler, audio = batch.objective.filler, batch.audio
    # The token at each place: the transcript's token where it is spoken, the filler elsewhere
    tokens = torch.full(audio.valid.shape, filler, device=audio.vectors.device)  # (B, S)
    known = audio.valid.clone()  # (B, S)
    for row, example in enumerate(batch.examples):
        if example.places is None:
            known[row] = False
        else:
            places = torch.from_numpy(example.places).to(tokens.device)
            tokens[row, places] = torch.tensor(example.transcript, dtype=torch.long, device=tokens.device)
    targets, vectors = tokens[known], audio.vectors[known]  # (N,), (N, D)
    if not len(targets):
        return batch.zero

    own, classes = targets.unique(return_inverse=True)
    candidates = _candidates(batch, own)
    weight = torch.ones_like(vectors[:, 0]).masked_fill(targets == filler, losses.FILLER_WEIGHT)  # (N,)
    return losses.embed_loss(vectors, classes, candidates, weight, *batch.model.model.embedding_moments())


def _candidates(batch: MicroBatch, own: Tensor) -> Tensor:
    """Embeddings (C, D) of the micro-batch's own tokens, and of a sample of others, which depends only on the former.

    Unlike in `losses.shortlist`, they are only wrong choices beside the right token and represent no other tokens.
    """
    table = batch.model.model.embedding_table()  # (V, D)
    others = losses.draw_others(own, len(table), batch.objective.negatives, seed=int(own.sum()))
    return table[torch.cat([own, others])]


# --- embed-ctc --------------------------------------------------------------------------------------------
def _fitting_tokens(example: Example) -> int:
    """Transcript tokens, if they fit into the clip's places; a clip without speech counts as one."""
    return max(1, len(example.transcript)) if example.fits else 0


def _embed_ctc(batch: MicroBatch) -> Tensor:
    """Sum over the examples whose tokens fit into their places, each over all placements of its tokens."""
    rows = [row for row, example in enumerate(batch.examples) if example.fits]
    if not rows:
        return batch.zero
    vectors, lengths = batch.audio.vectors[rows], batch.audio.valid[rows].sum(dim=1)  # (B, S, D), (B,)

    # The filler is the first candidate, the micro-batch's tokens follow
    transcripts = [batch.examples[row].transcript for row in rows]
    own = [batch.objective.filler, *sorted(set().union(*transcripts) - {batch.objective.filler})]
    number = {token: column for column, token in enumerate(own)}
    targets = _padded([[number[token] for token in tokens] for tokens in transcripts], vectors.device)
    candidates = _candidates(batch, torch.tensor(own, device=vectors.device))  # (C, D)
    return losses.embed_ctc_loss(vectors, lengths, candidates, *targets, *batch.model.model.embedding_moments())


# --- the losses -------------------------------------------------------------------------------------------

LOSSES: dict[str, Loss] = {
    "ce": Loss(_ce, _response_tokens),
    "kl": Loss(_kl, _response_tokens, needs=frozenset({"continuation", "teacher"})),
    "ctc": Loss(_ctc, _readout_tokens, runs_llm=False, needs=frozenset({"readout"})),
    "embed-ctc": Loss(_embed_ctc, _fitting_tokens, runs_llm=False, needs=frozenset({"fits"})),
    "embed": Loss(_embed, _spoken_tokens, runs_llm=False, needs=frozenset({"token_times"})),
}
