"""The one decode loop: a batch whose rows join and leave between steps; and the text of its tokens.

In:  requests: embeddings that follow a (shared) prefix, and how to decode.
Out: one event for each token of each row; `decode` gives finished results, `TextStream` text while tokens arrive.
Try: `decode(llm, [Request("a", embed(llm, ids), prefix, Decoding(stop_ids=stop_ids(llm)))], batch_size=1)`
Flow: prefix.py, kv_cache.py → **decoding.py** → step 1, generate, transcribe, chat, the judge and the server.

    join:  new rows are prefilled together on their prefix's key/values, inserted into free slots, and get a first token
    step:  each row is fed its last token and gets its next one; a finished row leaves its slot at once

Rows are padded only before their first token (kv_cache.py). A row's answer does not depend on other rows (law 3).

Shapes: R rows, L sequence after the prefix, K top-k, D LLM width, V vocabulary.
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field, replace
from itertools import islice

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from blsp.llm.kv_cache import BatchKVCache
from blsp.llm.language_model import at_least_float32, decoder_of, embed, logits_of
from blsp.llm.prefix import Prefix, run_after_prefix


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen, and when an answer ends.

    temperature: 0 is greedy. stop_ids: tokens that end the answer.
    top_k_logprobs: keep that many log-probabilities of each step, taken at `top_k_temperature`.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    top_k_logprobs: int = 0
    top_k_temperature: float = 1.0


@dataclass(frozen=True)
class Request:
    """One answer to write: embeds (L, D) after `prefix`. keep_cache: return its key/values with its last event."""

    key: Hashable
    embeds: Tensor
    prefix: Prefix | None = None
    decoding: Decoding = Decoding()
    keep_cache: bool = False


@dataclass(frozen=True)
class Event:
    """One token of one row.

    finish: set on a row's last event: "stop" (the token is a stop id) or "length".
    top_ids, top_logp: (K,) when asked for. cache: when asked for, the key/values of all tokens but the last.
    """

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


def decode(llm: PreTrainedModel, requests: Iterable[Request], batch_size: int) -> dict[Hashable, Result]:
    """Write every answer, at most `batch_size` at a time; new rows join once a quarter of the slots is free."""
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: must be 1 or more")
    decoder, waiting = Decoder(llm), iter(requests)
    results: dict[Hashable, Result] = {}
    tops: dict[Hashable, list[Event]] = {}  # of unfinished rows
    exhausted = False
    while True:
        events: list[Event] = []
        # All running rows wait during a prefill, so new rows join in groups.
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
    """A running request. length: tokens in its slot; token: the next one to feed; written: answer tokens so far."""

    request: Request
    length: int
    token: int = 0
    written: int = 0
    generator: torch.Generator | None = None


class Decoder:
    """A running batch; row i of `rows` uses slot i."""

    def __init__(self, llm: PreTrainedModel) -> None:
        self.llm = llm
        self.rows: list[_Row] = []
        self._slots: BatchKVCache | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @torch.no_grad()
    def join(self, requests: list[Request]) -> list[Event]:
        """Prefill `requests`, those with one prefix together, and return the event of each one's first token."""
        groups: dict[int, list[Request]] = {}
        for request in requests:
            groups.setdefault(id(request.prefix), []).append(request)
        return [event for group in groups.values() for event in self._prefill(group)]

    @torch.no_grad()
    def begin(self, request: Request, positions: int) -> Request:
        """Run the first `positions` embeddings of a long request (fewer than all); return a request for the rest.

        Between two such pieces, `step` can be called for the running rows. Returns once they are computed, so that a
        caller can time it.
        """
        output = run_after_prefix(self.llm, request.prefix, request.embeds[None, :positions], keep_cache=True)
        output.last_hidden_state[0, -1, 0].item()  # a GPU would work on
        assert isinstance(output.past_key_values, DynamicCache)
        prefix = Prefix((), tuple((layer.keys, layer.values) for layer in output.past_key_values.layers))
        return replace(request, embeds=request.embeds[positions:], prefix=prefix)

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Feed each row its last token; return the event of each one's next."""
        assert self._slots is not None and self.rows, "step() needs rows: join() some first"
        lengths = torch.tensor([row.length for row in self.rows], device=self._device)  # (R,)
        tokens = torch.tensor([[row.token] for row in self.rows], device=self._device)  # (R, 1)
        mask = self._slots.open_column(len(self.rows), lengths)  # (R, columns in use + 1)
        output = decoder_of(self.llm)(
            inputs_embeds=embed(self.llm, tokens),
            attention_mask=mask,
            position_ids=lengths[:, None],  # a row of n tokens gets position n
            past_key_values=self._slots.cache,
            use_cache=True,
        )
        self._slots.close_column()
        for row in self.rows:
            row.length += 1
        return self._write(self.rows, output.last_hidden_state[:, -1])

    def leave(self, key: Hashable) -> None:
        """Remove a row before it is finished; unknown keys are ignored, as the row may just have ended."""
        row = next((row for row in self.rows if row.request.key == key), None)
        if row is not None:
            self._remove(row)

    @property
    def _device(self) -> torch.device:
        return self.llm.get_input_embeddings().weight.device

    @property
    def _widest(self) -> int:
        return max((row.length for row in self.rows), default=0)

    def _prefill(self, group: list[Request]) -> list[Event]:
        """Run requests of one prefix side by side, right-padded, and give them slots."""
        lengths = torch.tensor([len(request.embeds) for request in group], device=self._device)  # (R,)
        if not bool(lengths.all()):
            empty = next(request.key for request in group if not len(request.embeds))
            raise ValueError(f"request {empty!r}: has no embeddings; give at least one")
        prefix = group[0].prefix
        embeds = nn.utils.rnn.pad_sequence([request.embeds for request in group], batch_first=True)  # (R, L, D)
        output = run_after_prefix(self.llm, prefix, embeds, keep_cache=True)
        cache = output.past_key_values
        assert isinstance(cache, DynamicCache)

        # Copy each row's key/values, without the padding on the right, into its slot.
        before = len(prefix) if prefix else 0
        rows = [_Row(request, before + len(request.embeds)) for request in group]
        for row in rows:
            if row.request.decoding.temperature > 0:
                row.generator = torch.Generator().manual_seed(row.request.decoding.seed)
        self._slots = self._slots or BatchKVCache(len(cache.layers))
        self._slots.insert(cache, [row.length for row in rows], occupied=len(self), widest=self._widest)
        self.rows.extend(rows)

        # The state at each row's last token predicts its first answer token.
        last = output.last_hidden_state[torch.arange(len(group), device=self._device), lengths - 1]  # (R, D)
        return self._write(rows, last)

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
        for row in ended:  # after the loop, because `rows` may be `self.rows`
            self._remove(row)
        return events

    def _event(self, row: _Row, scores: Tensor, finish: str | None) -> Event:
        """The event of a row's new token, from its logits (V,)."""
        top_ids = top_logp = cache = None
        decoding = row.request.decoding
        if decoding.top_k_logprobs:
            top = (scores / decoding.top_k_temperature).log_softmax(dim=-1).topk(decoding.top_k_logprobs)
            top_ids, top_logp = top.indices.cpu(), top.values.cpu()
        if finish and row.request.keep_cache and self._slots is not None:
            cache = Prefix((), self._slots.copy_row(self._slot(row), row.length))
        return Event(row.request.key, row.token, finish, top_ids, top_logp, cache)

    def _slot(self, row: _Row) -> int:
        return next(slot for slot, other in enumerate(self.rows) if other is row)

    def _remove(self, row: _Row) -> None:
        """Free the row's slot; the last row moves into it."""
        assert self._slots is not None
        slot, last = self._slot(row), self.rows.pop()
        if last is not row:
            self.rows[slot] = last
        self._slots.remove(slot, last=len(self.rows), widest=self._widest)


def _sample(scores: Tensor, decoding: Decoding, generator: torch.Generator) -> int:
    """Temperature and nucleus sampling (Holtzman et al. 2020) on the CPU, with the row's own generator."""
    # Subtract the largest score: it becomes 0, and stays finite after division by a very small temperature.
    scores = scores.cpu().double()  # (V,)
    probabilities = ((scores - scores.max()) / decoding.temperature).softmax(dim=-1)
    if decoding.top_p < 1:
        # Keep the likeliest tokens that together reach top_p: drop a token if those before it reach it already.
        ordered, order = probabilities.sort(descending=True)
        outside = ordered.cumsum(dim=-1) - ordered >= decoding.top_p
        outside[0] = False  # keep one token even if top_p is smaller than rounding errors
        probabilities = probabilities.index_fill(0, order[outside], 0.0)
    return int(torch.multinomial(probabilities, 1, generator=generator))


# --- tokens to text ---------------------------------------------------------------------------------------
class TextStream:
    """The text of one answer while its tokens arrive. Incomplete characters and trailing white space are held back."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._start()
        self._space = ""  # white space that is dropped unless more text follows
        self._begun = False

    def push(self, token: int) -> str:
        """The text that this token completes; "" while a character is incomplete."""
        try:
            text = self._decoder.step(self._tokenizer.backend_tokenizer, token) or ""
        except Exception:  # an invalid byte token; some tokenizers then drop the bytes before it too
            self._start()
            text = self._decoder.step(self._tokenizer.backend_tokenizer, token) or ""
        self._ids.append(token)
        self._decoded += len(text)
        return self._trim(text)

    def close(self) -> str:
        """The text that is left at the end of the answer, incomplete characters included."""
        return self._trim(answer_text(self._tokenizer, self._ids)[self._decoded :])

    def _start(self) -> None:
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []  # tokens since the start
        self._decoded = 0  # characters that the decoder has returned for them

    def _trim(self, text: str) -> str:
        text = self._space + text
        text = text if self._begun else text.lstrip()
        certain = text.rstrip()
        self._space = text[len(certain) :]
        self._begun = self._begun or bool(certain)
        return certain


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of an answer's tokens, control tokens left out, spaces as they were written."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
