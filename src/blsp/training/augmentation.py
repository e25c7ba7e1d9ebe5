"""Augmentation of a clip: its speed, volume and noise; or short spans of its cached features set to zero.

In:  16 kHz mono samples (N,) if speech is encoded during training, otherwise cached encoder states (T, E); and a key,
     from which all random numbers are drawn.
Out: the changed samples or states; the same key always gives the same numbers.
Try: ``augment(audio, ("speed", "noise"), key=(0, epoch, row))``
Flow: training/examples.py loads a clip -> **augmentation.py** -> the encoder, or the adapter.

Shapes: N samples, T encoder frames, E encoder width.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import soxr
from numpy.typing import NDArray

from blsp.data.audio import SAMPLE_RATE

Kind = Literal["speed", "volume", "noise", "mask"]
Audio = NDArray[np.float32]

SPEEDS = (0.9, 1.0, 1.1)  # Ko et al. 2015; pitch moves with the speed
VOLUME_DB = (-18.0, 6.0)
NOISE_SHARE = 0.5  # of the clips
NOISE_DB = (8.0, 35.0)  # signal over noise
MASK_FRAMES = 12  # of the longest span, 0.24 s
MASK_EVERY = 60  # encoder frames for each span


def augment(audio: Audio, kinds: Sequence[Kind], key: tuple[int, ...]) -> Audio:
    """`audio` with each of `kinds` applied, in the order speed, noise, volume."""
    generator = np.random.default_rng(key)
    speed, noise, gain = generator.choice(SPEEDS), generator.random(), generator.uniform(*VOLUME_DB)
    if "speed" in kinds and speed != 1.0:
        audio = soxr.resample(audio, SAMPLE_RATE * speed, SAMPLE_RATE)
    if "noise" in kinds and noise < NOISE_SHARE:
        audio = add_noise(audio, generator)
    if "volume" in kinds:
        audio = np.clip(audio * np.float32(10 ** (gain / 20)), -1, 1)
    return np.ascontiguousarray(audio, dtype=np.float32)


def add_noise(audio: Audio, generator: np.random.Generator) -> Audio:
    """`audio` (N,) with noise a few dB below it; the noise's power falls with frequency (white to brown)."""
    # White noise, each frequency divided by itself to the power of a random slope
    spectrum = np.fft.rfft(generator.standard_normal(len(audio)))
    slope = generator.uniform(0, 1)
    noise = np.fft.irfft(spectrum / np.maximum(np.arange(len(spectrum)), 1) ** slope, n=len(audio))

    # At a random distance in dB below the clip's own loudness
    distance = generator.uniform(*NOISE_DB)
    loudness = np.sqrt(np.mean(np.square(audio, dtype=np.float64)))
    scale = loudness * 10 ** (-distance / 20) / max(float(np.sqrt(np.mean(noise**2))), 1e-12)
    return (audio + scale * noise).astype(np.float32)


def hide_spans(features: NDArray[np.float16], key: tuple[int, ...]) -> NDArray[np.float16]:
    """Encoder states (T, E) with short spans set to zero (SpecAugment's time masks, Park et al. 2019)."""
    generator = np.random.default_rng(key)
    masked = features.copy()
    for _ in range(-(-len(features) // MASK_EVERY)):
        start = generator.integers(len(features))
        masked[start : start + generator.integers(1, MASK_FRAMES + 1)] = 0
    return masked
