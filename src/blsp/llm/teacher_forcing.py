"""Scores and hidden states of given answers: the LLM reads a finished answer and predicts each of its tokens.

In:  questions as the decode loop takes them (`Request`), and an answer, or several options, to each.
Out: at the N positions that predict an answer's tokens: hidden states (N, D), the likeliest tokens, the divergence
     between two routes; and the mean log-likelihood of each option.
Try: `answer_states(model, [request], [answer])[0].shape`
Flow: prefix.py, decoding.py → **teacher_forcing.py** → step 1's stored teacher, the evaluation's alignment and scores.

    fed to the LLM:      q1  q2  q3  a1  a2          (question of 3, answer of 2 that stopped)
    states returned:             ↓   ↓   ↓
    what they predict:           a1  a2  end         N = 3; an answer that was cut off has no end: N = 2, a2 is not fed

Shapes: R rows, L sequence, P prefix length, N answer positions, M options, O an option's tokens, A layers + 1, K top-k,
H key/value heads, C columns, d head width, D LLM width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPast

from blsp.llm.decoding import Request
from blsp.llm.language_model import decoder_of, embed, kl_divergence, log_probabilities, rows_per_chunk
from blsp.llm.prefix import run_after_prefix
from blsp.llm.prompt import text_ids


class GivenAnswer(Protocol):
    """A finished answer: its tokens without the end, and how it ended (`stop`: the end is predicted too)."""

    @property
    def ids(self) -> Sequence[int]: ...

    @property
    def finish(self) -> str: ...


def answer_tokens(answer: GivenAnswer) -> int:
    """How many tokens of an answer are predicted; the end counts too, unless the answer was cut off."""
    return len(answer.ids) + (answer.finish == "stop")


@torch.no_grad()
def answer_states(llm: PreTrainedModel, requests: Sequence[Request], answers: Sequence[GivenAnswer]) -> list[Tensor]:
    """Last hidden states (N, D) of each row at the positions that predict its answer. All rows share one prefix."""
    hidden = _read(llm, requests, answers).last_hidden_state  # (R, L, D)
    return [states[span] for states, span in zip(hidden, _answer_spans(requests, answers), strict=True)]


@torch.no_grad()
def layer_states(
    llm: PreTrainedModel, requests: Sequence[Request], answers: Sequence[GivenAnswer]
) -> list[tuple[Tensor, Tensor]]:
    """For each row, the states of all layers at the question's positions (A, L, D) and the answer's (A, N, D)."""
    output = _read(llm, requests, answers, every_layer=True)
    layers = torch.stack(output.hidden_states, dim=1)  # (R, A, L, D)
    spans = _answer_spans(requests, answers)
    return [(states[:, : span.start + 1], states[:, span]) for states, span in zip(layers, spans, strict=True)]


@torch.no_grad()
def top_k_states(llm: PreTrainedModel, hidden: Tensor, top_k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The likeliest tokens (N, K) and their log-probabilities (N, K) at hidden states (N, D)."""
    rows = rows_per_chunk(llm.get_output_embeddings().weight.shape[0])
    tops = [log_probabilities(llm, chunk, temperature).topk(top_k) for chunk in hidden.split(rows)]
    return torch.cat([top.indices for top in tops]), torch.cat([top.values for top in tops])


@torch.no_grad()
def divergence(llm: PreTrainedModel, text: Tensor, speech: Tensor) -> tuple[list[float], list[bool]]:
    """For each position: KL(text || speech) in nats over the whole vocabulary, and whether the best tokens agree.

    text, speech: hidden states (N, D) before the head.
    """
    divergences: list[float] = []
    agreements: list[bool] = []
    rows = rows_per_chunk(llm.get_output_embeddings().weight.shape[0])
    for text_chunk, speech_chunk in zip(text.split(rows), speech.split(rows), strict=True):
        teacher, student = log_probabilities(llm, text_chunk), log_probabilities(llm, speech_chunk)  # (N, V)
        divergences += kl_divergence(teacher, student).tolist()
        agreements += (teacher.argmax(dim=-1) == student.argmax(dim=-1)).tolist()
    return divergences, agreements


def _read(
    llm: PreTrainedModel,
    requests: Sequence[Request],
    answers: Sequence[GivenAnswer] | None,
    *,
    every_layer: bool = False,
) -> BaseModelOutputWithPast:
    """One right-padded pass over questions with their answers; without answers, the cache is returned too."""
    prefix = requests[0].prefix
    assert all(request.prefix is prefix for request in requests), "the rows of one pass must share their prefix"
    rows = [request.embeds for request in requests]  # (L, D) each
    if answers is not None:
        # the last token predicts nothing, unless the end follows it
        fed = [answer.ids if answer.finish == "stop" else answer.ids[:-1] for answer in answers]
        rows = [torch.cat([row, embed(llm, list(ids))]) for row, ids in zip(rows, fed, strict=True)]
    embeds = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (R, L, D)
    return run_after_prefix(llm, prefix, embeds, keep_cache=answers is None, every_layer=every_layer)


def _answer_spans(requests: Sequence[Request], answers: Sequence[GivenAnswer]) -> list[slice]:
    """The positions that predict each row's answer: from the question's last position on."""
    firsts = [len(request.embeds) - 1 for request in requests]
    return [slice(first, first + answer_tokens(answer)) for first, answer in zip(firsts, answers, strict=True)]


@torch.no_grad()
def option_scores(
    llm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    options: Sequence[Sequence[str]],
    rows: int,
) -> list[list[float]]:
    """For each request, the mean log-likelihood per token of each of its options.

    rows: how many options are run at once; the options of one question are never separated.
    """
    scores: list[list[float]] = [[] for _ in requests]
    tokens = [[text_ids(tokenizer, option) for option in of_question] for of_question in options]
    for group in _groups(requests, tokens, rows):
        group_scores = _score_group(llm, [requests[i] for i in group], [tokens[i] for i in group])
        for i, question_scores in zip(group, group_scores, strict=True):
            scores[i] = question_scores
    return scores


def _groups(requests: Sequence[Request], tokens: Sequence[Sequence[list[int]]], rows: int) -> Iterator[list[int]]:
    """Indices of questions with one prefix, in order; at most `rows` options in a group if it has several questions."""
    by_prefix: dict[int, list[int]] = {}
    for i, request in enumerate(requests):
        by_prefix.setdefault(id(request.prefix), []).append(i)
    for members in by_prefix.values():
        group: list[int] = []
        for i in members:
            if group and sum(len(tokens[j]) for j in group) + len(tokens[i]) > rows:
                yield group
                group = []
            group.append(i)
        yield group


def _score_group(
    llm: PreTrainedModel, questions: Sequence[Request], options: Sequence[Sequence[list[int]]]
) -> list[list[float]]:
    """Run each question once, then its options after its key/values."""
    output = _read(llm, questions, None)
    hidden, cache = output.last_hidden_state, output.past_key_values
    assert isinstance(cache, DynamicCache)
    device = hidden.device
    sizes = torch.tensor([len(question.embeds) for question in questions], device=device)  # (R,)
    lengths = cache.layers[0].keys.shape[2] - hidden.shape[1] + sizes  # (R,), prefix included

    # The question's last state predicts the first token of each of its options.
    first = log_probabilities(llm, hidden[torch.arange(len(questions), device=device), sizes - 1])  # (R, V)
    flat = [ids for of_question in options for ids in of_question]  # M options of all questions
    owner = torch.tensor([i for i, of_question in enumerate(options) for _ in of_question], device=device)  # (M,)
    total = first[owner, torch.tensor([ids[0] for ids in flat], device=device)]  # (M,)

    # The other tokens: options of the same length are run together, without padding.
    counts = torch.tensor([len(ids) for ids in flat], device=device)  # (M,)
    for count in sorted({len(ids) for ids in flat} - {1}):
        some = (counts == count).nonzero()[:, 0]
        ids = torch.tensor([flat[i] for i in some.tolist()], device=device)
        total[some] += _score_rest(llm, cache, lengths, owner[some], ids)
    means = iter((total / counts).tolist())
    return [[next(means) for _ in of_question] for of_question in options]


def _score_rest(llm: PreTrainedModel, cache: DynamicCache, lengths: Tensor, owner: Tensor, ids: Tensor) -> Tensor:
    """(M,): log-likelihood of all tokens but the first of options (M, O), which follow the questions `owner` (M,)."""
    columns = cache.layers[0].keys.shape[2]
    steps = torch.arange(ids.shape[1] - 1, device=ids.device)
    # A row's key/values fill the last `lengths` of the C columns; the option's own follow.
    index = torch.arange(columns + len(steps), device=ids.device)
    mask = (index[None, :] >= (columns - lengths[owner])[:, None]).long()  # (M, C + O - 1)
    hidden = decoder_of(llm)(
        inputs_embeds=embed(llm, ids[:, :-1]),
        attention_mask=mask,
        position_ids=lengths[owner][:, None] + steps,
        past_key_values=_right_aligned(cache, lengths, owner),
        use_cache=True,
    ).last_hidden_state  # (M, O - 1, D)
    scores = [
        log_probabilities(llm, hidden[:, step]).gather(1, ids[:, step + 1, None])[:, 0] for step in steps.tolist()
    ]
    return torch.stack(scores).sum(dim=0)


def _right_aligned(cache: DynamicCache, lengths: Tensor, owner: Tensor) -> DynamicCache:
    """The key/values of each option's question, moved so that each row ends at the last column.

    With C = 4 and a row of length 3, columns `k1 k2 k3 .` are read in the order 0 0 1 2: `(k1) k1 k2 k3`; the
    column in brackets is masked.
    """
    columns = cache.layers[0].keys.shape[2]
    shift = columns - lengths
    source = (torch.arange(columns, device=lengths.device)[None, :] - shift[:, None]).clamp(min=0)  # (R, C)

    def for_options(states: Tensor) -> Tensor:  # (R, H, C, d) -> (M, H, C, d)
        index = source[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
        return states.gather(2, index)[owner]

    return DynamicCache([(for_options(layer.keys), for_options(layer.values)) for layer in cache.layers])
