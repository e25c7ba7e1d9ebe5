"""The `grounded` adapter: CTC over the LLM's own tokens; the LLM gets the expected embeddings of what is read out.

In:  encoder states (B, T, E), lengths (B,), and the table (K-1, D): the LLM's embeddings of the read-out tokens.
Out: `AdapterOutput` with CTC log-probabilities, the best path, and one vector a token instead of one a frame.
Try: `model.model.listen(states, lengths).readout`
Flow: encoder states → **CTC over the LLM's embeddings → expected embeddings** → the LLM.

A convolution stack, and optional transformer layers, compute a vector for each frame. Its logits are its products
with the LLM's frozen token embeddings (and with vectors that spell the tokens), plus a learned blank (class 0).
Then, for each clip:

    frame              0      1      2      3      4      5      6
    likeliest class    blank  the    the    blank  cat    cat    blank
    run                       0      0             1      1
    vectors            mean of frames 1, 2; mean of frames 4, 5

Frames of blank are dropped, and a run of the same token becomes one vector: the mean of posterior · embeddings over
the run's frames. If the posterior is one-hot, this is exactly the token's embedding. Gradients of step 2 go through
the posteriors inside a run. Which frames form a run is an argmax without gradient; a CTC term keeps the runs right.

LegoSLM (2505.11352) also multiplies CTC posteriors with the LLM's embeddings, but learns a separate output layer.

Shapes: B clips, T encoder frames, S frames after the stack (= audio tokens), E encoder width, H hidden width,
D LLM width, K classes (blank + read-out tokens), F frames of a batch that are not blank, G letter groups.
"""

import math
import zlib
from collections.abc import Iterator, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from blsp.llm.language_model import valid_mask
from blsp.model.adapter_parts import BLANK, AdapterOutput, CachedValue, ConvStack

# tokens below this share of a frame's best posterior are left out: together they change the vector by less than a
# thousandth of its length
NEGLIGIBLE = 1e-6
PIECE = 256  # frames (20 s) whose log-probabilities are computed at a time outside training


class GroundedAdapter(nn.Module):
    """Convolution stack and transformer layers, read out by CTC over the LLM's token embeddings.

    Args:
        classes: K - 1, the size of the read-out vocabulary (each class has a learned bias).
        strides: of the convolutions, at most three; (2, 2, 1) gives 12.5 frames/s.
        hidden: width H of the convolutions and layers (default: the encoder's).
        layers: number of transformer layers after the convolutions.
        spelling: width of the vectors that spell a token; 0: logits from the LLM's embeddings only.
        scale: first value of the learned factor on the logits.
        embedding_std: first gain of the last LayerNorm, so that vectors start with the size of the LLM's embeddings.
        table_width: width of a separate frozen read-out table instead of the LLM's embeddings (`blsp move`).
    """

    table: Tensor | None
    reads_out: ClassVar[bool] = True
    first_centre: ClassVar[float] = 0.0  # as in ConvAdapter

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
        table_width: int | None = None,
    ) -> None:
        super().__init__()
        self.strides = list(strides)
        hidden = hidden or speech_width
        width = table_width or text_width
        last = hidden if layers else width
        self.stack = ConvStack([speech_width, hidden, hidden, last], self.strides)
        self.layers = nn.ModuleList(_ContextLayer(hidden, dropout) for _ in range(layers))
        self.project = nn.Linear(hidden, width) if layers else nn.Identity()
        self.down = nn.Linear(width, bottleneck, bias=False)
        self.up = nn.Linear(bottleneck, width, bias=False)
        self.norm = nn.LayerNorm(width)
        nn.init.constant_(self.norm.weight, embedding_std)
        self.scale = nn.Parameter(torch.tensor(float(scale)))
        self.bias = nn.Parameter(torch.zeros(classes))
        self.blank = nn.Linear(width, 1)
        self.register_buffer("table", torch.zeros(classes, width) if table_width else None)
        self._table, self._norms = CachedValue(), CachedValue()  # of the table, which is frozen
        self.spelling = Spelling(classes, width, spelling) if spelling else None

    def forward(self, states: Tensor, lengths: Tensor, table: Tensor) -> AdapterOutput:
        """states (B, T, E), lengths (B,), table (K-1, D) -> `AdapterOutput`."""
        if table.dtype != states.dtype:  # an LLM in bfloat16: convert its table once, not for every clip
            table = self._table.get(lambda rows: rows.to(states.dtype), table)
        log_probs, lengths = self.posteriors(states, lengths, table)
        return read_out(log_probs, lengths, table)

    def posteriors(self, states: Tensor, lengths: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """CTC log-probabilities (B, S, K), blank first, and lengths (B,) in frames of the stack."""
        hidden, lengths = self.hidden_states(states, lengths)
        width = hidden.shape[1]
        if torch.is_grad_enabled() or width <= PIECE:
            return self.logits(hidden, table).log_softmax(dim=-1), lengths
        # ten minutes have S = 7,500 frames, and K is tens of thousands: compute the temporary tensors piece by piece
        log_probs = (
            self.logits(hidden[:, :1], table).log_softmax(dim=-1).new_empty(len(hidden), width, 1 + self.bias.numel())
        )
        for frames, piece in zip(log_probs.split(PIECE, dim=1), hidden.split(PIECE, dim=1), strict=True):
            frames.copy_(self.logits(piece, table).log_softmax(dim=-1))
        return log_probs, lengths

    def hidden_states(self, states: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """A vector for each frame (B, S, D), to be multiplied with the LLM's embeddings, and lengths (B,)."""
        hidden, lengths = self.stack(states, lengths)  # (B, S, H), or (B, S, D) without layers
        if self.layers:
            mask = valid_mask(lengths, hidden.shape[1])
            for layer in self.layers:
                hidden = layer(hidden, mask)
        hidden = self.project(hidden)  # (B, S, D)
        return self.norm(hidden + self.up(nn.functional.gelu(self.down(hidden)))), lengths

    def logits(self, hidden: Tensor, table: Tensor, tokens: Tensor | None = None) -> Tensor:
        """(B, S, D) -> (B, S, K), blank first. With `tokens`, only of these N rows of the table: (B, S, 1 + N)."""
        table = table if self.table is None else self.table
        bias = self.bias if tokens is None else self.bias[tokens]
        rows = table if tokens is None else table[tokens]
        norms = self._norms.get(_norms, rows) if tokens is None else _norms(rows)
        # embeddings are scaled to length 1: otherwise tokens with long embeddings would be likelier
        logits = (hidden @ rows.to(hidden.dtype).T) * (self.scale / norms).to(hidden.dtype) + bias
        if self.spelling is not None:
            logits = logits + self.spelling(hidden, tokens)
        return torch.cat([self.blank(hidden), logits], dim=-1)

    def spell(self, strings: Sequence[str]) -> None:
        """Store the spelling of the read-out tokens, in the order of the table's rows."""
        if self.spelling is not None:
            self.spelling.groups = letter_groups(strings).to(self.bias.device)

    def widen(self, rows: Sequence[int], strings: Sequence[str]) -> None:
        """Read out more tokens: the i-th old token becomes row rows[i] of a table of len(strings) tokens.

        A new token's bias starts at the mean of the others. In a separate table, a new row is zero: the token is
        recognised by its spelling only.
        """
        if self.table is not None:
            wider = self.table.new_zeros(len(strings), self.table.shape[1])
            wider[list(rows)] = self.table
            self.table = wider
        bias = self.bias.new_full((len(strings),), float(self.bias.detach().mean()))
        bias[list(rows)] = self.bias.detach()
        self.bias = nn.Parameter(bias)
        self.spell(strings)

    @torch.no_grad()
    def move_from(self, old: "GroundedAdapter", rows: Tensor, table: Tensor) -> None:
        """Take over the weights of `old`, the adapter of another LLM.

        rows (K-1,): the old adapter's row of each token that this one reads out; table (K-1, W): the embeddings that
        the old LLM has for these tokens. The logits do not change, as they are still products with this table. The
        vectors become expected embeddings of this adapter's LLM.
        """
        changed = {"table": table if old.table is None else old.table[rows], "bias": old.bias[rows]}
        if old.spelling is not None:
            changed["spelling.groups"] = old.spelling.groups[rows]
        kept = {name: weight for name, weight in old.state_dict().items() if name != "vocabulary"}
        self.load_state_dict(self.state_dict() | kept | changed)  # the vocabulary stays the new LLM's


def _norms(table: Tensor) -> Tensor:
    """(K-1, D) -> (K-1,): Euclidean lengths, none of them zero."""
    return torch.linalg.vector_norm(table, dim=-1, dtype=torch.promote_types(table.dtype, torch.float32)).clamp(
        min=1e-12
    )


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
        # (B, S, 3 H) -> three times (B, S, heads, d) -> (B, heads, S, d)
        query, key, value = self.qkv(self.norm_attention(hidden)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        query, key, value = (_rotate(query), _rotate(key), value.transpose(1, 2))
        # no frame attends to the padding behind its clip
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None, :])
        hidden = hidden + self._drop(self.out(mixed.transpose(1, 2).flatten(2)))
        return hidden + self._drop(self.down(nn.functional.gelu(self.up(self.norm_mlp(hidden)))))

    def _drop(self, update: Tensor) -> Tensor:
        return nn.functional.dropout(update, self.dropout, self.training)


def _rotate(states: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021, eq. 34): (B, S, heads, d) -> (B, heads, S, d).

    Component i of the first half and component i of the second half are a point in a plane; at position p it is
    rotated by the angle p · 10000^(-i / half).
    """
    states = states.transpose(1, 2)
    half = states.shape[-1] // 2
    frequencies = 10000.0 ** (-torch.arange(half, device=states.device, dtype=states.dtype) / half)
    angles = torch.arange(states.shape[-2], device=states.device, dtype=states.dtype)[:, None] * frequencies
    first, second = states[..., :half], states[..., half : 2 * half]
    turned = [first * angles.cos() - second * angles.sin(), first * angles.sin() + second * angles.cos()]
    return torch.cat([*turned, states[..., 2 * half :]], dim=-1)


def read_out(log_probs: Tensor, lengths: Tensor, table: Tensor) -> AdapterOutput:
    """Best path of log_probs (B, S, K): drop blanks, merge runs, take the expected embedding of each run.

    If every frame is blank, there is no speech: `speech` is False and the read-out is empty. The frame with the
    lowest blank probability then gives the only vector, as every clip must have one.
    """
    width = log_probs.shape[1]
    inside = valid_mask(lengths, width)
    best = log_probs.argmax(dim=-1).masked_fill(~inside, BLANK)  # (B, S)
    spoken = best != BLANK  # (B, S)
    speech = spoken.any(dim=1)  # (B,)
    spoken = spoken | _least_blank(log_probs, inside) & ~speech[:, None]

    # a run starts at a spoken frame whose class differs from the frame before it, or that follows a blank
    #     best    0 7 7 0 7 4 4      spoken  . x x . x x x
    #     starts  . x . . x x .      runs    . 0 0 . 1 2 2
    changed = torch.ones_like(spoken)
    changed[:, 1:] = (best[:, 1:] != best[:, :-1]) | ~spoken[:, :-1]
    starts = spoken & changed
    runs = starts.cumsum(dim=1) - 1  # (B, S)
    vectors = _run_means(log_probs, table, spoken, runs)  # (B, S, D)
    counts = starts.sum(dim=1)  # (B,) runs of each clip

    # class 1 + i is row i of the table; the vector of a clip without speech is not part of the read-out
    paths = [(row[start] - 1).tolist() for row, start in zip(best, starts & (best != BLANK), strict=True)]
    valid = valid_mask(counts, width)
    return AdapterOutput(vectors, lengths, valid, speech, log_probs=log_probs, readout=paths)


def _least_blank(log_probs: Tensor, inside: Tensor) -> Tensor:
    """(B, S) bool: True at the frame of each row with the lowest blank probability."""
    frame = log_probs[..., BLANK].masked_fill(~inside, torch.inf).argmin(dim=1)
    return nn.functional.one_hot(frame, log_probs.shape[1]).bool()


def _run_means(log_probs: Tensor, table: Tensor, spoken: Tensor, runs: Tensor) -> Tensor:
    """(B, S, D): the mean over each run's frames of (posterior without blank) · table; zero after the last run.

    Tokens that are unlikely in every frame are left out, so only a few hundred rows of the table are read.
    """
    batch, width = spoken.shape
    tokens = log_probs[spoken][:, 1:]  # (F, K-1)
    likely = tokens >= tokens.amax(dim=-1, keepdim=True) + math.log(NEGLIGIBLE)
    rows = likely.any(dim=0).nonzero()[:, 0]  # tokens that are likely in some frame
    # softmax of the likely ones: the posterior given that the frame is not blank; it sums to 1
    posterior = tokens[:, rows].masked_fill(~likely[:, rows], -math.inf).softmax(dim=-1)
    expected = posterior @ table[rows].to(posterior.dtype)  # (F, D)

    # run r of clip b is row b · S + r of a flat table; add up its frames there and divide by their number
    index = (runs + torch.arange(batch, device=runs.device)[:, None] * width)[spoken]  # (F,)
    sums = expected.new_zeros(batch * width, table.shape[1]).index_add(0, index, expected)
    counts = expected.new_zeros(batch * width).index_add(0, index, torch.ones_like(index, dtype=expected.dtype))
    return (sums / counts.clamp(min=1)[:, None]).unflatten(0, (batch, width))


# --- spelling: tokens with the same letters share what is learnt about their sound -------------------------

BUCKETS = 8192  # letter groups are numbered by a hash; number 0 is no group
GROUPS = 24  # letter groups of a token, the longest first: enough for all groups of a word of seven letters
LONGEST = 3  # letters in a group
SPACE_MARKS = ("Ġ", "▁", " ")  # how tokenizers write the space before a word


class Spelling(nn.Module):
    """Logits of tokens by their letters; `groups` (K-1, G) is saved with the adapter's weights."""

    groups: Tensor

    def __init__(self, classes: int, text_width: int, width: int) -> None:
        super().__init__()
        self.register_buffer("groups", torch.zeros(classes, GROUPS, dtype=torch.int16))
        self.letters = nn.Embedding(BUCKETS, width, padding_idx=0)
        nn.init.normal_(self.letters.weight, std=0.3)
        self.query = nn.Linear(text_width, width)
        self._keys = CachedValue()

    def forward(self, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
        """(B, S, D) -> (B, S, N): logits of N rows of the table, `tokens` (N,), or of all."""
        keys = self.keys() if tokens is None else _spell(self.groups[tokens], self.letters.weight)
        return self.query(hidden) @ keys.to(hidden.dtype).T

    def train(self, mode: bool = True) -> Self:
        """Switch the mode and drop cached keys: a fused optimiser changes weights without a new version number."""
        self._keys = CachedValue()
        return super().train(mode)

    def keys(self) -> Tensor:
        """(K-1, W): the spelling vectors of all tokens; cached outside training."""
        return self._keys.get(_spell, self.groups, self.letters.weight)


def _spell(groups: Tensor, letters: Tensor) -> Tensor:
    """(N, G), (BUCKETS, W) -> (N, W): the sum of each token's letter groups, divided by the root of their number."""
    count = (groups != 0).sum(dim=1, keepdim=True).clamp(min=1)
    total = nn.functional.embedding_bag(groups.long(), letters, mode="sum", padding_idx=0)
    return total / count.sqrt()


def letter_groups(tokens: Sequence[str]) -> Tensor:
    """(K-1, G) int16: the numbers of each token's letter groups, filled up with zeros."""
    table = torch.zeros(len(tokens), GROUPS, dtype=torch.int16)
    for row, token in enumerate(tokens):
        numbers = [1 + zlib.crc32(group.encode()) % (BUCKETS - 1) for group in _groups(token)][:GROUPS]
        table[row, : len(numbers)] = torch.tensor(numbers, dtype=torch.int16)
    return table


def _groups(token: str) -> Iterator[str]:
    """The letter groups of a token: " Box" has <Capital>, ^bo, box, ox$, ^b, bo, ox, x$, ^, b, o, x, $."""
    word = token.strip()
    if word != word.lower():
        yield "<capitals>" if len(word) > 1 and word == word.upper() else "<Capital>"
    letters = ("^" if token.startswith(" ") else "+") + word.lower() + "$"
    for size in range(LONGEST, 0, -1):
        yield from (letters[at : at + size] for at in range(len(letters) - size + 1))


def token_strings(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token, with a space before it if it begins a word."""
    strings = []
    for raw in tokenizer.convert_ids_to_tokens(list(ids)):
        begins = raw is not None and raw.startswith(SPACE_MARKS)
        text = tokenizer.convert_tokens_to_string([raw]).strip() if raw is not None else ""
        strings.append(" " + text if begins else text)
    return strings
