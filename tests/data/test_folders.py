"""Folders as people have them: one odd file leaves itself out, and nothing else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from support.corpus_copies import RATE, encoded_tone

from blsp import cli
from blsp.data.audio import load_audio
from blsp.data.files import read_rows
from blsp.data.manifest import Manifest

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


def test_recordings_that_no_decoder_reads_are_counted(tmp_path: Path) -> None:
    for name in ("a.wav", "b.mov", "c.wv", "d.AC3"):
        recording(tmp_path / "r", name)
    recording(tmp_path / "r", "e.ts", None)  # a program, or a film without a transcript
    rows, left_out = prepared(tmp_path / "r", tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == ["a", "b"]
    assert left_out == {
        "c": "format: .wv files are not read; convert it to wav or flac",
        "d": "format: .AC3 files are not read; convert it to wav or flac",
    }


def test_a_kaldi_segment_to_the_end_of_the_recording(tmp_path: Path) -> None:
    recording(tmp_path, "r.wav", None)
    for name, line in (("wav.scp", "r r.wav"), ("text", "u Hello."), ("segments", "u r 0.5 -1")):
        (tmp_path / name).write_text(line + "\n")
    ((row,), left_out) = prepared(tmp_path, tmp_path / "out.jsonl", "kaldi")
    assert row["start"] == 0.5 and "duration" not in row and not left_out


def test_a_wav_in_a_kaldi_ark_and_a_pipe_that_is_not_run(tmp_path: Path) -> None:
    wavs = [encoded_tone(seconds, RATE, "WAV", None) for seconds in (1.0, 0.5)]
    (tmp_path / "raw.ark").write_bytes(b"u1 " + wavs[0] + b"u2 " + wavs[1])
    places = [3, 3 + len(wavs[0]) + 3]
    scp = [f"u1 {tmp_path}/raw.ark:{places[0]}", f"u2 raw.ark:{places[1]}", "u3 sox a.wav -t wav - |", "u4 raw.ark:1"]
    (tmp_path / "wav.scp").write_text("\n".join(scp) + "\n")
    (tmp_path / "text").write_text("".join(f"u{n} word\n" for n in range(1, 5)))
    rows, reasons = prepared(tmp_path, tmp_path / "m.jsonl", "kaldi")
    assert [len(load_audio(row.audio)) for row in Manifest(tmp_path / "m.jsonl")] == [16_000, 8_000] and len(rows) == 2
    assert "'sox a.wav -t wav - |' is a command" in reasons["u3"]
    assert "no wav of a known length begins at byte 1" in reasons["u4"]
