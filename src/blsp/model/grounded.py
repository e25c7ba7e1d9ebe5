"""The `grounded` adapter: speech read out over the LLM's own tokens, handed over as expected embeddings.

In:  encoder states (B, T, E), lengths, and the table (K-1, D) of the LLM's embeddings of the read-out tokens.
Out: `AdapterOutput` with CTC posteriors, the best path, and one vector a token instead of one a frame.
Try: `model.model.listen(states, lengths).readout`
Flow: encoder states → **CTC over the LLM's embeddings → expected embeddings** → the LLM.

A conv stack (and optionally a few transformer layers) gives a vector a frame; its logits are the products
with the LLM's frozen token embeddings (and with the tokens' spelling, see spelling.py), plus a learned blank
(class 0). Blank frames are dropped, runs of the same token are merged, and what the LLM receives for a run is
the mean, over the run's frames, of posterior · embeddings: exactly a token's embedding when the posterior is
one-hot. Which frames form a run is an argmax and carries no gradient; the posteriors inside a run do, so step
2 trains through them while a CTC term keeps the segmentation in shape.

Letters: B batch, T encoder frames, S frames after the stack (= places), E encoder width, H hidden width,
D LLM width, K classes (blank + read-out tokens), N runs (vectors) of a clip, F frames that are not blank.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from blsp.llm.language_model import valid_mask
from blsp.model.adapter import AdapterOutput, ConvStack

if TYPE_CHECKING:
    from blsp.model.modeling_blsp import BlspModel

BLANK = 0
NEGLIGIBLE = 1e-6  # of a frame's best posterior: what is less moves no vector by a thousandth of its length


class GroundedAdapter(nn.Module):
    """Conv stack + transformer layers, read out by CTC over the LLM's token embeddings.

    Args:
        strides: of the convolutions, three at most; (2, 2, 1) reads out at 12.5 frames/s.
        hidden: width H of the convolutions and layers (default: the encoder's).
        layers: transformer layers after the convolutions.
        spelling: width of the vectors that spell a token; 0 reads out by the LLM's embeddings alone.
        scale: first value of the learned factor on the logits.
        embedding_std: first gain of the last LayerNorm: vectors start at the size of the LLM's embeddings.
        classes: K - 1, the size of the read-out vocabulary (a learned bias a class).
    """

    def __init__(
        self,
        speech_width: int,
        text_width: int,
        *,
        classes: int,
        strides: tuple[int, ...] = (2, 2, 1),
        hidden: int | None = None,
        layers: int = 0,
        spelling: int = 0,
        bottleneck: int = 512,
        dropout: float = 0.0,
        scale: float = 10.0,
        embedding_std: float = 1.0,
    ) -> None:
        super().__init__()
        hidden = hidden or speech_width
        last = hidden if layers else text_width
        self.stack = ConvStack([speech_width, hidden, hidden, last], list(strides))
        self.layers = nn.ModuleList(_ContextLayer(hidden, dropout) for _ in range(layers))
        self.project = nn.Linear(hidden, text_width) if layers else nn.Identity()
        self.down = nn.Linear(text_width, bottleneck, bias=False)
        self.up = nn.Linear(bottleneck, text_width, bias=False)
        self.norm = nn.LayerNorm(text_width)
        nn.init.constant_(self.norm.weight, embedding_std)
        self.scale = nn.Parameter(torch.tensor(float(scale)))
        self.bias = nn.Parameter(torch.zeros(classes))
        self.blank = nn.Linear(text_width, 1)
        self._wide, self._lengths = Kept(), Kept()  # of the table's rows
        self.spelling = Spelling(classes, text_width, spelling) if spelling else None

    def num_audio_tokens(self, frames: int) -> int:
        return self.stack.num_audio_tokens(frames)

    def forward(self, states: Tensor, lengths: Tensor, table: Tensor) -> AdapterOutput:
        """states (B, T, E), lengths (B,), table (K-1, D) -> `AdapterOutput`."""
        if table.dtype != states.dtype:  # an LLM in bfloat16: its table is made wide once, not for every clip
            table = self._wide.of(lambda rows: rows.to(states.dtype), table)
        log_probs, lengths = self.posteriors(states, lengths, table)
        return read_out(log_probs, lengths, table)

    def posteriors(self, states: Tensor, lengths: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """CTC log-probabilities (B, S, K), blank first, and lengths (B,) in frames of the stack."""
        hidden, lengths = self.frames(states, lengths)
        return self.logits(hidden, table).log_softmax(dim=-1), lengths

    def frames(self, states: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """A vector a frame (B, S, D), to be compared with the LLM's embeddings, and lengths (B,)."""
        hidden, lengths = self.stack(states, lengths)
        if self.layers:
            mask = valid_mask(lengths, hidden.shape[1])
            for layer in self.layers:
                hidden = layer(hidden, mask)
        hidden = self.project(hidden)
        return self.norm(hidden + self.up(nn.functional.gelu(self.down(hidden)))), lengths

    def logits(self, hidden: Tensor, table: Tensor, tokens: Tensor | None = None) -> Tensor:
        """(B, S, D) -> (B, S, K), blank first; with `tokens`, of these rows (N,) of the table alone: (B, S, 1 + N)."""
        bias = self.bias if tokens is None else self.bias[tokens]
        rows = table if tokens is None else table[tokens]
        lengths = self._lengths.of(_lengths, rows) if tokens is None else _lengths(rows)
        logits = (hidden @ rows.to(hidden.dtype).T) * (self.scale / lengths).to(hidden.dtype) + bias
        if self.spelling is not None:
            logits = logits + self.spelling(hidden, tokens)
        return torch.cat([self.blank(hidden), logits], dim=-1)


def _lengths(table: Tensor) -> Tensor:
    """(K-1, D) -> (K-1,): Euclidean lengths, none of them zero."""
    return torch.linalg.vector_norm(
        table, dim=-1, dtype=torch.promote_types(table.dtype, torch.float32)
    ).clamp(min=1e-12)


class _ContextLayer(nn.Module):
    """Pre-norm self-attention with rotary positions, then a GELU MLP: (B, S, H) -> (B, S, H)."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.heads = width // 64 if width % 64 == 0 else 1
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.dropout = dropout

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm_attention(hidden)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        query, key, value = (_rotate(query), _rotate(key), value.transpose(1, 2))
        mixed = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask[:, None, None, :]
        )
        hidden = hidden + self._drop(self.out(mixed.transpose(1, 2).flatten(2)))
        return hidden + self._drop(self.down(nn.functional.gelu(self.up(self.norm_mlp(hidden)))))

    def _drop(self, update: Tensor) -> Tensor:
        return nn.functional.dropout(update, self.dropout, self.training)


def _rotate(states: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021, eq. 34): (B, S, heads, d) -> (B, heads, S, d)."""
    states = states.transpose(1, 2)
    half = states.shape[-1] // 2
    frequencies = 10000.0 ** (-torch.arange(half, device=states.device, dtype=states.dtype) / half)
    angles = torch.arange(states.shape[-2], device=states.device, dtype=states.dtype)[:, None] * frequencies
    first, second = states[..., :half], states[..., half : 2 * half]
    turned = [first * angles.cos() - second * angles.sin(), first * angles.sin() + second * angles.cos()]
    return torch.cat([*turned, states[..., 2 * half :]], dim=-1)


def read_out(log_probs: Tensor, lengths: Tensor, table: Tensor) -> AdapterOutput:
    """Best path of the posteriors (B, S, K): drop blanks, merge runs, expected embedding of each run.

    A clip in which every frame is blank is the no-speech case: `speech` is False, the read-out empty, and
    the vector of the frame that comes nearest to a token stands in for it, so that every clip has one.
    """
    width = log_probs.shape[1]
    inside = valid_mask(lengths, width)
    best = log_probs.argmax(dim=-1).masked_fill(~inside, BLANK)  # (B, S)
    spoken = best != BLANK
    speech = spoken.any(dim=1)
    spoken = spoken | _stand_in(log_probs, inside) & ~speech[:, None]
    changed = torch.ones_like(spoken)
    changed[:, 1:] = (best[:, 1:] != best[:, :-1]) | ~spoken[:, :-1]
    starts = spoken & changed
    runs = starts.cumsum(dim=1) - 1  # (B, S) index of the run a spoken frame belongs to
    vectors = _run_means(log_probs, table, spoken, runs)
    counts = starts.sum(dim=1)
    # one-hot best classes -> read-out indices; the caller maps them to the LLM's ids
    paths = [(row[start] - 1).tolist() for row, start in zip(best, starts & (best != BLANK), strict=True)]
    valid = valid_mask(counts, width)
    return AdapterOutput(vectors, lengths, valid, speech, log_probs=log_probs, readout=paths)


def _stand_in(log_probs: Tensor, inside: Tensor) -> Tensor:
    """(B, S) bool: each row's frame with the least blank."""
    nearest = log_probs[..., BLANK].masked_fill(~inside, torch.inf).argmin(dim=1)
    return nn.functional.one_hot(nearest, log_probs.shape[1]).bool()


def _run_means(log_probs: Tensor, table: Tensor, spoken: Tensor, runs: Tensor) -> Tensor:
    """(B, S, D): the mean over each run's frames of (posterior without blank) · table; zero past the last run.

    To a frame counts what it finds likely, so a few hundred rows of the table are read instead of all.
    """
    batch, width = spoken.shape
    tokens = log_probs[spoken][:, 1:]  # (F, K-1)
    likely = tokens >= tokens.amax(dim=-1, keepdim=True) + math.log(NEGLIGIBLE)
    read = likely.any(dim=0).nonzero()[:, 0]  # what is likely to some frame
    posterior = tokens[:, read].masked_fill(~likely[:, read], -math.inf).softmax(dim=-1)  # without blank
    expected = posterior @ table[read].to(posterior.dtype)  # (F, D)
    slots = (runs + torch.arange(batch, device=runs.device)[:, None] * width)[spoken]  # (F,)
    sums = expected.new_zeros(batch * width, table.shape[1]).index_add(0, slots, expected)
    counts = expected.new_zeros(batch * width).index_add(
        0, slots, torch.ones_like(slots, dtype=expected.dtype)
    )
    return (sums / counts.clamp(min=1)[:, None]).unflatten(0, (batch, width))


BUCKETS = 8192  # groups are numbered by a hash; 0 is no group
GROUPS = 24  # of a token, the longest first: all of a word of seven letters
LONGEST = 3  # letters in a group
SPACE_MARKS = ("Ġ", "▁", " ")  # how tokenizers write the space before a word


class Spelling(nn.Module):
    """Logits of tokens by their letters; `groups` (K, G) is part of the adapter's tensors."""

    groups: Tensor

    def __init__(self, classes: int, text_width: int, width: int) -> None:
        super().__init__()
        self.register_buffer("groups", torch.zeros(classes, GROUPS, dtype=torch.int16))
        self.letters = nn.Embedding(BUCKETS, width, padding_idx=0)
        nn.init.normal_(self.letters.weight, std=0.3)
        self.query = nn.Linear(text_width, width)
        self._keys = Kept()

    def forward(self, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
        """(B, S, D) -> (B, S, C), of the tokens (C,) or of all."""
        keys = self.keys() if tokens is None else _spell(self.groups[tokens], self.letters.weight)
        return self.query(hidden) @ keys.to(hidden.dtype).T

    def train(self, mode: bool = True) -> Spelling:
        """As ever; kept keys go, since a fused optimiser changes weights without a change of their version."""
        self._keys = Kept()
        return super().train(mode)

    def keys(self) -> Tensor:
        """(K, W): all tokens' spelling; kept between calls where nothing is learnt."""
        return self._keys.of(_spell, self.groups, self.letters.weight)


def _spell(groups: Tensor, letters: Tensor) -> Tensor:
    """(C, G), (BUCKETS, W) -> (C, W): the groups' vectors summed, at one size whatever their number."""
    count = (groups != 0).sum(dim=1, keepdim=True).clamp(min=1)
    total = nn.functional.embedding_bag(groups.long(), letters, mode="sum", padding_idx=0)
    return total / count.sqrt()


def letter_groups(tokens: Sequence[str]) -> Tensor:
    """(K, G) int16: the groups of letters of each token, zeros behind them."""
    table = torch.zeros(len(tokens), GROUPS, dtype=torch.int16)
    for row, token in enumerate(tokens):
        numbers = [1 + zlib.crc32(group.encode()) % (BUCKETS - 1) for group in _groups(token)][:GROUPS]
        table[row, : len(numbers)] = torch.tensor(numbers, dtype=torch.int16)
    return table


def _groups(token: str) -> Iterator[str]:
    word = token.strip()
    if word != word.lower():
        yield "<capitals>" if len(word) > 1 and word == word.upper() else "<Capital>"
    letters = ("^" if token.startswith(" ") else "+") + word.lower() + "$"
    for size in range(LONGEST, 0, -1):
        yield from (letters[at : at + size] for at in range(len(letters) - size + 1))


def token_strings(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token, a space before it where it begins a word."""
    strings = []
    for raw in tokenizer.convert_ids_to_tokens(list(ids)):
        begins = raw is not None and raw.startswith(SPACE_MARKS)
        text = tokenizer.convert_tokens_to_string([raw]).strip() if raw is not None else ""
        strings.append(" " + text if begins else text)
    return strings


class Kept:
    """What was worked out from a few tensors, until one of them changes."""

    def __init__(self) -> None:
        self._sources: tuple[Tensor, ...] = ()
        self._state: list[tuple[int, int]] = []
        self._value: Tensor | None = None

    def of(self, work_out: Callable[..., Tensor], *sources: Tensor) -> Tensor:
        """`work_out(*sources)`; not again while they are as they were. Where one is learnt, nothing is kept."""
        if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
            return work_out(*sources)
        state = [(source.data_ptr(), source._version) for source in sources]
        same = len(sources) == len(self._sources) and all(map(is_, sources, self._sources))
        if self._value is None or not same or state != self._state:
            self._sources, self._state = sources, state
            self._value = work_out(*sources).detach()
        return self._value


StringsOf = Callable[[Sequence[int]], list[str]]


def spell_readout(model: BlspModel, strings_of: StringsOf) -> None:
    """Tell the adapter how the read-out tokens are spelled; nothing to tell one that does not ask."""
    spelling = getattr(model.multi_modal_projector, "spelling", None)
    if spelling is not None:
        ids = model.config.readout_vocabulary or range(model.config.text_config.vocab_size)
        spelling.groups = letter_groups(strings_of(list(ids))).to(spelling.groups.device)


def widen_readout(model: BlspModel, tokens: Iterable[int], strings_of: StringsOf) -> None:
    """Add LLM tokens to what is read out; a new token's bias begins at the mean of the others'."""
    known = model.config.readout_vocabulary
    vocabulary = sorted({*(known or ()), *tokens})
    if known is None or len(vocabulary) == len(known):
        return
    adapter: Any = model.multi_modal_projector
    bias = adapter.bias.new_full((len(vocabulary),), float(adapter.bias.detach().mean()))
    place = {token: index for index, token in enumerate(vocabulary)}
    bias[[place[token] for token in known]] = adapter.bias.detach()
    adapter.bias = nn.Parameter(bias)
    whole = len(vocabulary) == model.config.text_config.vocab_size
    model.config.readout_vocabulary = None if whole else vocabulary
    spell_readout(model, strings_of)
