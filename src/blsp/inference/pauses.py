"""Speech and silence in a recording: pieces of a good length for the model, quiet spans, regions with speech.

In:  16 kHz samples (N,).
Out: pieces with their start in the recording; quiet spans in seconds.
Try: `pieces_of(load_audio("meeting.wav"))`
Flow: inference/ — a recording → **pieces** → listener.embed_audio; **quiet spans** → word_times.py

In a long recording, Silero's voice activity detector (which `blsp[cascade]` installs with faster-whisper) first looks
for speech; parts without speech are not used. The rest is cut at its quietest points.

Shapes: N samples, F frames of 10 ms, P quiet spans.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blsp.data.audio import SAMPLE_RATE
from blsp.settings.shared import VoiceActivity

LONGEST_SECONDS = 10.0  # adapters are trained on single utterances and are worse on longer clips (docs/log.md)
SEARCHED = 0.5  # the quietest point is searched in this share of a piece, at its end
STEP = SAMPLE_RATE // 50  # samples: 20 ms
PAUSE_STEPS = 10  # a pause is measured over 0.2 s


@dataclass(frozen=True)
class Piece:
    """A part of a recording. start: seconds from the recording's start."""

    start: float
    audio: np.ndarray

    @property
    def end(self) -> float:
        return self.start + len(self.audio) / SAMPLE_RATE


def pieces_of(audio: np.ndarray, vad: VoiceActivity = "auto") -> list[Piece]:
    """The parts of `audio` (N,) that may hold speech, each of at most `LONGEST_SECONDS`.

    vad: `silero` searches for speech first; `auto` does so in recordings of more than `SEARCH_FROM` seconds if the
    detector is installed; `none` never. Raises ValueError if `silero` is not installed.
    """
    regions = speech_regions(audio) if _searches(audio, vad) else [(0, len(audio))]
    pieces = []
    for begin, end in regions:
        for part in cut_at_pauses(audio[begin:end]):
            pieces.append(Piece(begin / SAMPLE_RATE, part))
            begin += len(part)
    return pieces


def cut_at_pauses(audio: np.ndarray, longest: float = LONGEST_SECONDS) -> list[np.ndarray]:
    """`audio` (N,) in pieces of at most `longest` seconds; a short recording is one piece."""
    limit = int(longest * SAMPLE_RATE)
    pieces = []
    while len(audio) > limit:
        end = _quietest(audio[:limit], int(limit * (1 - SEARCHED)))
        pieces.append(audio[:end])
        audio = audio[end:]
    return [*pieces, audio]


def _quietest(audio: np.ndarray, begin: int) -> int:
    """The sample in the middle of the quietest 0.2 s after `begin`; the last one if several are equal."""
    # Energy of each 20 ms, then of each 0.2 s: energies[i] is that of audio[begin + i * STEP : … + STEP].
    energies = np.add.reduceat(np.square(audio[begin:], dtype=np.float64), np.arange(0, len(audio) - begin, STEP))
    windows = np.convolve(energies, np.ones(PAUSE_STEPS), mode="valid")
    quietest = len(windows) - 1 - int(windows[::-1].argmin())  # argmin finds the first, so search backwards
    return begin + (quietest + PAUSE_STEPS // 2) * STEP


# --- quiet spans ------------------------------------------------------------------------------------------------

FRAME = SAMPLE_RATE // 100  # samples: 10 ms
QUIET = 0.25  # the threshold's position in dB between noise (10th percentile of the frames) and speech (95th)
DEEPEST = 60.0  # dB; noise counts as at most this far below the speech


def quiet_spans(audio: np.ndarray) -> NDArray[np.float64]:
    """Beginnings and ends (P, 2), in seconds, of the parts of `audio` (N,) that are not louder than its noise."""
    count = len(audio) // FRAME
    if not count:
        return np.zeros((0, 2))
    energies = np.square(audio[: count * FRAME].reshape(count, FRAME), dtype=np.float64).mean(axis=1)  # (F,)
    levels = 10 * np.log10(np.convolve(energies, np.full(3, 1 / 3), mode="same")[:count] + 1e-10)
    noise, speech = np.percentile(levels, [10, 95])
    noise = max(noise, speech - DEEPEST)
    quiet = levels <= noise + QUIET * (speech - noise)
    # +1 where a span begins, -1 after its end
    changes = np.diff(np.concatenate([[False], quiet, [False]]).astype(np.int8))
    return np.flatnonzero(changes).reshape(-1, 2).astype(np.float64) * FRAME / SAMPLE_RATE


# --- regions with speech ----------------------------------------------------------------------------------------

SEARCH_FROM = 30.0  # seconds
BLOCK_SECONDS = 600  # searched at once; the detector copies its input several times
SPEECH_THRESHOLD = 0.3  # probability of speech; the detector's default, 0.5, loses quiet beginnings
MARGIN_SECONDS = 0.3  # kept before and after speech
SHORTEST_SILENCE = 1.0  # seconds without speech that are left out


def _searches(audio: np.ndarray, vad: VoiceActivity) -> bool:
    installed = importlib.util.find_spec("faster_whisper") is not None
    if vad == "silero" and not installed:
        raise ValueError("--vad silero needs a package: pip install 'blsp[cascade]'")
    return vad == "silero" or (vad == "auto" and installed and len(audio) > SEARCH_FROM * SAMPLE_RATE)


def speech_regions(audio: np.ndarray) -> list[tuple[int, int]]:
    """First and last samples of the regions with speech in `audio` (N,), by Silero's detector, with a margin."""
    regions: list[tuple[int, int]] = []
    for begin, end in _detected(audio):
        if regions and begin <= regions[-1][1]:
            begin, _ = regions.pop()
        regions.append((begin, end))
    return regions


def _detected(audio: np.ndarray) -> Iterator[tuple[int, int]]:
    """The detector's regions, block by block; a region across the border of two blocks is given as two."""
    from faster_whisper.vad import VadOptions, get_speech_timestamps

    options = VadOptions(
        threshold=SPEECH_THRESHOLD,
        min_silence_duration_ms=int(SHORTEST_SILENCE * 1000),
        speech_pad_ms=int(MARGIN_SECONDS * 1000),
    )
    block = BLOCK_SECONDS * SAMPLE_RATE
    for offset in range(0, len(audio), block):
        for region in get_speech_timestamps(audio[offset : offset + block], options):
            yield offset + region["start"], offset + region["end"]
