"""The clip of a row: its part of the file, or of the file's bytes, named in errors as in the row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.tiny_models import speech_like

from blsp.data.audio import AudioError, load_audio, write_wav
from blsp.data.clips import load_clip
from blsp.data.manifest import Utterance


def test_the_part_that_a_row_names(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    write_wav(path, speech_like(1.0))
    whole, row = load_audio(path), Utterance("a", str(path), "", start=0.25, duration=0.5)
    assert np.array_equal(load_clip(Utterance("a", str(path), "")), whole)
    assert np.array_equal(load_clip(row), whole[4000:12000])
    assert np.array_equal(load_clip(row, path.read_bytes()), whole[4000:12000])
    with pytest.raises(AudioError, match=r"a\.wav: cannot be read"):
        load_clip(row, b"no audio")


def test_no_other_module_cuts_a_row_out_of_its_file() -> None:
    source = Path(__file__).parents[2] / "src" / "blsp"
    places = [path.name for path in source.rglob("*.py") if "start=row.start" in path.read_text(encoding="utf-8")]
    assert places == ["clips.py"]
