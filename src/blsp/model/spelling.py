"""How a token is spelled, as a second key to it: what makes words readable that were hardly ever heard.

In:  the strings of the read-out tokens; vectors of frames (B, S, D).
Out: (B, S, C) logits: how well the letters of each token fit what the frame heard.
Try: `letter_groups([" mailbox"])`
Flow: model/grounded.py adds these logits to those of the LLM's own embeddings.

An LLM's embedding says what a token means; what it sounds like has to be learnt token by token, and a token
that was heard three times is read out badly. Spelling is shared: "mailbox" is made of groups of letters that
"mail", "box" and a hundred other words have taught. So a token gets, beside its embedding, the sum of learned
vectors of its groups of one to three letters (as fastText makes word vectors; Bojanowski et al. 2017), whatever
its case; the beginning of a word, the end of a token and capitals are letters too.

Letters: B batch, S frames of the stack, D LLM width, K read-out tokens, C of them that are asked for, G groups a
token, W width of a group's vector.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from blsp.model.kept import Kept

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
