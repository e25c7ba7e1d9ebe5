"""Law 12: `conv` is the paper's adapter: 47,467,520 parameters for 768 → 4096, and fixed outputs on fixed weights.

The outputs are compared with the formula written out with NumPy (kernel 5, stride 2, padding 2, GLU, three times; a
bottleneck with GELU and a residual; LayerNorm), and with numbers written down once.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from blsp.model.adapter import ADAPTERS

Array = NDArray[np.float64]
WIDTH, TEXT_WIDTH, BOTTLENECK = 4, 6, 3
FRAMES = 19  # not a multiple of 8: each stride rounds up, 19 → 10 → 5 → 3


def waves(shape: tuple[int, ...], step: float) -> Array:
    """Numbers without a pattern that every machine computes alike."""
    return np.sin(step * np.arange(1, 1 + math.prod(shape))).reshape(shape)


@pytest.fixture
def adapter() -> torch.nn.Module:
    """A small `conv` in float64 whose weights are waves."""
    module = ADAPTERS["conv"](WIDTH, TEXT_WIDTH, bottleneck=BOTTLENECK).double()
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters(), start=1):
            parameter.copy_(torch.from_numpy(waves(tuple(parameter.shape), 0.7 + 0.1 * number)))
    return module


def by_formula(states: Array, weights: dict[str, Array]) -> Array:
    """The paper's adapter on one clip (T, E), without torch."""
    hidden = states
    for number in range(3):
        kernel, bias = weights[f"stack.convs.{number}.weight"], weights[f"stack.convs.{number}.bias"]
        padded = np.pad(hidden, ((2, 2), (0, 0)))
        rows = [
            sum(kernel[:, :, tap] @ padded[start + tap] for tap in range(5)) + bias
            for start in range(0, len(hidden), 2)
        ]
        value, gate = np.split(np.array(rows), 2, axis=1)
        hidden = value / (1 + np.exp(-gate))  # GLU
    narrow = hidden @ weights["down.weight"].T
    gelu = narrow * 0.5 * (1 + np.vectorize(math.erf)(narrow / math.sqrt(2)))
    hidden = hidden + gelu @ weights["up.weight"].T
    centred = hidden - hidden.mean(axis=1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
    return normed * weights["norm.weight"] + weights["norm.bias"]


def test_it_has_the_papers_size() -> None:
    with torch.device("meta"):
        adapter = ADAPTERS["conv"](768, 4096)
    assert sum(parameter.numel() for parameter in adapter.parameters()) == 47_467_520
    assert adapter.strides == [2, 2, 2]


@torch.no_grad()
def test_it_computes_the_papers_formula(adapter: torch.nn.Module) -> None:
    states = waves((FRAMES, WIDTH), 1.3)
    output = adapter(torch.from_numpy(states)[None], torch.tensor([FRAMES]))
    weights = {name: tensor.numpy() for name, tensor in adapter.state_dict().items()}
    assert output.num_audio_tokens.tolist() == [3] and output.valid.all()
    np.testing.assert_allclose(output.vectors[0].numpy(), by_formula(states, weights), rtol=0, atol=1e-9)


@torch.no_grad()
def test_its_outputs_are_these_numbers(adapter: torch.nn.Module) -> None:
    states = torch.from_numpy(waves((FRAMES, WIDTH), 1.3))[None]
    vectors = adapter(states, torch.tensor([FRAMES])).vectors
    torch.testing.assert_close(vectors, torch.tensor(GOLDEN, dtype=torch.float64), rtol=0, atol=1e-9)


GOLDEN = [
    [
        [2.245669429101, -0.221136955569, 0.467752625052, 0.542404822647, 1.920566040919, -0.557846114534],
        [0.865128077187, -0.286338319663, 0.630958697056, 0.452023189877, 2.534578091459, -0.659456389827],
        [-0.231646391487, -0.313881902105, -2.135730719761, 0.378455154725, 0.084962851184, -0.825979893287],
    ]
]
