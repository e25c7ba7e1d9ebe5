"""Both routes made to write the same answer, and what the LLM is about to say at each of its tokens.

In:  a question as the decoder takes it (`Request`), and the answer that the text route gave.
Out: hidden states (N, D) at the N places that predict the answer's tokens, its end included; of the last
     layer, or of all.
Try: `answer_states(model, [request], [answer])[0].shape`
Flow: evaluation/ — under alignment.py and layers.py.

Letters: R rows, L sequence, P prefix length, N answer tokens, A layers + 1, D LLM width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blsp.evaluation.answers import Answer
from blsp.model.decoding import Request
from blsp.model.language_model import decoder_of, embed, logits_of

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
        found += (teacher.exp() * (teacher - student)).sum(dim=-1).tolist()
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
