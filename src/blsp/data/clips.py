"""The recording of a manifest's row.

In:  an `Utterance`; its `start` and `duration` name the part of the file.
Out: samples (N,) float32, mono, 16 kHz, or an `AudioError`.
Try: `load_clip(Manifest("train.jsonl")[0])`
Flow: manifest → **clips.py** → every step that listens to rows
"""

from __future__ import annotations

import numpy as np

from blsp.data.audio import load_audio
from blsp.data.manifest import Utterance


def load_clip(row: Utterance, content: bytes | str | None = None) -> np.ndarray:
    """(N,) 16 kHz samples of a row's part of its file. content: the file's bytes, if they have been read already."""
    return load_audio(content or row.audio, start=row.start or 0.0, duration=row.duration, name=row.audio)
