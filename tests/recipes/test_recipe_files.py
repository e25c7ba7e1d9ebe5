"""The recipe's files: whole or not there, nothing left beside them, and written by several processes at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import containers
import numpy as np
import pytest
import soundfile
import translated
from rows import read_rows, write_rows


def broken() -> Iterator[dict]:
    yield {"id": "a"}
    raise RuntimeError("stopped")


def test_rows_that_break_off_leave_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    assert write_rows(path, [{"id": "é"}, {"id": "b"}]) == 2
    with pytest.raises(RuntimeError, match="stopped"):
        write_rows(path, broken())
    assert list(path.parent.iterdir()) == [path] and read_rows(path) == [{"id": "é"}, {"id": "b"}]


def test_clips_are_written_by_two_processes_under_two_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, wave, written = tmp_path / "audio" / "a.flac", np.linspace(-2, 2, 800, dtype=np.float32), []
    write = soundfile.write

    def while_another_writes(partial: Path, *arguments: object, **options: object) -> None:
        written.append(partial)
        if len(written) == 1:
            containers.write_flac(path, wave)
        write(partial, *arguments, **options)

    monkeypatch.setattr(soundfile, "write", while_another_writes)
    containers.write_flac(path, wave)
    assert len(set(written)) == 2 and list(path.parent.iterdir()) == [path]
    info = soundfile.info(path)
    assert (info.format, info.subtype, info.samplerate, info.frames) == ("FLAC", "PCM_16", 16_000, 800)


def test_a_clip_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(soundfile.LibsndfileError):
        containers.write_flac(tmp_path / "a.flac", np.zeros((4, 9), np.float32))  # FLAC has at most 8 channels
    assert not list(tmp_path.iterdir())


def test_a_download_that_breaks_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_off(_: str, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("connection reset")

    monkeypatch.setattr("urllib.request.urlretrieve", break_off)
    with pytest.raises(OSError, match="connection reset"):
        next(translated.descriptions("fr", tmp_path))
    assert not list((tmp_path / "packages").iterdir())
