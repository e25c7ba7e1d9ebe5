"""The LLM in this process as an engine: batches of prompts in, batches of answers out.

In:  an iterable of batches of `Prompt`. A batch is computed together and never regrouped.
Out: one list of `Written` for each batch, as soon as it is done (here in order, behind a URL in any order).
Try: `TransformersEngine(llm, tokenizer, Decoding()).write([[Prompt(0, "Say:", "instruction-first", "hi")]])`
Flow: prompt_plan.py (batches) → **engines.py** (`TransformersEngine` writes answers, `ScoringEngine` adds the teacher's
      top-k to finished answers) or openai_engine.py → prompt_plan.py (answer logs)

Shapes: N answer steps, K top-k, D LLM width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blsp.llm.decoding import Decoding, Request, Result, answer_text, decode
from blsp.llm.language_model import embed, stop_ids
from blsp.llm.prefix import PrefixCache
from blsp.llm.prompt import Order, prompt_template, transcript_ids
from blsp.llm.teacher_forcing import answer_states, top_k_states


@dataclass(frozen=True)
class Prompt:
    """One prompt for the LLM. answer, finish: set if a finished answer is to be scored."""

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
    """One answer. ids None: the engine does not return token ids. refused: why the answer cannot be used."""

    key: int
    text: str
    ids: list[int] | None
    finish: str  # stop | length; "" if there is no answer
    top: Top | None = None
    refused: str | None = None


class Engine(Protocol):
    """Anything that answers prompts."""

    def write(self, batches: Iterable[Sequence[Prompt]]) -> Iterator[list[Written]]: ...


def requests_of(
    prefixes: PrefixCache,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    decoding: Decoding | None = None,
) -> list[Request]:
    """Each prompt as a request of the decode loop. Equal prefixes are one object, so that rows share it."""
    # one template for each instruction and order, one prefix for each template's ids
    names = dict.fromkeys((prompt.instruction, prompt.order) for prompt in prompts)
    templates = {name: prompt_template(tokenizer, *name) for name in names}
    prefix_of = {ids: prefixes.get(ids) for ids in {t.prefix_ids: None for t in templates.values()}}
    requests = []
    for prompt in prompts:
        template = templates[prompt.instruction, prompt.order]
        embeds = embed(prefixes.llm, [*transcript_ids(tokenizer, prompt.text), *template.suffix_ids])
        seeded = replace(decoding or Decoding(), seed=prompt.seed)
        requests.append(Request(prompt.key, embeds, prefix_of[template.prefix_ids], seeded))
    return requests


class TransformersEngine:
    """The LLM in this process: the rows of a batch share their prefix's key/values; finished rows leave the batch."""

    def __init__(self, llm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, decoding: Decoding) -> None:
        self._llm, self._tokenizer = llm, tokenizer
        self._decoding = replace(decoding, stop_ids=decoding.stop_ids or stop_ids(llm))
        self._prefixes = PrefixCache(llm)

    def write(self, batches: Iterable[Sequence[Prompt]]) -> Iterator[list[Written]]:
        for batch in batches:
            yield self._write(batch)

    def _write(self, batch: Sequence[Prompt]) -> list[Written]:
        requests = requests_of(self._prefixes, self._tokenizer, batch, self._decoding)
        results = decode(self._llm, requests, batch_size=len(requests))
        written = []
        for prompt in batch:
            result = results[prompt.key]
            top = None
            if result.top_ids is not None and result.top_logp is not None:
                top = _top(result.top_ids, result.top_logp)
            text = answer_text(self._tokenizer, result.ids)
            written.append(Written(prompt.key, text, result.ids, result.finish, top))
        return written


class ScoringEngine:
    """Teacher forcing: the top-k of each step of finished answers, with the step that stopped."""

    def __init__(
        self, llm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, top_k: int, temperature: float = 1.0
    ) -> None:
        self._llm, self._tokenizer = llm, tokenizer
        self._top_k, self._temperature = top_k, temperature
        self._prefixes = PrefixCache(llm)

    def write(self, batches: Iterable[Sequence[Prompt]]) -> Iterator[list[Written]]:
        for batch in batches:
            requests = requests_of(self._prefixes, self._tokenizer, batch)
            groups: dict[int, list[tuple[Prompt, Request]]] = {}  # prompts with one prefix are run together
            for prompt, request in zip(batch, requests, strict=True):
                groups.setdefault(id(request.prefix), []).append((prompt, request))
            yield [written for group in groups.values() for written in self._score(group)]

    def _score(self, group: list[tuple[Prompt, Request]]) -> list[Written]:
        answers = [Result(list(prompt.answer), prompt.finish) for prompt, _ in group]
        states = answer_states(self._llm, [request for _, request in group], answers)
        return [
            Written(prompt.key, "", answer.ids, answer.finish, self._top_of(hidden))
            for (prompt, _), answer, hidden in zip(group, answers, states, strict=True)
        ]

    def _top_of(self, hidden: Tensor) -> Top:
        """Top-k of hidden (N, D); N is 0 for an answer that was cut off before its first token."""
        if not len(hidden):
            return Top(np.zeros((0, self._top_k), np.uint32), np.zeros((0, self._top_k), np.float16))
        return _top(*top_k_states(self._llm, hidden, self._top_k, self._temperature))


def _top(ids: Tensor, logp: Tensor) -> Top:
    return Top(ids.cpu().numpy().astype(np.uint32), logp.cpu().float().numpy().astype(np.float16))
