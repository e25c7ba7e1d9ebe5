"""Words begin where the read-out gives them, and end where the recording becomes quiet."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import speech_like

from blsp.inference.pauses import Piece, pieces_of, quiet_spans
from blsp.inference.transcript import Transcript, transcripts
from blsp.inference.word_times import _borders, sounding, spread

SAMPLE_RATE = 16_000


def tone(seconds: float) -> np.ndarray:
    return np.sin(np.arange(int(seconds * SAMPLE_RATE)) * 0.3).astype(np.float32)


def silence(seconds: float) -> np.ndarray:
    return np.zeros(int(seconds * SAMPLE_RATE), np.float32)


def test_quiet_spans_are_the_silence_between_sounds() -> None:
    audio = np.concatenate([silence(0.5), tone(1.0), silence(0.3), tone(1.0), silence(0.2)])
    np.testing.assert_allclose(quiet_spans(audio), [[0, 0.5], [1.5, 1.8], [2.8, 3.0]], atol=0.011)
    assert quiet_spans(np.zeros(10, np.float32)).shape == (0, 2)
    assert sounding(Piece(10.0, audio)) == pytest.approx((10.5, 12.8), abs=0.011)
    assert sounding(Piece(1.0, silence(2.0))) == (1.0, 3.0)


def test_words_are_moved_to_the_pauses_beside_them() -> None:
    starts, lasts = np.array([0.1, 1.0, 2.1]), np.array([0.5, 1.4, 2.3])
    quiet = np.array([[0.0, 0.2], [1.5, 2.0], [2.5, 3.0]])
    borders = _borders(starts, lasts, quiet, 3.0)
    np.testing.assert_allclose(borders, [[0.2, 1.0], [1.0, 1.5], [2.0, 2.5]])
    # silence inside a word (before a plosive) is not a pause, and a distant pause does not move the word
    np.testing.assert_allclose(_borders(starts, lasts, np.array([[1.2, 1.3], [1.45, 1.65]]), 3.0)[:, 0], starts)


@given(
    st.lists(st.tuples(st.floats(0, 9), st.floats(0, 1)), min_size=1, max_size=20),
    st.lists(st.tuples(st.floats(0, 10), st.floats(0, 2)), max_size=8),
)
def test_words_are_in_order_and_never_overlap(
    words: list[tuple[float, float]], pauses: list[tuple[float, float]]
) -> None:
    starts = np.sort([start for start, _ in words])
    lasts = starts + [length for _, length in words]
    quiet = np.array([(begin, min(10.0, begin + length)) for begin, length in sorted(pauses)]).reshape(-1, 2)
    borders = _borders(starts, lasts, quiet, 10.0)
    assert (borders[:, 1] > borders[:, 0]).all()
    assert (np.diff(borders[:, 0]) >= 0).all()


def test_words_without_times_are_spread_by_their_length() -> None:
    words = spread("a bbb c", 1.0, 9.0)
    assert [(word.text, word.start, word.end) for word in words] == [("a", 1, 3), ("bbb", 3, 7), ("c", 7, 9)]
    assert spread("", 0, 1) == []


@pytest.mark.parametrize("method", ["readout", "rescored", "repeat"])
def test_every_word_of_a_transcript_has_a_time_inside_its_recording(listener_of, method: str) -> None:
    audio = speech_like(23, 3)
    (found,) = transcripts(listener_of("grounded"), [audio], method=method, timestamps=True, max_new_tokens=9)
    words = [word for segment in found.segments for word in segment.words]
    assert found.times == ("alignment" if method == "repeat" else "readout")
    assert found.seconds == 23.0
    assert " ".join(word.text for word in words) == " ".join(found.text.split()) != ""
    assert all(0 <= word.start < word.end <= 23.05 for word in words)
    assert [word.start for word in words] == sorted(word.start for word in words)
    assert Transcript.from_row(json.loads(json.dumps(found.row()))) == found


def test_an_adapter_without_read_out_has_the_times_of_its_pieces_or_those_of_an_aligner(listener_of) -> None:
    audio = speech_like(13, 3)
    options = {"timestamps": True, "max_new_tokens": 9}
    (alone,) = transcripts(listener_of("conv"), [audio], **options)
    assert alone.times == "pieces"
    assert len(alone.segments) == 2 and not any(segment.words for segment in alone.segments)
    assert " ".join(cue.text for cue in alone.cues()) == " ".join(alone.text.split())
    (aligned,) = transcripts(listener_of("conv"), [audio], aligner=listener_of("grounded"), **options)
    assert aligned.times == "alignment" and aligned.text == alone.text
    assert all(segment.words for segment in aligned.segments)


@pytest.mark.skipif(shutil.which("flite") is None, reason="no flite on this machine")
@pytest.mark.embedded
def test_the_shipped_adapter_finds_the_words_of_known_speech(tmp_path: Path) -> None:
    from benchmarks import word_times

    figures = word_times.measure(word_times.DEFAULT_MODEL, most=4)
    assert figures["word_start_median_s"] <= 0.12
    assert figures["cue_border_median_s"] <= 0.25


def test_a_long_silence_is_not_heard() -> None:
    pytest.importorskip("faster_whisper")
    from blsp.data.audio import load_audio

    speech = load_audio(Path(__file__).parents[2] / "examples/speech/questions/capital-of-canada.opus")
    noise = np.random.default_rng(0).normal(scale=1e-3, size=60 * SAMPLE_RATE).astype(np.float32)
    audio = np.concatenate([noise, speech, noise])
    (piece,) = pieces_of(audio)
    assert piece.start <= 60.5 and piece.end >= 60 + len(speech) / SAMPLE_RATE - 0.5
    assert len(piece.audio) < len(speech) + SAMPLE_RATE
    assert sum(len(each.audio) for each in pieces_of(audio, "none")) == len(audio)
    assert pieces_of(noise) == []
