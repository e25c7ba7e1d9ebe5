"""From every kind of corpus to an answer: prepare, encode, train a few steps, generate; one good and one bad row each.

The bad row is named in a skip list, with the reason, and the good one gets through to the end.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile
from support.shard_copies import tar

from blsp import cli
from blsp.data.files import read_rows

TEXT = "hello world"
NOISE = b"these bytes are no recording" * 40
HELLO = Path(__file__).parent / "clips" / "hello.wav"

Corpus = tuple[list[str], str]  # flags of `blsp prepare`; a word of the reason why the bad row is left out


def clip(container: str = "WAV") -> bytes:
    audio, rate = soundfile.read(HELLO)
    out = io.BytesIO()
    soundfile.write(out, audio, rate, format=container)
    return out.getvalue()


def folder(root: Path) -> Corpus:
    for name, content in (("good.wav", clip()), ("bad.wav", NOISE)):
        (root / name).write_bytes(content)
        (root / name).with_suffix(".txt").write_text(TEXT)
    return ["folder", "--root", str(root)], "read as audio"


def csv(root: Path) -> Corpus:
    (root / "good.wav").write_bytes(clip())
    (root / "rows.csv").write_text(f"clip,said\ngood.wav,{TEXT}\nmissing.wav,{TEXT}\n")
    flags = ["--audio-column", "clip", "--text-column", "said"]
    return ["csv", "--root", str(root / "rows.csv"), *flags], "no such file"


def kaldi(root: Path) -> Corpus:
    (root / "good.wav").write_bytes(clip())
    (root / "wav.scp").write_text("good good.wav\nbad sox other.wav -t wav - |\n")
    (root / "text").write_text(f"good {TEXT}\nbad {TEXT}\n")
    (root / "segments").write_text("good good 0.05 -1\nbad bad 0 -1\n")
    return ["kaldi", "--root", str(root)], "is a command"


def nemo_tar(root: Path) -> Corpus:
    tar(root / "audio_0.tar", [("bad.wav", NOISE), ("good.wav", clip())])
    rows = [{"audio_filepath": f"{n}.wav", "text": TEXT, "duration": 1.0, "shard_id": 0} for n in ("good", "bad")]
    (root / "manifest.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["nemo", "--root", str(root / "manifest.json")], "read as audio"


def webdataset(root: Path) -> Corpus:
    files = [(f"{n}.{end}", data) for n, wav in (("bad", NOISE), ("good", clip("FLAC"))) for end, data in
             (("flac", wav), ("txt", TEXT.encode()))]  # fmt: skip
    tar(root / "train-000.tar.gz", files, "w:gz")
    return ["webdataset", "--root", str(root)], "read as audio"


def shar(root: Path) -> Corpus:
    with gzip.open(root / "cuts.000000.jsonl.gz", "wt") as file:
        for name in ("good", "bad"):
            said: dict[str, Any] = {"id": name, "start": 0.0, "duration": 1.0, "text": TEXT}
            file.write(json.dumps({"id": name, "duration": 1.0, "supervisions": [said]}) + "\n")
    tar(root / "recording.000000.tar", [("good.flac", clip("FLAC")), ("good.json", b"{}")])
    return ["shar", "--root", str(root)], "not in the recording's tar file"


def hf_parquet(root: Path) -> Corpus:
    datasets = pytest.importorskip("datasets")
    files = [{"bytes": clip("OGG"), "path": "good.ogg"}, {"bytes": NOISE, "path": "bad.ogg"}]
    made = datasets.Dataset.from_dict({"audio": files, "sentence": [TEXT, TEXT]})
    made.cast_column("audio", datasets.Audio()).to_parquet(root / "train-00000-of-00001.parquet")
    return ["hf", "--root", str(root)], "read as audio"


def common_voice(root: Path) -> Corpus:
    (root / "en" / "clips").mkdir(parents=True)
    for name in ("good", "bad"):
        (root / "en" / "clips" / f"{name}.mp3").write_bytes(clip("MP3"))
    rows = f"s\tgood.mp3\t{TEXT}\t2\t0\ns\tbad.mp3\tthe line\nbreaks here\t2\t0\n"
    (root / "en" / "train.tsv").write_text("client_id\tpath\tsentence\tup_votes\tdown_votes\n" + rows)
    return ["common-voice", "--root", str(root), "--language", "en"], "line break"


@pytest.mark.parametrize(
    "make", [folder, csv, kaldi, nemo_tar, webdataset, shar, hf_parquet, common_voice], ids=lambda make: make.__name__
)
def test_from_a_corpus_to_an_answer(
    make: Callable[[Path], Corpus], tmp_path: Path, tiny_whisper: str, tiny_llm: Callable[[str], str]
) -> None:
    root, cache = tmp_path / "corpus", str(tmp_path / "features")
    root.mkdir()
    corpus, reason = make(root)
    before = sorted(root.rglob("*"))
    manifest, answers = str(tmp_path / "rows.jsonl"), tmp_path / "answers.jsonl"

    def blsp(*arguments: str) -> None:
        assert cli.main([*arguments]) == 0, arguments

    blsp("prepare", *corpus, "--out", manifest)
    blsp("encode", "--manifest", manifest, "--audio-model", tiny_whisper, "--cache", cache, "--device", "cpu")
    models = ["--audio-model", tiny_whisper, "--llm", tiny_llm("llama"), "--device", "cpu"]
    loss = ["--adapter", "grounded", "--loss", "ctc", "--readout", "data", "--steps", "2", "--batch-size", "1"]
    blsp("train", "--data", manifest, "--out", str(tmp_path / "run"), *models, *loss, "--cache", cache)
    blsp("train", "--data", manifest, "--out", str(tmp_path / "online"), *models, *loss)  # from the audio
    adapter = str(tmp_path / "run" / "adapter")
    blsp("generate", "--model", adapter, "--manifest", manifest, "--out", str(answers), "--max-new-tokens", "3")

    (answered,) = [row for _, row in read_rows(answers)]
    assert answered["text"] == TEXT and isinstance(answered["response"], str)
    skipped = [row for path in tmp_path.rglob("*.skipped.jsonl") for _, row in read_rows(path)]
    assert skipped and {row["id"] for row in skipped}.isdisjoint({answered["id"]})
    assert any(reason in row["reason"] for row in skipped)
    assert sorted(root.rglob("*")) == before, "nothing is written into the corpus"
