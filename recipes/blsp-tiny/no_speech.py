"""Clips without understandable speech: silence, coloured noise, babble of many voices, music.

In: the training manifests (for babble) and the music of `fetch.py`. Out: `audio/no_speech/…flac` and
`train_no_speech.jsonl`, or `eval_no_speech.jsonl` from music and voices that are in no training clip; every
row has an empty text and `no_speech: true`.
Where in the flow: after `fetch.py` and some synthesis; for the class that keeps the model from inventing
words.

Try: `python recipes/blsp-tiny/no_speech.py --root C --part train --each 200`
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
from augment import Chance, Wave, chance_for, coloured_noise
from containers import RATE, write_flac
from rows import read_rows, summary, write_rows

SECONDS = (0.4, 8.0)
VOICES_IN_BABBLE = 9  # so many at once, at about one loudness, that no one can be followed
Sources = dict[str, list[Path]]


def silence(samples: int, sources: Sources, chance: Chance) -> Wave:
    """Digital silence, or a microphone's floor at -50 to -90 dB, with a hum now and then."""
    if chance.random() < 0.25:
        return np.zeros(samples, np.float32)
    level = 10 ** (-chance.uniform(50, 90) / 20)
    hum = np.sin(2 * np.pi * chance.choice([50, 60]) * np.arange(samples) / RATE) * (chance.random() < 0.3)
    return (level * (coloured_noise(samples, chance.uniform(0, 2), chance) + hum)).astype(np.float32)


def noise(samples: int, sources: Sources, chance: Chance) -> Wave:
    """White to brown noise at -45 to -8 dB, swelling slowly, with clicks now and then."""
    wave = coloured_noise(samples, chance.uniform(-0.5, 2), chance)
    time = np.arange(samples) / RATE
    wave *= 1 + chance.uniform(0, 0.8) * np.sin(2 * np.pi * chance.uniform(0.1, 3) * time + chance.uniform(0, 6))
    for start in chance.integers(0, samples, chance.integers(0, 5)):
        click = np.exp(-np.arange(800) / chance.uniform(20, 200)) * chance.uniform(1, 5)
        wave[start : start + 800] += (click * chance.standard_normal(800))[: samples - start]
    return (wave * 10 ** (-chance.uniform(20, 45) / 20)).astype(np.float32)


def babble(samples: int, sources: Sources, chance: Chance) -> Wave:
    """The sum of many voices, each as loud as the others."""
    mixed = np.zeros(samples, np.float32)
    for path in chance.choice(np.array(sources["voices"]), VOICES_IN_BABBLE, replace=False):
        voice, _ = soundfile.read(path, dtype="float32")
        repeated = np.resize(np.roll(voice, chance.integers(len(voice))), samples)
        mixed += repeated / np.sqrt(np.mean(voice**2) + 1e-8)
    return (mixed / max(np.abs(mixed).max(), 1e-6) * 10 ** (-chance.uniform(3, 30) / 20)).astype(np.float32)


def music(samples: int, sources: Sources, chance: Chance) -> Wave:
    """A piece out of one of the recordings."""
    piece, _ = soundfile.read(chance.choice(np.array(sources["music"])), dtype="float32")
    start = chance.integers(0, len(piece) - samples)
    return (piece[start : start + samples] * 10 ** (-chance.uniform(0, 20) / 20)).astype(np.float32)


KINDS: dict[str, Callable[[int, Sources, Chance], Wave]] = {
    "silence": silence,
    "noise": noise,
    "babble": babble,
    "music": music,
}
VOICES = {"train": "train_fotaq.jsonl", "eval": "eval_drascula.jsonl"}


def make(root: Path, part: str, each: int, seed: int) -> list[dict]:
    """`each` clips of every kind."""
    sources = {
        "voices": [root / row["audio"] for row in read_rows(root / VOICES[part])],
        "music": [root / row["audio"] for row in read_rows(root / f"music_{part}.jsonl")],
    }
    rows = []
    for kind, make_wave in KINDS.items():
        for number in range(each):
            name = f"no_speech/{part}/{kind}-{number:04d}"
            chance = chance_for(seed, name)
            wave = make_wave(int(RATE * chance.uniform(*SECONDS)), sources, chance)
            write_flac(root / "audio" / f"{name}.flac", wave)
            row = {"id": name, "audio": f"audio/{name}.flac", "text": "", "no_speech": True, "kind": kind}
            licence = {"music": "CC-BY-SA-3.0", "babble": "as its voices"}.get(kind, "Apache-2.0")
            rows.append(row | {"seconds": round(len(wave) / RATE, 3), "source": "no_speech", "licence": licence})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="the corpus folder")
    parser.add_argument("--part", choices=sorted(VOICES), required=True)
    parser.add_argument("--each", type=int, required=True, help="clips of each of the four kinds")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = make(options.root, options.part, options.each, options.seed)
    write_rows(options.root / f"{options.part}_no_speech.jsonl", rows)
    print(summary(f"{options.part}_no_speech", rows))


if __name__ == "__main__":
    main()
