"""The one decode loop: a batch whose rows join and leave between steps.

In:  requests: embeddings that follow a (shared) prefix, and how to decode.
Out: events, one a token a row; or finished results, by `decode`.
Try: `decode(llm, [Request("a", embed(llm, ids), prefix, Decoding(stop_ids=stop_ids(llm)))], batch_size=1)`
Flow: model/ — step 1, generate, transcribe, chat, the judge and the server all write their tokens here.

New rows are prefilled together, right-padded, on the prefix's shared key/values, then seated in slots whose
rows end at one common column. A step feeds one token a row; a finished row leaves and the last row takes its
slot. Padding lies before a row's first token only, so distances between tokens (sliding windows) stay true.

Letters: R rows, L sequence, P prefix length, H key/value heads, C columns, d head width, D LLM width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from blsp.llm.kv_cache import BatchKVCache
from blsp.llm.language_model import at_least_float32, decoder_of, embed, logits_of
from blsp.llm.prefix import Prefix, run_after_prefix


@dataclass(frozen=True)
class Decoding:
    """How an answer is written. temperature 0 is greedy; top_k_logprobs keeps that many log-probabilities
    (at top_k_temperature) of each step's distribution; stop_ids end the answer."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    top_k_logprobs: int = 0
    top_k_temperature: float = 1.0


@dataclass(frozen=True)
class Request:
    """One answer to write: embeds (L, D) after `prefix`. keep_cache hands the row's key/values back at its end."""

    key: Hashable
    embeds: Tensor
    prefix: Prefix | None = None
    decoding: Decoding = Decoding()
    keep_cache: bool = False


@dataclass(frozen=True)
class Event:
    """One token of one row. `finish` is set on a row's last event: "stop" (token is a stop id) or "length".
    top_ids, top_logp (K,) when asked for; `cache` (a Prefix without the last token) when asked for."""

    key: Hashable
    token: int
    finish: str | None = None
    top_ids: Tensor | None = None
    top_logp: Tensor | None = None
    cache: Prefix | None = None


@dataclass
class Result:
    """A finished answer: ids without the stop id; top_ids, top_logp (n, K) include the step that stopped."""

    ids: list[int] = field(default_factory=list)
    finish: str = "length"
    top_ids: Tensor | None = None
    top_logp: Tensor | None = None


def decode(
    llm: PreTrainedModel,
    requests: Iterable[Request],
    batch_size: int,
    on_event: Callable[[Event], None] | None = None,
) -> dict[Hashable, Result]:
    """Write every answer, at most `batch_size` at a time; free places are filled once a quarter is free."""
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: must be 1 or more")
    decoder, waiting = Decoder(llm), iter(requests)
    results: dict[Hashable, Result] = {}
    tops: dict[Hashable, list[Event]] = {}
    exhausted = False
    while True:
        events: list[Event] = []
        free = batch_size - len(decoder)
        if not exhausted and (len(decoder) == 0 or 4 * free >= batch_size):
            joining = list(islice(waiting, free))
            exhausted = len(joining) < free
            events = decoder.join(joining)
        elif len(decoder):
            events = decoder.step()
        elif exhausted:
            break
        for event in events:
            _collect(results.setdefault(event.key, Result()), event, tops)
            if on_event:
                on_event(event)
    return results


def _collect(result: Result, event: Event, tops: dict[Hashable, list[Event]]) -> None:
    if event.finish != "stop":
        result.ids.append(event.token)
    if event.top_ids is not None:
        tops.setdefault(event.key, []).append(event)
    if event.finish:
        result.finish = event.finish
        steps = tops.pop(event.key, [])
        if steps:
            result.top_ids = torch.stack([step.top_ids for step in steps if step.top_ids is not None])
            result.top_logp = torch.stack([step.top_logp for step in steps if step.top_logp is not None])


@dataclass
class _Row:
    """A seated request: `length` tokens in its slot, `token` to be fed next, `written` answer tokens."""

    request: Request
    length: int
    token: int = 0
    written: int = 0
    generator: torch.Generator | None = None


class Decoder:
    """Rows in slots; `join` prefills and seats, `step` writes one token a row, finished rows leave."""

    def __init__(self, llm: PreTrainedModel) -> None:
        self.llm = llm
        self.rows: list[_Row] = []
        self._slots: BatchKVCache | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @torch.no_grad()
    def join(self, requests: list[Request]) -> list[Event]:
        """Prefill `requests` (grouped by prefix) and return the event of each one's first token."""
        groups: dict[int, list[Request]] = {}
        for request in requests:
            groups.setdefault(id(request.prefix), []).append(request)
        events: list[Event] = []
        for group in groups.values():
            events.extend(self._prefill(group))
        return events

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Feed each row its last token; return the event of each one's next."""
        assert self._slots is not None and self.rows, "step() needs rows: join() some first"
        lengths = torch.tensor([row.length for row in self.rows], device=self._device)
        tokens = torch.tensor([[row.token] for row in self.rows], device=self._device)
        mask = self._slots.open_column(len(self.rows), lengths)
        output = decoder_of(self.llm)(
            inputs_embeds=embed(self.llm, tokens),
            attention_mask=mask,
            position_ids=lengths[:, None],
            past_key_values=self._slots.cache,
            use_cache=True,
        )
        self._slots.close_column()
        for row in self.rows:
            row.length += 1
        return self._write(self.rows, output.last_hidden_state[:, -1])

    def leave(self, key: Hashable) -> None:
        """Take a row out before it is finished; unknown keys are ignored (the row may just have ended)."""
        for index, row in enumerate(self.rows):
            if row.request.key == key:
                self._vacate(index)
                return

    @property
    def _device(self) -> torch.device:
        return self.llm.get_input_embeddings().weight.device

    def _prefill(self, group: list[Request]) -> list[Event]:
        prefix = group[0].prefix
        before = len(prefix) if prefix else 0
        lengths = torch.tensor([len(request.embeds) for request in group], device=self._device)
        if not bool(lengths.all()):
            empty = next(request.key for request in group if not len(request.embeds))
            raise ValueError(f"request {empty!r}: has nothing to go on from; give one embedding at least")
        embeds = nn.utils.rnn.pad_sequence(
            [request.embeds for request in group], batch_first=True
        )  # (R, L, D)
        output = run_after_prefix(self.llm, prefix, embeds, keep_cache=True)
        cache = output.past_key_values
        assert isinstance(cache, DynamicCache)
        rows = [
            _Row(request, before + length) for request, length in zip(group, lengths.tolist(), strict=True)
        ]
        for row in rows:
            if row.request.decoding.temperature > 0:
                row.generator = torch.Generator().manual_seed(row.request.decoding.seed)
        self._slots = self._slots or BatchKVCache(len(cache.layers))
        self._slots.seat(cache, [row.length for row in rows], occupied=len(self.rows), widest=self._widest)
        self.rows.extend(rows)
        last = output.last_hidden_state[torch.arange(len(group), device=self._device), lengths - 1]  # (R, D)
        return self._write(rows, last)

    @property
    def _widest(self) -> int:
        return max((row.length for row in self.rows), default=0)

    def _write(self, rows: list[_Row], hidden: Tensor) -> list[Event]:
        """Choose the next token of `rows` from hidden (R, D); rows that end leave their slots."""
        logits = at_least_float32(logits_of(self.llm, hidden))  # (R, V)
        greedy = logits.argmax(dim=-1).tolist()
        events, ended = [], []
        for row, scores, best in zip(rows, logits, greedy, strict=True):
            decoding = row.request.decoding
            row.token = best if row.generator is None else _sample(scores, decoding, row.generator)
            row.written += 1
            finish = "stop" if row.token in decoding.stop_ids else None
            if finish is None and row.written >= decoding.max_new_tokens:
                finish = "length"
            events.append(self._event(row, scores, finish))
            if finish:
                ended.append(row)
        for row in ended:
            self._vacate(next(i for i, seated in enumerate(self.rows) if seated is row))
        return events

    def _event(self, row: _Row, scores: Tensor, finish: str | None) -> Event:
        top_ids = top_logp = cache = None
        if row.request.decoding.top_k_logprobs:
            decoding = row.request.decoding
            top = (scores / decoding.top_k_temperature).log_softmax(dim=-1).topk(decoding.top_k_logprobs)
            top_ids, top_logp = top.indices.cpu(), top.values.cpu()
        if finish and row.request.keep_cache and self._slots is not None:
            index = next(i for i, seated in enumerate(self.rows) if seated is row)
            cache = Prefix((), self._slots.take(index, row.length))
        return Event(row.request.key, row.token, finish, top_ids, top_logp, cache)

    def _vacate(self, index: int) -> None:
        """The last row moves into the free slot."""
        assert self._slots is not None
        last = self.rows.pop()
        if index < len(self.rows):
            self._slots.move(len(self.rows), index)
            self.rows[index] = last
        self._slots.start = self._slots.end - self._widest


def _sample(scores: Tensor, decoding: Decoding, generator: torch.Generator) -> int:
    """Temperature and nucleus sampling (Holtzman et al. 2020) on the CPU, with the row's own generator."""
    scores = scores.cpu().double()  # below the largest: the smallest temperature leaves it, and no nan
    probabilities = ((scores - scores.max()) / decoding.temperature).softmax(dim=-1)
    if decoding.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        outside = ordered.cumsum(dim=-1) - ordered >= decoding.top_p
        outside[0] = False
        probabilities = probabilities.index_fill(0, order[outside], 0.0)
    return int(torch.multinomial(probabilities, 1, generator=generator))
