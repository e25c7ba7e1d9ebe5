"""Long recordings in pieces that an ear can take: cut where the speaker pauses.

In:  16 kHz samples (N,) of any length.
Out: pieces of at most 10 s, in order; together they are the recording.
Try: `pieces = cut_at_pauses(load_audio("meeting.opus"))`
Flow: inference/ — transcription hears piece by piece: memory stays flat and no word is cut where a pause was near.
"""

from __future__ import annotations

import numpy as np

from blsp.data.audio import SAMPLE_RATE

LONGEST_SECONDS = 10.0  # adapters learn from single utterances: what is longer is heard worse (docs/log.md)
SEARCHED = 0.5  # the later part of a piece, in which the quietest place is looked for
STEP = SAMPLE_RATE // 50  # samples: 20 ms
PAUSE_STEPS = 10  # a pause is judged over 0.2 s


def cut_at_pauses(audio: np.ndarray, longest: float = LONGEST_SECONDS) -> list[np.ndarray]:
    """`audio` (N,) in pieces of at most `longest` seconds; a short recording is one piece."""
    most = int(longest * SAMPLE_RATE)
    pieces = []
    while len(audio) > most:
        end = _quietest(audio[:most], int(most * (1 - SEARCHED)))
        pieces.append(audio[:end])
        audio = audio[end:]
    return [*pieces, audio]


def _quietest(audio: np.ndarray, begin: int) -> int:
    """The sample from `begin` on in the middle of the quietest 0.2 s; the last of several."""
    energies = np.add.reduceat(
        np.square(audio[begin:], dtype=np.float64), np.arange(0, len(audio) - begin, STEP)
    )
    smooth = np.convolve(energies, np.ones(PAUSE_STEPS), mode="valid")
    last = len(smooth) - 1 - int(smooth[::-1].argmin())
    return begin + (last + PAUSE_STEPS // 2) * STEP
