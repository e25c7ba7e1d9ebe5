"""Long recordings are cut at pauses, and nothing of them is lost."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import speech_like

from blsp.inference.pauses import cut_at_pauses


@given(seconds=st.floats(0.01, 100), seed=st.integers(0, 9))
def test_pieces_are_the_recording(seconds: float, seed: int) -> None:
    audio = speech_like(seconds, seed)
    pieces = cut_at_pauses(audio)
    assert np.array_equal(np.concatenate(pieces), audio)
    assert all(len(piece) <= 10 * 16000 for piece in pieces)
    assert all(len(piece) >= 5 * 16000 for piece in pieces[:-1])
    assert len(pieces) == 1 or seconds > 10


def test_the_cut_falls_into_the_pause() -> None:
    audio = speech_like(17)
    audio[7 * 16000 : int(7.4 * 16000)] = 0
    first = cut_at_pauses(audio)[0]
    assert 7 < len(first) / 16000 < 7.4
