"""Augmentation toward the channels that real speech comes through, deterministic from (seed, clip id).

In: (N,) float32 at 16 kHz. Out: (M,) float32 at 16 kHz; only tempo, reverb and pauses change the length.
Where in the flow: between the recipe's clips and `blsp encode`; `write_augmented` makes copies with a
manifest of their own, so that the feature cache holds both.

Try: `python recipes/blsp-tiny/augment.py --root C --manifest train_flite.jsonl --out train_flite_augmented.jsonl`
"""

from __future__ import annotations

import argparse
import hashlib
import io
import multiprocessing
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import soxr
from containers import RATE, write_flac
from rows import read_rows, summary, write_rows
from tqdm import tqdm

Wave = np.ndarray  # (N,) float32
Chance = np.random.Generator

# Name -> share of the clips that it is applied to, in this order, which is the order from the mouth to the file.
SHARES = {"speed": 0.5, "reverb": 0.3, "noise": 0.4, "band": 0.45, "codec": 0.4, "volume": 0.8, "pauses": 0.5}


def chance_for(seed: int, clip_id: str) -> Chance:
    digest = hashlib.sha256(f"{seed}\0{clip_id}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def augment(wave: Wave, seed: int, clip_id: str) -> tuple[Wave, list[str]]:
    """The clip as another channel carries it, and the names of what was done to it."""
    chance = chance_for(seed, clip_id)
    done = []
    for name, share in SHARES.items():
        if chance.random() < share:
            wave = EFFECTS[name](wave, chance)
            done.append(name)
    return np.clip(wave, -1, 1).astype(np.float32), done


def speed(wave: Wave, chance: Chance) -> Wave:
    """Tempo and pitch together, 0.88 to 1.14 times."""
    return np.asarray(soxr.resample(wave, RATE * chance.uniform(0.88, 1.14), RATE), dtype=np.float32)


def volume(wave: Wave, chance: Chance) -> Wave:
    """The loudest sample to between -30 and -0.5 dB of full scale."""
    peak = max(float(np.abs(wave).max()), 1e-4)
    return wave * np.float32(10 ** (chance.uniform(-30, -0.5) / 20) / peak)


def band(wave: Wave, chance: Chance) -> Wave:
    """A telephone's 300-3400 Hz, an 11 kHz recording, an 8 kHz one, or a small loudspeaker without bass."""
    low, high = [(300, 3400), (0, 5400), (0, 3900), (200, 7600)][chance.integers(4)]
    spectrum = np.fft.rfft(wave)
    frequency = np.fft.rfftfreq(len(wave), 1 / RATE)
    with np.errstate(over="ignore"):
        keep = 1 / (1 + np.exp((frequency - high) / 60)) / (1 + np.exp((low - frequency) / 30))
    return np.fft.irfft(spectrum * keep, len(wave)).astype(np.float32)


def codec(wave: Wave, chance: Chance) -> Wave:
    """Through mu-law, 8 bits, or low-rate MP3 (16 and 11 kHz) or Opus, and back."""
    name = ("mu-law", "8-bit", "mp3-16k", "mp3-11k", "opus")[chance.integers(5)]
    if name == "mu-law":
        return mu_law(wave)
    if name == "8-bit":
        return np.round(wave * 127).astype(np.float32) / 127
    if name == "opus":
        return _encoded(wave, RATE, "OGG", "OPUS", 0.99)
    return _encoded(wave, RATE if name == "mp3-16k" else 11_025, "MP3", "MPEG_LAYER_III", 0.99)


def mu_law(wave: Wave) -> Wave:
    """G.711's companding to 8 bits and back, at 16 kHz (the band limit is another effect)."""
    compressed = np.sign(wave) * np.log1p(255 * np.minimum(np.abs(wave), 1)) / np.log(256)
    steps = np.round(compressed * 127) / 127
    return (np.sign(steps) * (256 ** np.abs(steps) - 1) / 255).astype(np.float32)


def reverb(wave: Wave, chance: Chance) -> Wave:
    """Convolution with decaying noise (0.15 to 0.7 s), the direct sound 2 to 14 dB above it."""
    decay = chance.uniform(0.15, 0.7)
    time = np.arange(int(decay * RATE)) / RATE
    tail = chance.standard_normal(len(time)) * 10 ** (-3 * time / decay)
    tail *= 10 ** (-chance.uniform(2, 14) / 20) / np.sqrt(np.sum(tail**2))
    tail[: int(0.003 * RATE)] = 0
    tail[0] = 1.0
    size = len(wave) + len(tail) - 1
    wet = np.fft.irfft(np.fft.rfft(wave, size) * np.fft.rfft(tail, size), size)
    return wet[: len(wave) + int(0.1 * RATE)].astype(np.float32)


def noise(wave: Wave, chance: Chance) -> Wave:
    """Coloured noise at 5 to 35 dB below the speech."""
    level = np.sqrt(np.mean(wave**2) + 1e-10) * 10 ** (-chance.uniform(5, 35) / 20)
    return wave + np.float32(level) * coloured_noise(len(wave), chance.uniform(0, 2), chance)


def coloured_noise(samples: int, slope: float, chance: Chance) -> Wave:
    """Unit power; power falls with frequency to the `slope`: 0 white, 1 pink, 2 brown."""
    spectrum = np.fft.rfft(chance.standard_normal(samples))
    frequency = np.maximum(np.fft.rfftfreq(samples, 1 / RATE), 30)
    shaped = np.fft.irfft(spectrum * frequency ** (-slope / 2), samples)
    return (shaped / np.sqrt(np.mean(shaped**2) + 1e-12)).astype(np.float32)


def pauses(wave: Wave, chance: Chance) -> Wave:
    """Up to a second of near silence before and after."""
    before, after = (int(RATE * chance.uniform(0, 1.0)) for _ in range(2))
    floor = np.float32(10 ** (-chance.uniform(60, 90) / 20))
    padded = np.concatenate([np.zeros(before, np.float32), wave, np.zeros(after, np.float32)])
    return padded + floor * chance.standard_normal(len(padded)).astype(np.float32)


def _encoded(wave: Wave, rate: int, container: str, subtype: str, compression: float) -> Wave:
    buffer = io.BytesIO()
    narrow = wave if rate == RATE else soxr.resample(wave, RATE, rate)
    soundfile.write(
        buffer, np.clip(narrow, -1, 1), rate, format=container, subtype=subtype, compression_level=compression
    )
    buffer.seek(0)
    samples, _ = soundfile.read(buffer, dtype="float32")
    back = samples if rate == RATE else soxr.resample(samples, rate, RATE)
    return np.asarray(back[: len(wave)], dtype=np.float32)  # MP3 pads its last frame


EFFECTS: dict[str, Callable[[Wave, Chance], Wave]] = {
    "speed": speed, "reverb": reverb, "noise": noise, "band": band,
    "codec": codec, "volume": volume, "pauses": pauses,
}  # fmt: skip


def write_augmented(root: Path, seed: int, row: dict) -> dict:
    """One augmented copy of a clip as a file of its own; returns its row, which says what was done."""
    audio = Path("audio") / f"augmented-{seed}" / f"{row['id']}.flac"
    samples, _ = soundfile.read(root / row["audio"], dtype="float32")
    wave, done = augment(samples, seed, row["id"])
    if not (root / audio).exists():
        write_flac(root / audio, wave)
    return row | {
        "id": f"{row['id']}/augmented-{seed}",
        "audio": audio.as_posix(),
        "seconds": round(len(wave) / RATE, 3),
        "augmented": "+".join(done) or "nothing",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="the corpus folder")
    parser.add_argument("--manifest", required=True, help="a manifest in it; its clips are left as they are")
    parser.add_argument("--out", required=True, help="the new manifest in it")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=multiprocessing.cpu_count())
    options = parser.parse_args()
    rows = read_rows(options.root / options.manifest)
    work = partial(write_augmented, options.root, options.seed)
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        made = list(tqdm(pool.imap(work, rows, chunksize=50), total=len(rows), desc="augment"))
    write_rows(options.root / options.out, made)
    print(summary(options.out, made))


if __name__ == "__main__":
    main()
