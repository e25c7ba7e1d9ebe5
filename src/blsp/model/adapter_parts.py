"""Parts that adapters share: their output, the convolution stack, and a cache for values of frozen tensors.

In:  encoder states (B, T, E) and their lengths (B,).
Out: `AdapterOutput` for a batch, `AudioEmbeds` for one clip of it.
Try: `plain_output(torch.zeros(2, 9, 64), torch.tensor([9, 4])).valid`
Flow: speech_encoder.py → **adapter_parts.py** in adapter.py and grounded.py → modeling_blsp.py

Shapes: B clips, T encoder frames, S audio tokens, E encoder width, D LLM width, K read-out classes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from blsp.llm.language_model import valid_mask

BLANK = 0  # the CTC class "no token here"; class 1 + i is row i of the read-out table
IMPOSSIBLE = -1e30  # log-probability of an impossible CTC path; finite, so that no gradient becomes NaN


@dataclass(frozen=True)
class AdapterOutput:
    """The result of an adapter for a batch of clips.

    vectors (B, S, D): embeddings for the LLM, zero where invalid; the valid ones of a row come first.
    num_audio_tokens (B,): placeholders of each clip, a function of its length alone.
    valid (B, S): True where there is a vector; at least one a row.
    plain: whether there is one for every audio token, so that nobody has to look.
    speech (B,): False where no speech was found (only an adapter that reads out can tell).
    log_probs (B, S, K): CTC log-probabilities, blank first, of an adapter that reads out.
    readout: for each clip the best CTC path: rows of the read-out table, later the LLM's token ids.
    """

    vectors: Tensor
    num_audio_tokens: Tensor
    valid: Tensor
    speech: Tensor
    log_probs: Tensor | None = None
    readout: list[list[int]] | None = None
    plain: bool = False


@dataclass(frozen=True)
class Hypothesis:
    """A possible transcript in the LLM's tokens, and its log-probability over all CTC paths."""

    tokens: tuple[int, ...]
    log_prob: float


@dataclass(frozen=True)
class AudioEmbeds:
    """One clip as the LLM gets it: the valid vectors (n, D), and the read-out if the adapter has one.

    hypotheses: possible transcripts, best first, if requested.
    states: of the encoder, (T, E), if requested.
    """

    vectors: Tensor
    num_audio_tokens: int
    speech: bool
    token_ids: list[int] | None = None
    hypotheses: tuple[Hypothesis, ...] = ()
    states: Tensor | None = None


def num_audio_tokens(frames: Any, strides: Sequence[int]) -> Any:
    """Audio tokens of a clip of `frames` encoder frames (an int, or an array of them); each stride rounds up.

    num_audio_tokens(100, [2, 2, 2]) is 13: 100 → 50 → 25 → 13.
    """
    for stride in strides:
        frames = -(-frames // stride)
    return frames


def place_centres(adapter: Any) -> tuple[int, float]:
    """Encoder frames from one audio token to the next, and the encoder frame at the centre of the first.

    Without `first_centre`, an audio token is assumed to cover only its own frames: 8 of them have their centre at 3.5.
    """
    frames = math.prod(adapter.strides)
    return frames, getattr(adapter, "first_centre", (frames - 1) / 2)


def plain_output(hidden: Tensor, lengths: Tensor) -> AdapterOutput:
    """The output of an adapter that gives a vector for every audio token and cannot tell clips without speech.

    hidden (B, S, D), lengths (B,) in audio tokens.
    """
    valid = valid_mask(lengths, hidden.shape[1])  # (B, S)
    return AdapterOutput(
        hidden * valid[:, :, None],
        num_audio_tokens=lengths,
        valid=valid,
        speech=torch.ones_like(lengths, dtype=torch.bool),
        plain=True,
    )


class ConvStack(nn.Module):
    """Convolutions (kernel 5, padding 2), each followed by a GLU. Padding is set to zero between them."""

    def __init__(self, widths: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        self.strides = list(strides)
        self.convs = nn.ModuleList(
            nn.Conv1d(width, 2 * following, kernel_size=5, stride=stride, padding=2)
            for width, following, stride in zip(widths, widths[1:], strides, strict=False)
        )

    def forward(self, states: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, E), (B,) -> (B, S, D'), (B,)."""
        # the kernel must not mix the padding behind a clip into the clip's last frames
        hidden = (states * valid_mask(lengths, states.shape[1])[:, :, None]).transpose(1, 2)  # (B, E, T)
        for conv, stride in zip(self.convs, self.strides, strict=True):
            lengths = (lengths + stride - 1) // stride
            hidden = nn.functional.glu(conv(hidden), dim=1)  # half of the channels gate the other half
            hidden = hidden * valid_mask(lengths, hidden.shape[2])[:, None, :]
        return hidden.transpose(1, 2).contiguous(), lengths  # vLLM's linear layers need contiguous input


class CachedValue:
    """One value computed from a few tensors; it is computed again only if one of them has changed."""

    def __init__(self) -> None:
        self._sources: tuple[Tensor, ...] = ()
        self._state: list[tuple[Any, ...]] = []
        self._value: Any = None

    def get(self, compute: Callable[..., Any], *sources: Tensor) -> Any:
        """`compute(*sources)`, or its last result. While a source is being trained, nothing is stored."""
        if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
            return compute(*sources)
        # a tensor's version counts in-place changes; its address changes if it is moved or converted
        state = [(source.data_ptr(), source._version, source.dtype) for source in sources]
        same = len(sources) == len(self._sources) and all(map(is_, sources, self._sources))
        if self._value is None or not same or state != self._state:
            value = compute(*sources)
            self._value = value.detach() if isinstance(value, Tensor) else value
            self._sources, self._state = sources, state
        return self._value
