"""Which option does the LLM find likeliest? Log-likelihoods of given answers, the question run once.

In:  questions as the decoder takes them (`Request`), and each one's options.
Out: for each question the mean log-likelihood a token of each option: length-normalised, so that a long
     option is not unlikely for being long.
Try: `option_scores(model, tokenizer, [request], [("yes", "no")], rows=64)`
Flow: evaluation/ — routes.py asks it for choice tasks, on every route in the same way.

Questions that share a prefix are prefilled together on its key/values; each question's key/values are then
shared by its options. As in decoding.py, padding is moved before a row's first token, so that distances
between tokens stay true for sliding windows.

Letters: R questions, N options of all of them, P prefix length, L question length, O option length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from blsp.model.decoding import Request
from blsp.model.language_model import decoder_of, embed, logits_of
from blsp.model.prompt import text_ids


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


def _log_probabilities(llm: PreTrainedModel, hidden: Tensor) -> Tensor:
    logits = logits_of(llm, hidden)
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(dim=-1)
