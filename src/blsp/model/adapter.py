"""The modality adapter: the only thing that is trained.

In:  encoder states (B, T, E) at 50 frames/s and their lengths.
Out: `AdapterOutput`: vectors in the LLM's embedding space (B, S, D), S a function of T alone.
Try: `build_adapter(config)(states, lengths, table)`
Flow: encoder states → **vectors** → the LLM.

`conv` is the paper's (§2.2 and its released code): three strided convolutions with GLU, a bottleneck and a
LayerNorm, 6.25 vectors/s. `stack` joins neighbouring frames and applies a SwiGLU MLP, as most later systems
do. `grounded` (grounded.py) reads the conv stack out over the LLM's own tokens.

Letters: B batch, T encoder frames, S places, E encoder width, D LLM width, K read-out classes (blank first).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blsp.llm.language_model import valid_mask


@dataclass(frozen=True)
class AdapterOutput:
    """What an adapter makes of a batch of clips.

    vectors (B, S, D): zero where invalid; the valid ones of a row come first.
    places (B,): how many placeholders each clip takes: a function of its length alone.
    valid (B, S): which places hold a vector; at least one a row.
    speech (B,): False where no speech was found (only `grounded` can tell).
    log_probs (B, S, K), readout: the CTC posteriors and their best path in LLM token ids; `grounded` only.
    """

    vectors: Tensor
    num_audio_tokens: Tensor
    valid: Tensor
    speech: Tensor
    log_probs: Tensor | None = None
    readout: list[list[int]] | None = None


@dataclass(frozen=True)
class AudioEmbeds:
    """One clip as the LLM gets it: vectors (n, D) without the invalid places, and what was read out, if anything.

    hypotheses: what else may have been said, best first, in the LLM's tokens, where that was asked for.
    """

    vectors: Tensor
    num_audio_tokens: int
    speech: bool
    token_ids: list[int] | None = None
    hypotheses: tuple[Hypothesis, ...] = ()


@dataclass(frozen=True)
class Hypothesis:
    """A sequence of tokens that may have been said, and its log-probability over all paths of the read-out."""

    tokens: tuple[int, ...]
    log_prob: float


class ConvStack(nn.Module):
    """Convolutions (kernel 5, padding 2) each followed by a GLU; padding is zeroed between them."""

    def __init__(self, widths: list[int], strides: list[int]) -> None:
        super().__init__()
        self.strides = strides
        self.convs = nn.ModuleList(
            nn.Conv1d(width, 2 * following, kernel_size=5, stride=stride, padding=2)
            for width, following, stride in zip(widths, widths[1:], strides, strict=False)
        )

    def num_audio_tokens(self, frames: int) -> int:
        for stride in self.strides:
            frames = -(-frames // stride)
        return frames

    def forward(self, states: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, E), (B,) -> (B, S, D'), (B,)."""
        hidden = (states * valid_mask(lengths, states.shape[1])[:, :, None]).transpose(1, 2)
        for conv, stride in zip(self.convs, self.strides, strict=True):
            lengths = (lengths + stride - 1) // stride
            hidden = nn.functional.glu(conv(hidden), dim=1)
            hidden = hidden * valid_mask(lengths, hidden.shape[2])[:, None, :]
        return hidden.transpose(1, 2), lengths


class ConvAdapter(nn.Module):
    """The paper's adapter: 3 × (Conv1d k5 s2 p2 + GLU), bottleneck with residual, LayerNorm.

    47.5 M parameters for E = 768, D = 4096. `embedding_std` sets the LayerNorm's first gain so that the
    vectors start at the size of the LLM's own embeddings.
    """

    def __init__(
        self, speech_width: int, text_width: int, *, bottleneck: int = 512, embedding_std: float = 1.0
    ) -> None:
        super().__init__()
        self.stack = ConvStack([speech_width, speech_width, speech_width, text_width], [2, 2, 2])
        self.down = nn.Linear(text_width, bottleneck, bias=False)
        self.up = nn.Linear(bottleneck, text_width, bias=False)
        self.norm = nn.LayerNorm(text_width)
        nn.init.constant_(self.norm.weight, embedding_std)

    def num_audio_tokens(self, frames: int) -> int:
        return self.stack.num_audio_tokens(frames)

    def forward(self, states: Tensor, lengths: Tensor, table: Tensor | None = None) -> AdapterOutput:
        hidden, lengths = self.stack(states, lengths)
        hidden = self.norm(hidden + self.up(nn.functional.gelu(self.down(hidden))))
        return _plain_output(hidden, lengths)


class StackAdapter(nn.Module):
    """Joins `frames` neighbouring encoder frames and maps them with RMSNorm + SwiGLU MLP (8 frames: 6.25/s)."""

    def __init__(
        self,
        speech_width: int,
        text_width: int,
        *,
        frames: int = 8,
        hidden: int = 2048,
        embedding_std: float = 1.0,
    ) -> None:
        super().__init__()
        self.frames = frames
        self.norm_in = nn.RMSNorm(speech_width * frames)
        self.gate_up = nn.Linear(speech_width * frames, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, text_width, bias=False)
        self.norm = nn.RMSNorm(text_width)
        nn.init.constant_(self.norm.weight, embedding_std)

    def num_audio_tokens(self, frames: int) -> int:
        return -(-frames // self.frames)

    def forward(self, states: Tensor, lengths: Tensor, table: Tensor | None = None) -> AdapterOutput:
        states = states * valid_mask(lengths, states.shape[1])[:, :, None]
        missing = -states.shape[1] % self.frames
        stacked = nn.functional.pad(states, (0, 0, 0, missing)).unflatten(1, (-1, self.frames)).flatten(2)
        gate, up = self.gate_up(self.norm_in(stacked)).chunk(2, dim=-1)
        hidden = self.norm(self.down(nn.functional.silu(gate) * up))
        return _plain_output(hidden, (lengths + self.frames - 1) // self.frames)


def _plain_output(hidden: Tensor, lengths: Tensor) -> AdapterOutput:
    """Every place of a clip holds a vector, and every clip is taken for speech."""
    valid = valid_mask(lengths, hidden.shape[1])
    speech = torch.ones_like(lengths, dtype=torch.bool)
    return AdapterOutput(hidden * valid[:, :, None], num_audio_tokens=lengths, valid=valid, speech=speech)
