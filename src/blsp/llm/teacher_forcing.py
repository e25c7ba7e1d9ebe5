"""Both routes made to write the same answer, and what the LLM is about to say at each of its tokens.

In:  a question as the decoder takes it (`Request`), and the answer that the text route gave.
Out: hidden states (N, D) at the N places that predict the answer's tokens, its end included; of the last
     layer, or of all.
Try: `answer_states(model, [request], [answer])[0].shape`
Flow: evaluation/ — under alignment.py and layers.py.

Letters: R rows, L sequence, P prefix length, N answer tokens, A layers + 1, D LLM width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from blsp.evaluation.answers import Answer
from blsp.llm.decoding import Request
from blsp.llm.language_model import decoder_of, embed, kl_divergence, logits_of
from blsp.llm.prompt import text_ids

LOGITS_AT_A_TIME = 1 << 23  # V × positions whose scores exist at once: 32 MiB in float32


def answer_tokens(answer: Answer) -> int:
    """Tokens whose prediction is looked at: the end counts where the answer came to one."""
    return len(answer.ids) + (answer.finish == "stop")


@torch.no_grad()
def answer_states(
    llm: PreTrainedModel, requests: Sequence[Request], answers: Sequence[Answer]
) -> list[Tensor]:
    """Last hidden states (N, D) of each row at its answer's places. All requests share one prefix."""
    states = _run(llm, requests, answers, every_layer=False)
    return [row[0, asked - 1 : asked - 1 + count] for row, asked, count in _spans(states, requests, answers)]


@torch.no_grad()
def layer_states(
    llm: PreTrainedModel, requests: Sequence[Request], answers: Sequence[Answer]
) -> list[tuple[Tensor, Tensor]]:
    """For each row: states of every layer at the question's places (A, L, D) and at the answer's (A, N, D)."""
    states = _run(llm, requests, answers, every_layer=True)
    return [
        (row[:, :asked], row[:, asked - 1 : asked - 1 + count])
        for row, asked, count in _spans(states, requests, answers)
    ]


@torch.no_grad()
def divergence(llm: PreTrainedModel, text: Tensor, speech: Tensor) -> tuple[list[float], list[bool]]:
    """KL(text || speech) in nats over the whole vocabulary, temperature 1, and whether the likeliest token is one.

    text, speech: hidden states (N, D) before the head.
    """
    found: list[float] = []
    agreed: list[bool] = []
    at_a_time = max(1, LOGITS_AT_A_TIME // llm.get_output_embeddings().weight.shape[0])
    for reading, hearing in zip(text.split(at_a_time), speech.split(at_a_time), strict=True):
        teacher, student = (_log_probabilities(llm, states) for states in (reading, hearing))
        found += kl_divergence(teacher, student).tolist()
        agreed += (teacher.argmax(dim=-1) == student.argmax(dim=-1)).tolist()
    return found, agreed


def _log_probabilities(llm: PreTrainedModel, states: Tensor) -> Tensor:
    logits = logits_of(llm, states)
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(dim=-1)


def _run(
    llm: PreTrainedModel, requests: Sequence[Request], answers: Sequence[Answer], *, every_layer: bool
) -> Tensor:
    """States (R, A or 1, L, D) of questions and answers in one pass, right-padded."""
    prefix = requests[0].prefix
    assert all(request.prefix is prefix for request in requests), "rows of one pass share their prefix"
    before = len(prefix) if prefix else 0
    rows = [
        torch.cat([request.embeds, _fed(llm, answer)])
        for request, answer in zip(requests, answers, strict=True)
    ]
    embeds = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    positions = before + torch.arange(embeds.shape[1], device=embeds.device)
    output = decoder_of(llm)(  # no mask: causal attention never looks at the padding on the right
        inputs_embeds=embeds,
        position_ids=positions.expand(len(rows), -1),
        past_key_values=prefix.expand(len(rows)) if prefix else None,
        use_cache=prefix is not None,
        output_hidden_states=every_layer,
    )
    return torch.stack(output.hidden_states, dim=1) if every_layer else output.last_hidden_state[:, None]


def _fed(llm: PreTrainedModel, answer: Answer) -> Tensor:
    """The answer's tokens that are read on the way: the last one predicts nothing, unless the end follows it."""
    ids = answer.ids if answer.finish == "stop" else answer.ids[:-1]
    return embed(llm, list(ids))


def _spans(
    states: Tensor, requests: Sequence[Request], answers: Sequence[Answer]
) -> list[tuple[Tensor, int, int]]:
    """Each row's states with the length of its question and the number of its answer's places."""
    lengths = [len(request.embeds) for request in requests]
    return [
        (row, asked, answer_tokens(answer))
        for row, asked, answer in zip(states, lengths, answers, strict=True)
    ]


@torch.no_grad()
def option_scores(
    llm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    options: Sequence[Sequence[str]],
    rows: int,
) -> list[list[float]]:
    """Scores in the order of `requests`; at most `rows` options side by side (a question's own stay together)."""
    scores: list[list[float]] = [[] for _ in requests]
    tokens = [[text_ids(tokenizer, option) for option in each] for each in options]
    for group in _groups(requests, tokens, rows):
        questions = [requests[i] for i in group]
        for i, found in zip(group, _score_group(llm, questions, [tokens[i] for i in group]), strict=True):
            scores[i] = found
    return scores


def _groups(
    requests: Sequence[Request], tokens: Sequence[Sequence[list[int]]], rows: int
) -> Iterator[list[int]]:
    """Questions with one prefix, in order, as many as `rows` options allow."""
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
    cache, lengths, first = _prefill(llm, questions)
    owner = torch.tensor([i for i, each in enumerate(options) for _ in each], device=first.device)  # (N,)
    flat = [ids for each in options for ids in each]
    sizes = torch.tensor([len(ids) for ids in flat], device=first.device)  # (N,)
    begins = torch.tensor([ids[0] for ids in flat], device=first.device)
    total = first[owner, begins]  # (N,) log-likelihood of each option's first token
    for size in sorted({len(ids) for ids in flat} - {1}):  # those of one length together: nothing is padded
        some = (sizes == size).nonzero()[:, 0]
        ids = torch.tensor([flat[i] for i in some.tolist()], device=first.device)
        total[some] += _rest(llm, cache, lengths, owner[some], ids)
    means = (total / sizes).tolist()
    return [[means.pop(0) for _ in each] for each in options]


def _prefill(llm: PreTrainedModel, questions: Sequence[Request]) -> tuple[DynamicCache, Tensor, Tensor]:
    """Key/values of prefix and questions, right-padded; lengths (R,); log-probabilities (R, V) of the next token."""
    prefix = questions[0].prefix
    before = len(prefix) if prefix else 0
    embeds = nn.utils.rnn.pad_sequence(
        [question.embeds for question in questions], batch_first=True
    )  # (R, L, D)
    lengths = torch.tensor([len(question.embeds) for question in questions], device=embeds.device)
    positions = before + torch.arange(embeds.shape[1], device=embeds.device)
    cache = prefix.expand(len(questions)) if prefix else DynamicCache()
    hidden = decoder_of(llm)(
        inputs_embeds=embeds,
        position_ids=positions.expand(len(questions), -1),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    last = hidden[torch.arange(len(questions), device=embeds.device), lengths - 1]
    return cache, before + lengths, _log_probabilities(llm, last)


def _rest(llm: PreTrainedModel, cache: DynamicCache, lengths: Tensor, owner: Tensor, ids: Tensor) -> Tensor:
    """(N,): log-likelihoods of all tokens but the first of options (N, O), of the questions that `owner` (N,) names."""
    columns = cache.layers[0].keys.shape[2]
    shared = _right_aligned(cache, lengths, owner)
    positions = torch.arange(columns + ids.shape[1] - 1, device=ids.device)
    mask = (positions[None, :] >= (columns - lengths[owner])[:, None]).long()
    steps = torch.arange(ids.shape[1] - 1, device=ids.device)
    hidden = decoder_of(llm)(
        inputs_embeds=embed(llm, ids[:, :-1]),
        attention_mask=mask,
        position_ids=lengths[owner][:, None] + steps,
        past_key_values=shared,
        use_cache=True,
    ).last_hidden_state  # (N, O-1, D)
    found = [
        _log_probabilities(llm, hidden[:, step]).gather(1, ids[:, step + 1, None])[:, 0]
        for step in steps.tolist()
    ]
    return torch.stack(found).sum(dim=0)


def _right_aligned(cache: DynamicCache, lengths: Tensor, owner: Tensor) -> DynamicCache:
    """A copy for every option in which each row ends at the last column."""
    columns = cache.layers[0].keys.shape[2]
    shift = columns - lengths
    source = (torch.arange(columns, device=lengths.device)[None, :] - shift[:, None]).clamp(min=0)  # (R, C)

    def moved(states: Tensor) -> Tensor:  # (R, H, C, d) -> (N, H, C, d)
        index = source[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
        return states.gather(2, index)[owner]

    return DynamicCache([(moved(layer.keys), moved(layer.values)) for layer in cache.layers])
