"""Generated silence and noise: the same for the same seed, without speech, not too loud."""

from pathlib import Path

import numpy as np

from blsp.data.audio import load_audio
from blsp.data.corpora.no_speech import SOUNDS
from blsp.data.manifest import Manifest
from blsp.training.run import NO_SPEECH_CLIPS, write_no_speech


def test_clips_are_a_function_of_the_seed(tmp_path: Path) -> None:
    paths = [tmp_path / name / "no_speech.jsonl" for name in ("a", "b")]
    for path in paths:
        write_no_speech(path, seed=3)
    first, second = (Manifest(path) for path in paths)
    assert len(first) == NO_SPEECH_CLIPS
    for mine, other in zip(first, second, strict=True):
        assert mine.text == "" and mine.extra["no_speech"] is True
        heard, again = load_audio(mine.audio), load_audio(other.audio)
        np.testing.assert_array_equal(heard, again)
        assert np.abs(heard).max() <= 1
    loudest = [np.abs(load_audio(row.audio)).max() for row in first]
    assert min(loudest) == 0 and max(loudest) > 0.05
    assert {row.extra["sound"] for row in first} == set(SOUNDS)
