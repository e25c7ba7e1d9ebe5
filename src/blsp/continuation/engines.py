"""The text LLM behind one method: batches of prompts in, batches of answers out.

In:  an iterable of batches of `Prompt`; a batch is computed at once and never regrouped.
Out: one list of `Written` a batch, as batches get done (a remote engine overtakes, local ones keep order).
Try: `TransformersEngine(llm, tokenizer, Decoding()).write([[Prompt(0, "Say:", "instruction-first", "hi")]])`
Flow: continuation/ — step 1. `TransformersEngine` writes with the LLM in this process, `ScoringEngine` adds
      the teacher's top-k to answers that exist, `OpenAIEngine` (openai_engine.py) asks a URL.

Letters: R rows, L sequence, P prefix length, N answer steps, K top-k, D LLM width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blsp.llm.decoding import Decoding, Request, decode
from blsp.llm.language_model import decoder_of, embed, logits_of, stop_ids
from blsp.llm.prefix import Prefix, compute_prefix
from blsp.llm.prompt import Order, PromptTemplate, frame_prompt, transcript_ids

FRAMES_KEPT = 64  # instructions whose key/values are held; a run has a handful unless rows bring their own
LOGITS_AT_A_TIME = 1 << 24  # V × positions whose scores exist at once: 64 MiB in float32


@dataclass(frozen=True)
class Prompt:
    """One question to the LLM. `answer` and `finish` are set where an answer exists and is to be scored."""

    key: int
    instruction: str
    order: Order
    text: str  # the transcript as the LLM reads it
    seed: int = 0
    answer: tuple[int, ...] = ()
    finish: str = ""


@dataclass(frozen=True)
class Top:
    """The K most probable tokens of each step: ids (N, K) uint32, logp (N, K) float16."""

    ids: np.ndarray
    logp: np.ndarray


@dataclass(frozen=True)
class Written:
    """One answer. ids None: the engine does not say which tokens it wrote. refused: why there is none."""

    key: int
    text: str
    ids: list[int] | None
    finish: str  # stop | length
    top: Top | None = None
    refused: str | None = None


class Engine(Protocol):
    """Anything that answers prompts."""

    def write(self, batches: Iterable[Sequence[Prompt]]) -> Iterator[list[Written]]: ...


class PrefixCache:
    """Prompt frames and their prefixes' key/values, computed once an instruction."""

    def __init__(self, llm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._llm, self._tokenizer = llm, tokenizer
        self._kept: dict[tuple[str, Order], tuple[PromptTemplate, Prefix | None]] = {}

    def of(self, prompts: Sequence[Prompt]) -> list[tuple[PromptTemplate, Prefix | None]]:
        """The frame and prefix of each prompt; equal ones are one object, which is how rows share them."""
        wanted = dict.fromkeys((prompt.instruction, prompt.order) for prompt in prompts)
        if len(self._kept) + len(wanted) > FRAMES_KEPT:
            self._kept = {name: kept for name, kept in self._kept.items() if name in wanted}
        for instruction, order in wanted:
            if (instruction, order) not in self._kept:
                frame = frame_prompt(self._tokenizer, instruction, order)
                prefix = compute_prefix(self._llm, frame.prefix_ids) if frame.prefix_ids else None
                self._kept[instruction, order] = (frame, prefix)
        return [self._kept[prompt.instruction, prompt.order] for prompt in prompts]


class TransformersEngine:
    """The LLM in this process: a batch shares its prefix's key/values, and finished answers leave it."""

    def __init__(self, llm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, decoding: Decoding) -> None:
        self._llm, self._tokenizer = llm, tokenizer
        self._decoding = replace(decoding, stop_ids=decoding.stop_ids or stop_ids(llm))
        self._frames = PrefixCache(llm, tokenizer)

    def write(self, batches: Iterable[Sequence[Prompt]]) -> Iterator[list[Written]]:
        for batch in batches:
            yield self._write(batch)

    def _write(self, batch: Sequence[Prompt]) -> list[Written]:
        requests = []
        for prompt, (frame, prefix) in zip(batch, self._frames.of(batch), strict=True):
            ids = [*transcript_ids(self._tokenizer, prompt.text), *frame.suffix_ids]
            decoding = replace(self._decoding, seed=prompt.seed)
            requests.append(Request(prompt.key, embed(self._llm, ids), prefix, decoding))
        results = decode(self._llm, requests, batch_size=len(requests))
        written = []
        for prompt in batch:
            result = results[prompt.key]
            top = None
            if result.top_ids is not None and result.top_logp is not None:
                top = _top(result.top_ids, result.top_logp)
            written.append(Written(prompt.key, self._text(result.ids), result.ids, result.finish, top))
        return written

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class ScoringEngine:
    """Teacher forcing: the top-k of each step of answers that exist, the step that stopped included."""

    def __init__(
        self, llm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, top_k: int, temperature: float = 1.0
    ) -> None:
        self._llm, self._tokenizer = llm, tokenizer
        self._top_k, self._temperature = top_k, temperature
        self._frames = PrefixCache(llm, tokenizer)

    def write(self, batches: Iterable[Sequence[Prompt]]) -> Iterator[list[Written]]:
        for batch in batches:
            yield [written for group in self._by_prefix(batch) for written in self._score(group)]

    def _by_prefix(self, batch: Sequence[Prompt]) -> list[list[tuple[Prompt, PromptTemplate, Prefix | None]]]:
        groups: dict[int, list[tuple[Prompt, PromptTemplate, Prefix | None]]] = {}
        for prompt, (frame, prefix) in zip(batch, self._frames.of(batch), strict=True):
            groups.setdefault(id(prefix), []).append((prompt, frame, prefix))
        return list(groups.values())

    @torch.no_grad()
    def _score(self, group: list[tuple[Prompt, PromptTemplate, Prefix | None]]) -> list[Written]:
        prefix = group[0][2]
        before = len(prefix) if prefix else 0
        questions = [[*transcript_ids(self._tokenizer, p.text), *frame.suffix_ids] for p, frame, _ in group]
        rows = [[*q, *p.answer] for q, (p, _, _) in zip(questions, group, strict=True)]
        lengths = torch.tensor([len(row) for row in rows])  # (R,)
        ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)  # (R, L), right-padded
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row)
        device = self._llm.get_input_embeddings().weight.device
        columns = torch.arange(before + ids.shape[1], device=device)
        hidden = decoder_of(self._llm)(
            inputs_embeds=embed(self._llm, ids.to(device)),
            attention_mask=(columns[None, :] < before + lengths.to(device)[:, None]).long(),
            position_ids=columns[None, before:].expand(len(rows), -1),
            past_key_values=prefix.expand(len(rows)) if prefix else None,
            use_cache=prefix is not None,
        ).last_hidden_state  # (R, L, D)
        written = []
        for place, ((prompt, _, _), question) in enumerate(zip(group, questions, strict=True)):
            first = len(question) - 1  # the state that predicts the answer's first token
            steps = len(prompt.answer) + (prompt.finish == "stop")
            top = self._top_of(hidden[place, first : first + steps])
            written.append(Written(prompt.key, "", list(prompt.answer), prompt.finish, top))
        return written

    def _top_of(self, hidden: Tensor) -> Top:
        """Top-k of hidden (N, D), a few positions at a time."""
        at_a_time = max(1, LOGITS_AT_A_TIME // self._llm.get_output_embeddings().weight.shape[0])
        tops = []
        for chunk in hidden.split(at_a_time):
            logp = (logits_of(self._llm, chunk).float() / self._temperature).log_softmax(dim=-1)
            tops.append(logp.topk(self._top_k))
        if not tops:
            return Top(np.zeros((0, self._top_k), np.uint32), np.zeros((0, self._top_k), np.float16))
        return _top(torch.cat([top.indices for top in tops]), torch.cat([top.values for top in tops]))


def _top(ids: Tensor, logp: Tensor) -> Top:
    return Top(ids.cpu().numpy().astype(np.uint32), logp.cpu().float().numpy().astype(np.float16))
