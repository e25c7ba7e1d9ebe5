"""Real folders: an unusable file is left out, and all other files are used."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest
from support.corpus_copies import RATE, encoded_tone
from support.shard_copies import tar

from blsp import cli
from blsp.data.audio import load_audio
from blsp.data.corpora.reading import CorpusError
from blsp.data.files import read_rows
from blsp.data.manifest import Manifest
from blsp.data.prepare import prepare
from blsp.settings import PrepareSettings

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
    assert [row["id"] for row in rows] == ["a"] and "is not UTF-8" in left_out["b.wav"]


def test_a_file_name_that_is_not_utf8_leaves_out_its_row(tmp_path: Path) -> None:
    recording(tmp_path / "r", "a.wav")
    shutil.copy(CLIP, os.path.join(os.fsencode(tmp_path / "r"), b"caf\xe9.wav"))
    rows, left_out = prepared(tmp_path / "r", tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == ["a"] and left_out == {"caf\\xe9.wav": "file name: it is not UTF-8"}


def test_two_recordings_of_one_name(tmp_path: Path) -> None:
    recording(tmp_path / "r", "a.wav")
    recording(tmp_path / "r", "a.flac", None)
    recording(tmp_path / "r", "b.wav")
    rows, left_out = prepared(tmp_path / "r", tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == ["a", "b"] and "a.flac is used" in left_out["a.wav"]


def test_every_recording_of_one_name_is_listed(tmp_path: Path) -> None:
    for name in ("a.ape", "a.flac", "a.wav", "a.wv"):
        recording(tmp_path / "r", name)
    ((row,), left_out) = prepared(tmp_path / "r", tmp_path / "out.jsonl")
    assert row["audio"].endswith("a.flac") and list(left_out) == ["a.ape", "a.wav", "a.wv"]


def test_suffixes_in_capitals_and_formats_of_phones(tmp_path: Path) -> None:
    for name in ("a.WAV", "b.m4a", "c.WebM", "d.amr", "e.oga"):
        recording(tmp_path / "r", name, None)
        (tmp_path / "r" / f"{name[0]}.TXT").write_text("Hello.")
    recording(tmp_path / "r", "f.m4a", None)
    rows, left_out = prepared(tmp_path / "r", tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == list("abcde") and "no transcript" in left_out["f.m4a"]


def test_recordings_that_no_decoder_reads_are_counted(tmp_path: Path) -> None:
    for name in ("a.wav", "b.mov", "c.wv", "d.AC3"):
        recording(tmp_path / "r", name)
    recording(tmp_path / "r", "e.ts", None)  # a program, or a film without a transcript
    rows, left_out = prepared(tmp_path / "r", tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == ["a", "b"]
    assert left_out == {
        "c.wv": "format: .wv files are not read; convert it to wav or flac",
        "d.AC3": "format: .AC3 files are not read; convert it to wav or flac",
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


# --- tables -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "texts", "broken"),
    [
        ("bom.csv", '\ufeffpath,sentence\r\na.wav,"two\r\nlines, ""quoted"""\r\n', ['two\r\nlines, "quoted"'], {}),
        ("capitals.csv", "Audio,Transcription\na.wav,one\n", ["one"], {}),
        ("quote.csv", 'path,text\na.wav,a "b"\n', ['a "b"'], {}),
        ("open.csv", 'path,text\na.wav,"open\na.wav,two\n', ["two"], {"open.csv:2": "unexpected end"}),
        ("odd.csv", 'path,text\na.wav,"open\na.wav,two\na.wav,"x"\na.wav,"a" b\na.wav,"c"\n', ["two", "x", "c"],
         {"odd.csv:2": "expected after", "odd.csv:5": "expected after"}),
        ("long.csv", 'path,text\na.wav,"open\n' + "a.wav,two words\n" * 9000, ["two words"] * 9000,
         {"long.csv:2": "field larger"}),
        ("lone.tsv", 'path\ttext\na.wav\t"lone\n', ['"lone'], {}),
        ("rows.jsonl", '\ufeff{"audio": "a.wav", "text": "one"}\n{broken\n', ["one"], {"rows.jsonl:2": "is not JSON"}),
    ],
)  # fmt: skip
def test_tables_as_people_have_them(
    name: str, content: str, texts: list[str], broken: dict[str, str], tmp_path: Path
) -> None:
    """A row that is broken is one row: those after it are read."""
    (tmp_path / name).write_bytes(content.encode())
    rows, left_out = prepared(tmp_path / name, tmp_path / "out.jsonl", Path(name).suffix[1:])
    assert [row["text"] for row in rows] == texts
    assert left_out.keys() == broken.keys() and all(reason in left_out[where] for where, reason in broken.items())


def test_the_first_segment_of_a_nemo_recording(tmp_path: Path) -> None:
    row = {"audio_filepath": "a.wav", "text": "one", "offset": 0.0, "duration": 0.5}
    (tmp_path / "m.json").write_text(json.dumps(row))
    ((found,), _) = prepared(tmp_path / "m.json", tmp_path / "out.jsonl", "nemo")
    assert (found["start"], found["duration"]) == (0.0, 0.5)


def test_a_table_that_is_compressed_and_one_that_is_an_array(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"audio": "a.wav", "text": "one"}\n'))
    ((row,), _) = prepared(tmp_path / "a.jsonl.gz", tmp_path / "out.jsonl", "jsonl")
    assert row["text"] == "one"
    (tmp_path / "b.json").write_text('[{"audio": "a.wav", "text": "one"}]')
    with pytest.raises(CorpusError, match=r"b\.json: is a JSON array; write one object a line"):
        prepare(PrepareSettings("jsonl", tmp_path / "b.jsonl", root=str(tmp_path / "b.json")))


def test_a_column_with_the_name_of_a_field_is_that_field(tmp_path: Path) -> None:
    rows = [
        {"id": 0, "audio": "a.wav", "text": "one", "options": ["yes", "no"], "instruction": "Choose."},
        {"id": "b", "audio": "b.wav", "text": "", "no_speech": True},
        {"id": "c", "audio": "c.wav", "text": "two", "options": "yes|no", "no_speech": False},
        {"id": "", "audio": "d.wav", "text": "three", "options": [1, 2]},
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared(tmp_path / "m.jsonl", tmp_path / "out.jsonl", "jsonl")
    first, silent, third, last = Manifest(tmp_path / "out.jsonl")
    assert (first.id, first.options, first.instruction) == ("0", ("yes", "no"), "Choose.")
    assert silent.no_speech and not third.no_speech
    assert third.extra["source_options"] == "yes|no" and last.extra == {"source_options": [1, 2]}
    assert last.id == "m-00000004"


def test_no_speech_in_a_table_without_types(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("id,audio,text,no_speech\na,a.wav,one,false\nb,b.wav,,True\nc,c.wav,,0\n")
    rows, left_out = prepared(tmp_path / "m.csv", tmp_path / "out.jsonl", "csv")
    assert [(row["id"], row["no_speech"]) for row in rows] == [("a", False), ("b", True)]
    assert left_out == {"c": "no transcript"}


def test_the_end_of_a_segment_gives_its_duration(tmp_path: Path) -> None:
    """Without it, a word would stand under all that follows."""
    rows = ["1,a.wav,0.5,2.25,one", "2,a.wav,,0.5,two", "3,a.wav,2,1,three", "4,a.wav,1,,four"]
    (tmp_path / "a.csv").write_text("\n".join(["id,path,start,end,text", *rows]))
    found, left_out = prepared(tmp_path / "a.csv", tmp_path / "out.jsonl", "csv")
    times = [(row.get("start"), row.get("duration")) for row in found]
    assert times == [(0.5, 1.75), (None, 0.5), (1.0, None)]
    assert left_out == {"3": "no time: end is 1 seconds, and start 2"}


def test_a_parquet_file_that_is_none_is_named(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "train.parquet").write_bytes(b"PAR1 no table PAR1")
    with pytest.raises(CorpusError, match=r"train\.parquet: damaged, or no Parquet or Arrow file"):
        prepare(PrepareSettings("hf", tmp_path / "out.jsonl", root=str(tmp_path)))


def test_a_broken_line_of_a_shar_is_one_row(tmp_path: Path) -> None:
    said = {"id": "a", "start": 0.0, "duration": 1.0, "text": "one"}
    cut = json.dumps({"id": "a", "duration": 1.0, "supervisions": [said]}).encode()
    (tmp_path / "cuts.000000.jsonl.gz").write_bytes(gzip.compress(b"{broken\n" + cut + b"\n"))
    tar(tmp_path / "recording.000000.tar", [("a.wav", CLIP.read_bytes())])
    ((row,), left_out) = prepared(tmp_path, tmp_path / "out.jsonl", "shar")
    assert row["text"] == "one" and "is not JSON" in left_out["cuts.000000.jsonl.gz:1"]
