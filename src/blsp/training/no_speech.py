"""Silence and noise to learn the set answer from: a small folder of clips and their manifest.

In:  a folder, a seed.
Out: ``no_speech.jsonl`` and the wav files it names; every row has ``no_speech: true`` and an empty
     transcript.
Try: ``write_no_speech(Path("runs/x/no_speech"), seed=0)``
Flow: `--no-speech SHARE` -> **no_speech.py** -> one more data file of the run (training/sources.py). Better:
      name a manifest of recorded silence, noise and music with the same field among --data.

Letters: N samples.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from blsp.data.audio import SAMPLE_RATE, write_wav
from blsp.data.manifest import write_manifest

CLIPS = 64
SECONDS = (0.5, 6.0)
LOUDNESS_DB = (-70.0, -15.0)  # below full scale

Audio = NDArray[np.float64]


def write_no_speech(folder: Path, seed: int) -> Path:
    """The manifest's path; what is there already is not made again."""
    manifest = folder / "no_speech.jsonl"
    if not manifest.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_manifest(manifest, (_clip(folder, number, seed) for number in range(CLIPS)), relative_to=folder)
    return manifest


def _clip(folder: Path, number: int, seed: int) -> dict[str, object]:
    generator = np.random.default_rng((seed, number))
    name = list(KINDS)[number % len(KINDS)]
    samples = int(generator.uniform(*SECONDS) * SAMPLE_RATE)
    sound = KINDS[name](generator, samples)
    loudness = 10 ** (generator.uniform(*LOUDNESS_DB) / 20)
    sound = sound * loudness / max(float(np.sqrt(np.mean(sound**2))), 1e-12)
    path = folder / f"{number:03d}-{name}.wav"
    write_wav(path, sound)
    seconds = samples / SAMPLE_RATE
    return {
        "id": f"no-speech-{seed}-{number}",
        "audio": str(path.resolve()),
        "text": "",
        "duration": seconds,
        "no_speech": True,
    }


def _silence(generator: np.random.Generator, samples: int) -> Audio:
    return np.zeros(samples)


def _coloured(generator: np.random.Generator, samples: int) -> Audio:
    """Noise whose power falls with frequency: white, pink, brown and what lies between."""
    spectrum = np.fft.rfft(generator.standard_normal(samples))
    return np.fft.irfft(
        spectrum / np.maximum(np.arange(len(spectrum)), 1) ** generator.uniform(0, 1), n=samples
    )


def _hum(generator: np.random.Generator, samples: int) -> Audio:
    """Mains and fans: a low tone with its harmonics over faint noise."""
    time = np.arange(samples) / SAMPLE_RATE
    pitch = generator.uniform(45, 180)
    tones = sum(np.sin(2 * np.pi * pitch * k * time + generator.uniform(0, 6)) / k**1.5 for k in range(1, 8))
    return tones + 0.05 * generator.standard_normal(samples)


def _clicks(generator: np.random.Generator, samples: int) -> Audio:
    """Knocks and keystrokes: short decaying bursts at random moments."""
    sound = 0.002 * generator.standard_normal(samples)
    for start in generator.integers(0, samples, size=max(1, samples // 4000)):
        length = min(samples - start, int(generator.integers(40, 1600)))
        sound[start : start + length] += generator.standard_normal(length) * np.exp(
            -np.arange(length) / (length / 5)
        )
    return sound


def _chords(generator: np.random.Generator, samples: int) -> Audio:
    """Music of sorts: held chords that change a few times a second."""
    sound = np.zeros(samples)
    for first in range(0, samples, int(SAMPLE_RATE / generator.uniform(1, 4))):
        time = np.arange(min(samples - first, SAMPLE_RATE)) / SAMPLE_RATE
        root = 110 * 2 ** (generator.integers(0, 25) / 12)
        tones = sum(np.sin(2 * np.pi * root * 2 ** (interval / 12) * time) for interval in (0, 4, 7, 12))
        sound[first : first + len(time)] += tones * np.exp(-5 * time)
    return sound


KINDS: dict[str, Callable[[np.random.Generator, int], Audio]] = {
    "silence": _silence,
    "noise": _coloured,
    "hum": _hum,
    "clicks": _clicks,
    "chords": _chords,
}
