"""Shards behind URLs, damaged shards, and the names of shards."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest
from support.object_stores import s3_bucket
from support.shard_copies import SAMPLE, shar, tar, webdataset

from blsp.data.audio import load_audio
from blsp.data.corpora.shards import expand_braces
from blsp.data.files import read_rows
from blsp.data.manifest import Manifest
from blsp.data.prepare import prepare
from blsp.settings import PrepareSettings


def test_names_in_braces() -> None:
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{a,b}/{0..1}.tar") == ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]
    assert expand_braces("plain.tar") == ["plain.tar"]


@pytest.mark.parametrize("store", ["memory", "s3"])
@pytest.mark.parametrize("kind", ["webdataset", "shar"])
def test_shards_behind_a_url(kind: str, store: str, tmp_path: Path) -> None:
    flags, rows = {"webdataset": webdataset, "shar": shar}[kind](tmp_path / kind)
    given = {"split": flags.get("split", "train"), "check_audio": True}

    def read(base: str) -> None:
        system, path = fsspec.url_to_fs(base)
        system.put(f"{tmp_path}/{kind}", path, recursive=True)
        prepare(PrepareSettings(kind, tmp_path / "m.jsonl", root=base, **given))
        found = list(Manifest(tmp_path / "m.jsonl"))
        assert [(row.id, row.text) for row in found] == [(id, text) for id, text, _ in rows]
        assert all(row.audio.startswith(f"{store}://") and "#bytes=" in row.audio for row in found)
        assert len(load_audio(found[0].audio)) == 16_000

    if store == "memory":
        read(f"memory://shards/{tmp_path.name}")
    else:
        with s3_bucket() as bucket:
            read(f"{bucket}/{tmp_path.name}")


@pytest.mark.parametrize(
    ("corpus", "root"),
    [
        ("webdataset", "shards/train-{000..001}.tar"),
        ("webdataset", "shards/train-000.tar"),
        ("webdataset", "shards/train-*.tar"),
        ("webdataset", "shards"),
        ("shar", "shards/dev/cuts.{000000..000001}.jsonl.gz"),
        ("shar", "shards/dev"),
    ],
)
def test_a_root_in_the_working_folder(corpus: str, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    {"webdataset": webdataset, "shar": shar}[corpus](tmp_path / "shards")
    monkeypatch.chdir(tmp_path)
    prepare(PrepareSettings(corpus, Path("out/m.jsonl"), root=root))
    rows = list(Manifest("out/m.jsonl"))
    assert rows and all(len(load_audio(row.audio)) == 16_000 for row in rows)


def test_cuts_in_the_working_folder_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shar(tmp_path)
    monkeypatch.chdir(tmp_path / "dev")
    prepare(PrepareSettings("shar", tmp_path / "m.jsonl", root="cuts.{000000,000001}.jsonl.gz"))
    assert len(Manifest(tmp_path / "m.jsonl")) == 5


def test_a_damaged_shard_gives_the_rows_before_the_damage(tmp_path: Path) -> None:
    for number in range(3):
        files = [(f"{n}.{ending}", data) for n in range(3) for ending, data in (("txt", b"word"), ("flac", SAMPLE))]
        tar(tmp_path / f"{number}.tar", files)
    data = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(data[: len(data) // 2])
    prepare(PrepareSettings("webdataset", tmp_path / "m.jsonl", root=str(tmp_path), check_audio=True))
    ids = [row.id for row in Manifest(tmp_path / "m.jsonl")]
    assert [id for id in ids if not id.startswith("1/")] == [f"{shard}/{n}" for shard in "02" for n in range(3)]
    assert 0 < sum(id.startswith("1/") for id in ids) < 3
    reasons = {row["reason"].partition(":")[0] for _, row in read_rows(f"{tmp_path}/m.jsonl.skipped.jsonl")}
    assert reasons == {"damaged shard", "audio"}  # and the clip that is cut through
