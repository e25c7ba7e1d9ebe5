"""Folders as people have them: one odd file leaves itself out, and nothing else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from blsp import cli
from blsp.data.files import read_rows

CLIP = Path(__file__).parents[1] / "clips" / "hello.wav"


def prepared(root: Path, out: Path, corpus: str = "folder") -> tuple[list[dict], dict[str, str]]:
    """The rows, and what was left out: id -> reason."""
    assert cli.main(["prepare", corpus, "--root", str(root), "--out", str(out)]) in (0, None)
    skipped = out.with_name(f"{out.name}.skipped.jsonl")
    left_out = {row["id"]: row["reason"] for _, row in read_rows(skipped)} if skipped.exists() else {}
    return [row for _, row in read_rows(out)], left_out


def recording(root: Path, name: str, text: str | bytes | None = "Hello.") -> None:
    """A clip and its transcript."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(CLIP, path)
    if text is not None:
        content = text if isinstance(text, bytes) else text.encode()
        path.with_suffix(".txt").write_bytes(content)


def test_hidden_companions_are_passed_over(tmp_path: Path) -> None:
    recording(tmp_path / "r", "a.wav")
    recording(tmp_path / "r", "._a.wav", b"\x00\x05\x16\x07\xff")
    recording(tmp_path / "r", "__MACOSX/b.wav")
    rows, left_out = prepared(tmp_path / "r", tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == ["a"] and not left_out


@pytest.mark.parametrize("text", ["Grüße.".encode("latin-1"), "Hello.".encode("utf-16")])
def test_a_text_that_is_not_utf8_leaves_out_its_row(tmp_path: Path, text: bytes) -> None:
    recording(tmp_path / "r", "a.wav")
    recording(tmp_path / "r", "b.wav", text)
    rows, left_out = prepared(tmp_path / "r", tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == ["a"] and "is not UTF-8" in left_out["b"]


def test_a_file_name_that_is_not_utf8_leaves_out_its_row(tmp_path: Path) -> None:
    recording(tmp_path / "r", "a.wav")
    shutil.copy(CLIP, os.path.join(os.fsencode(tmp_path / "r"), b"caf\xe9.wav"))
    rows, left_out = prepared(tmp_path / "r", tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == ["a"] and left_out == {"caf\\xe9": "file name: it is not UTF-8"}


def test_two_recordings_of_one_name(tmp_path: Path) -> None:
    recording(tmp_path / "r", "a.wav")
    recording(tmp_path / "r", "a.flac", None)
    recording(tmp_path / "r", "b.wav")
    rows, left_out = prepared(tmp_path / "r", tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == ["a", "b"] and "a.flac is taken" in left_out["a"]


def test_suffixes_in_capitals_and_formats_of_phones(tmp_path: Path) -> None:
    for name in ("a.WAV", "b.m4a", "c.WebM", "d.amr", "e.oga"):
        recording(tmp_path / "r", name, None)
        (tmp_path / "r" / f"{name[0]}.TXT").write_text("Hello.")
    recording(tmp_path / "r", "f.m4a", None)
    rows, left_out = prepared(tmp_path / "r", tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == list("abcde") and "no transcript" in left_out["f"]


def test_a_kaldi_segment_to_the_end_of_the_recording(tmp_path: Path) -> None:
    recording(tmp_path, "r.wav", None)
    for name, line in (("wav.scp", "r r.wav"), ("text", "u Hello."), ("segments", "u r 0.5 -1")):
        (tmp_path / name).write_text(line + "\n")
    ((row,), left_out) = prepared(tmp_path, tmp_path / "out.jsonl", "kaldi")
    assert row["start"] == 0.5 and "duration" not in row and not left_out
