"""Clips without understandable speech: silence, coloured noise, hum, clicks, simple music, babble.

In:  a seed and, for babble, a manifest of speech.
Out: wav files beside the manifest, and rows with `no_speech`; clip number n depends only on the seed and n.
Try: `make_sound("pink", np.random.default_rng(0), 16_000)`
Flow: data/corpora/ — `blsp prepare no-speech`; training teaches the no-speech sentence on these clips.

Shapes: N samples.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from blsp.data.audio import SAMPLE_RATE, AudioError, write_wav
from blsp.data.clips import load_clip
from blsp.data.corpora.reading import CorpusError, ReadRequest, Rows
from blsp.data.manifest import Manifest, Utterance

CLIPS = 300  # without --limit
SECONDS = (0.3, 8.0)
LOUDNESS_DB = (-65.0, -15.0)  # RMS below full scale
TALKERS = (6, 12)  # with fewer than six voices, words can be understood
SLOPES = {"white": 0.0, "pink": 1.0, "brown": 2.0, "blue": -1.0}  # power falls with frequency to this power

Generator = np.random.Generator


def no_speech(request: ReadRequest) -> Rows:
    """`--limit` clips, each kind in turn; babble is mixed from the manifest that `--root` names."""
    speech = Manifest(request.root) if request.root else None
    kinds = [*SOUNDS, "babble"] if speech else [*SOUNDS]
    for number in range(request.limit or CLIPS):
        kind = kinds[number % len(kinds)]
        id = f"no-speech-{kind}-{number:06d}"
        path = request.made_audio / f"{id}.wav"
        if not path.exists():
            generator = np.random.default_rng((request.seed, number))
            samples = round(generator.uniform(*SECONDS) * SAMPLE_RATE)
            if kind == "babble" and speech:
                audio = _at_loudness(_babble(generator, samples, speech), generator)
            else:
                audio = make_sound(kind, generator, samples)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_wav(path, audio)
        yield Utterance(id=id, audio=str(path), text="", extra={"no_speech": True, "sound": kind})


def make_sound(kind: str, generator: Generator, samples: int) -> np.ndarray:
    """A clip (N,) float32 of one of `SOUNDS`, at a random loudness."""
    if kind == "silence":
        return _silence(generator, samples)
    return _at_loudness(SOUNDS[kind](generator, samples), generator)


def _at_loudness(sound: np.ndarray, generator: Generator) -> np.ndarray:
    loudness = 10 ** (generator.uniform(*LOUDNESS_DB) / 20)
    level = np.sqrt(np.mean(np.square(sound, dtype=np.float64)))
    return np.clip(sound * (loudness / max(level, 1e-9)), -1.0, 1.0).astype(np.float32)


def _silence(generator: Generator, samples: int) -> np.ndarray:
    """Digital silence, or the noise of one or two bits that a quiet converter gives."""
    level = generator.choice([0.0, 0.0, 1.0, 2.0]) / 32768
    return (level * generator.standard_normal(samples)).astype(np.float32)


def _coloured(slope: float) -> Callable[[Generator, int], np.ndarray]:
    def make(generator: Generator, samples: int) -> np.ndarray:
        spectrum = np.fft.rfft(generator.standard_normal(samples))  # (N / 2 + 1,), white
        return np.fft.irfft(spectrum * np.maximum(np.arange(len(spectrum)), 1) ** (-slope / 2), n=samples)

    return make


def _hum(generator: Generator, samples: int) -> np.ndarray:
    """Mains and fans: a low tone with harmonics, and faint noise."""
    time = np.arange(samples) / SAMPLE_RATE
    pitch = generator.uniform(45, 180)
    sound = 0.05 * generator.standard_normal(samples)
    for k in range(1, 8):
        sound += np.sin(2 * np.pi * pitch * k * time + generator.uniform(0, 6.28)) / k**1.5
    return sound


def _clicks(generator: Generator, samples: int) -> np.ndarray:
    """Knocks and keystrokes: short decaying bursts at random moments."""
    sound = 0.002 * generator.standard_normal(samples)
    for start in generator.integers(0, samples, size=max(1, samples // 4000)):
        length = min(samples - int(start), int(generator.integers(40, 1600)))
        sound[start : start + length] += generator.standard_normal(length) * np.exp(-np.arange(length) / 80)
    return sound


def _music(generator: Generator, samples: int) -> np.ndarray:
    """Held chords that change a few times a second."""
    sound = np.zeros(samples)
    beat = int(SAMPLE_RATE / generator.uniform(1, 4))
    for first in range(0, samples, beat):
        time = np.arange(min(samples - first, SAMPLE_RATE)) / SAMPLE_RATE
        root = 110 * 2 ** (generator.integers(0, 25) / 12)
        third = generator.choice([3, 4])
        chord = sum(np.sin(2 * np.pi * root * 2 ** (step / 12) * time) for step in (0, third, 7, 12))
        sound[first : first + len(time)] += chord * np.exp(-4 * time)
    return sound


def _babble(generator: Generator, samples: int, speech: Manifest) -> np.ndarray:
    """Several talkers at once, equally loud, each from a random moment of a random clip."""
    sound = np.zeros(samples)
    talkers, mixed, failure = int(generator.integers(*TALKERS)), 0, ""
    for _ in range(4 * talkers):
        row = speech[int(generator.integers(len(speech)))]
        if not row.audio or row.no_speech:
            continue
        try:
            voice = load_clip(row)
        except AudioError as error:
            failure = str(error)
            continue
        voice = np.roll(np.resize(voice, samples), int(generator.integers(samples)))
        sound += voice / max(float(np.sqrt(np.mean(np.square(voice)))), 1e-4)
        mixed += 1
        if mixed == talkers:
            return sound
    raise CorpusError(f"{speech.paths[0]}: too few clips can be read to mix babble from them {failure}".rstrip())


SOUNDS: dict[str, Callable[[Generator, int], np.ndarray]] = {
    "silence": _silence,
    **{name: _coloured(slope) for name, slope in SLOPES.items()},
    "hum": _hum,
    "clicks": _clicks,
    "music": _music,
}
