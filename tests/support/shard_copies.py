"""Tiny copies of tables and shards that people have: CSV, NeMo, WebDataset, Lhotse Shar, with tones for speech.

In: an empty folder. Out: as in corpus_copies.py. Each copy has a row that cannot be used.
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from support.corpus_copies import COPIES, RATE, Copy, encoded_tone, tone, write

SAMPLE = encoded_tone(1.0, RATE, "FLAC", None)


def tar(path: Path, files: Iterable[tuple[str, bytes]], mode: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def lines(path: Path, rows: Iterable[dict[str, Any]], extra: str = "") -> None:
    write(path, "".join(json.dumps(row) + "\n" for row in rows) + extra)


def csv(root: Path) -> Copy:
    for name in "abc":
        tone(root / "clips" / f"{name}.wav")
    write(root / "mine.csv", 'clip,said,lang\nclips/a.wav,"Hello, you",en\nclips/b.wav\nclips/c.wav,"two\nlines",de\n')
    flags = {"root": root / "mine.csv", "audio_column": "clip", "text_column": "said"}
    return flags, [
        ("mine-00000002", "Hello, you", {"language": "en", "lang": "en"}),
        ("mine-00000004", "two\nlines", {"language": "de"}),
    ]


def csv_semicolons(root: Path) -> Copy:
    tone(root / "a.wav", seconds=3.0)
    write(root / "train.csv", "\ufeffid;path;sentence;start;duration\nx;a.wav;eins, zwei;1.5;1\ny;a.wav;drei;1,5;1\n")
    return {}, [("x", "eins, zwei", {"start": 1.5, "duration": 1.0})]


def tsv(root: Path) -> Copy:
    for name in "ab":
        tone(root / f"{name}.mp3")
    write(root / "dev.tsv", f'path\ttranscript\tspeaker_id\na.mp3\tsay "hi\t7\n{root}/b.mp3\ttwo\t8\nbroken line\n')
    return {"split": "dev"}, [
        ("dev-00000002", 'say "hi', {"speaker": "7"}),
        ("dev-00000003", "two", {"speaker": "8", "start": None}),
    ]


def jsonl(root: Path) -> Copy:
    tone(root / "a.flac")
    rows = [{"audio": "a.flac", "text": "one", "n": 1}, {"audio": "a.flac", "text": "two", "id": 5}, {"text": "three"}]
    lines(root / "mine.jsonl", rows, "{torn\n")
    return {"root": root / "mine.jsonl"}, [("mine-00000001", "one", {"n": 1}), ("5", "two", {})]


def nemo(root: Path) -> Copy:
    tone(root / "a.wav", seconds=2.0)
    rows = [
        {"audio_filepath": "a.wav", "text": "whole", "duration": 2.1},
        {"audio_filepath": f"{root}/a.wav", "text": "part", "duration": 0.5, "offset": 1.0, "lang": "en"},
        {"audio_filepath": "a.wav", "text": "", "duration": 2.0},
    ]
    lines(root / "manifest.json", rows)
    return {"root": root / "manifest.json"}, [
        ("manifest-00000001", "whole", {"start": None, "duration": None}),
        ("manifest-00000002", "part", {"start": 1.0, "duration": 0.5, "language": "en"}),
    ]


def nemo_tarred(root: Path) -> Copy:
    for shard in range(2):
        tar(root / f"audio_{shard}.tar", [(f"{name}.flac", SAMPLE) for name in "ab"])
    rows = [
        {"audio_filepath": "a.flac", "text": "one", "duration": 1.0, "shard_id": 0},
        {"audio_filepath": "b-sub1.flac", "text": "two", "duration": 0.5, "offset": 0.25, "shard_id": 1},
        {"audio_filepath": "c.flac", "text": "gone", "duration": 1.0, "shard_id": 1},
    ]
    lines(root / "tarred_audio_manifest.json", rows)
    return {"root": root / "tarred_audio_manifest.json"}, [
        ("0/a.flac", "one", {}),
        ("1/b-sub1.flac", "two", {"start": 0.25, "duration": 0.5}),
    ]


def webdataset(root: Path, mode: str = "w", ending: str = "tar") -> Copy:
    meta = {"text": "two", "speaker": "s", "duration": 1.0}
    tar(
        root / f"train-000.{ending}",
        [
            *(("./a/1.flac", SAMPLE), ("./a/1.txt", b"one\n"), ("./a/._1.flac", b"AppleDouble")),
            *(("./a/2.json", json.dumps(meta).encode()), ("./a/2.flac", SAMPLE), ("b/3.txt", b"no audio")),
        ],
        mode,
    )
    tar(root / f"train-001.{ending}", [("1.x.FLAC", SAMPLE), ("1.json", b'{"sentence": "three"}')], mode)
    return {"root": f"{root}/train-{{000..001}}.{ending}"}, [
        ("train-000/./a/1", "one", {}),
        ("train-000/./a/2", "two", {"speaker": "s", "source_duration": 1.0, "duration": None}),
        ("train-001/1", "three", {}),
    ]


def webdataset_compressed(root: Path) -> Copy:
    _, rows = webdataset(root / "train", "w:gz", "tar.gz")
    return {"root": root}, rows


def shar(root: Path) -> Copy:
    recording = {"id": "r", "sources": [{"type": "shar", "channels": [0], "source": ""}], "duration": 1.0}
    sup = {"recording_id": "r", "start": 0.0, "duration": 1.0, "channel": 0, "language": "English", "speaker": "s"}
    for number in range(2):
        ids = [f"c{number}-{i}" for i in range(2)]
        cuts = [
            {"id": id, "start": 0.0, "duration": 1.0, "recording": recording, "type": "MonoCut"}
            | {"supervisions": [sup | {"id": f"s-{id}", "text": f"said {id}"}]}
            for id in ids
        ]
        cuts[0]["supervisions"].append(sup | {"id": f"t-{ids[0]}", "text": "part", "start": 0.5, "duration": 0.25})
        (root / "dev").mkdir(parents=True, exist_ok=True)
        with gzip.open(root / "dev" / f"cuts.00000{number}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(cut) + "\n" for cut in cuts)
        held = ids if number == 0 else ids[:1]
        tar(
            root / "dev" / f"recording.00000{number}.tar",
            [each for id in held for each in ((f"{id}.flac", SAMPLE), (f"{id}.json", b"{}"))],
        )
    same = {"language": "en", "speaker": "s"}
    part = {"start": 0.5, "duration": 0.25} | same
    return {"split": "dev"}, [
        ("s-c0-0", "said c0-0", {"start": None} | same),
        ("t-c0-0", "part", part),
        ("s-c0-1", "said c0-1", same),
        ("s-c1-0", "said c1-0", same),
        ("t-c1-0", "part", part),
    ]


COPIES |= {
    "csv": ("csv", csv),
    "csv semicolons": ("csv", csv_semicolons),
    "tsv": ("tsv", tsv),
    "jsonl": ("jsonl", jsonl),
    "nemo": ("nemo", nemo),
    "nemo tarred": ("nemo", nemo_tarred),
    "webdataset": ("webdataset", webdataset),
    "webdataset compressed": ("webdataset", webdataset_compressed),
    "shar": ("shar", shar),
}
