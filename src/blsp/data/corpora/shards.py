"""Readers of corpora in tar files: WebDataset, and Lhotse Shar.

In:  a folder, a pattern (`shards/train-{000..099}.tar`, `s3://bucket/shards/*.tar`), or one tar file.
Out: utterances, one at a time, in the order of the shards; their audio is not copied.
Try: `blsp prepare webdataset --root "shards/train-{000..099}.tar" --out train.jsonl`
Flow: data/corpora/ — `data/prepare.py` names the readers in `READERS`.

A row names its audio as a byte range of the tar file, or as a member if the tar file is compressed (data/addresses.py).
WebDataset: members with the same name up to the first dot are one sample (github.com/webdataset/webdataset). Shar:
cuts.000000.jsonl.gz beside recording.000000.tar (lhotse.readthedocs.io, "Shar"). The samples of an incomplete shard are
used, and the shard is counted as damaged.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import fsspec

from blsp.data.addresses import is_url, open_url
from blsp.data.containers import AUDIO_SUFFIXES
from blsp.data.corpora.columns import TEXT_COLUMNS, table_row
from blsp.data.corpora.folders import supervision_row
from blsp.data.corpora.reading import Corpus, CorpusError, Dropped, ReadRequest, Row, Rows, read_objects

WEBDATASET = Corpus("WebDataset shards", "https://github.com/webdataset/webdataset (their format)")
SHAR = Corpus("Lhotse Shar", "https://lhotse.readthedocs.io (its format)")
TEXT_MEMBERS = ("txt", "text", "lab", "transcript")  # endings of members that hold a sample's transcript
MOST_TEXT_BYTES = 1 << 20  # of a member that is read for its text


@dataclass(frozen=True)
class Member:
    """A file in a tar file, with its `content` if it is small and not audio."""

    name: str
    address: str
    content: bytes | None = None

    @property
    def key(self) -> str:
        """The sample's name: the path up to the first dot of its last part."""
        folder, slash, name = self.name.rpartition("/")
        return folder + slash + name.partition(".")[0]

    @property
    def ending(self) -> str:
        return self.name.rpartition(".")[2].lower()


def tar_members(path: str) -> Iterator[Member | Dropped]:
    """The files in a tar file, in order; at the end `Dropped` if it is damaged."""
    name = path.rpartition("/")[2]
    try:
        with open_url(path) if is_url(path) else open(path, "rb") as file, tarfile.open(fileobj=file) as tar:
            compressed = tar.fileobj is not file
            for member in tar:
                hidden = os.path.basename(member.name).startswith(".")  # macOS writes ._a.wav beside a.wav
                if not member.isreg() or hidden:
                    continue
                span = f"bytes={member.offset_data}+{member.size}"
                address = f"{path}#member={member.name}" if compressed else f"{path}#{span}"
                is_text = f".{member.name.rpartition('.')[2].lower()}" not in AUDIO_SUFFIXES
                content = tar.extractfile(member) if is_text and member.size <= MOST_TEXT_BYTES else None
                yield Member(member.name, address, content.read() if content else None)
    except Exception as error:  # tarfile, zlib, lzma and every file system have their own errors
        yield Dropped(name, path, f"damaged shard: {error or type(error).__name__}")


def webdataset(request: ReadRequest) -> Rows:
    """A sample's transcript is its .txt, or a column of its .json; the other values of the .json are kept."""
    tars = find_files(request.root, request.splits, "*.tar*")
    if not tars:
        raise CorpusError(f"{request.root}: no .tar file there; name a folder or a pattern; see {WEBDATASET.page}")
    for path in tars:
        yield from read_webdataset(path, request)


def read_webdataset(path: str, request: ReadRequest) -> Rows:
    """The samples of one shard."""
    for key, group in groupby(tar_members(path), key=lambda member: getattr(member, "key", None)):
        members = list(group)
        shard = path.rpartition("/")[2].partition(".")[0]
        for member in members:
            if isinstance(member, Dropped):
                yield member
        files = {member.ending: member for member in members if isinstance(member, Member)}
        if files:
            yield _sample(f"{shard}/{key}", path, files, request)


def _sample(id: str, path: str, files: dict[str, Member], request: ReadRequest) -> Row:
    asked = request.audio_column
    audio = files.get(asked) if asked else next((f for e, f in files.items() if f".{e}" in AUDIO_SUFFIXES), None)
    if audio is None:
        return Dropped(id, path, f"no audio: the sample has only {', '.join(files)}")
    try:
        values = json.loads(files["json"].content or b"{}") if "json" in files else {}
        values = values if isinstance(values, dict) else {}
        text = next((files[ending] for ending in TEXT_MEMBERS if ending in files), None)
        column = request.text_column or next((name for name in TEXT_COLUMNS if name in values), "text")
        if text is not None and request.text_column is None:
            values["text"], column = (text.content or b"").decode("utf-8-sig").strip(), "text"
    except ValueError as error:  # of UTF-8 and of JSON
        return Dropped(id, path, f"transcript: {error}")
    # here `start` and `duration` say where the sample was cut from the original: it must not be cut again
    given = {
        f"source_{name}" if name in ("start", "duration", "end") else name: value for name, value in values.items()
    }
    return table_row(id, given | {"id": id, "audio": audio.address}, ("audio", column), request)


# --- Lhotse Shar ------------------------------------------------------------------------------------------


def shar(request: ReadRequest) -> Rows:
    """Each supervision of each cut; in Shar, a recording contains only the cut."""
    cuts = find_files(request.root, request.splits, "cuts.*.jsonl*")
    if not cuts:
        raise CorpusError(f"{request.root}: no cuts.000000.jsonl.gz; is it a folder of {SHAR.name}? See {SHAR.page}")
    for path in cuts:
        number = path.rpartition("/")[2].split(".")[1]
        tars = find_files(path.rpartition("/")[0], [], f"recording.{number}.tar*")
        members = list(tar_members(tars[0])) if tars else []  # of one shard
        yield from (member for member in members if isinstance(member, Dropped))
        audio = {m.name.rpartition(".")[0]: m for m in members if isinstance(m, Member) and m.content is None}
        for line, cut in read_objects(path):
            if isinstance(cut, Dropped):
                yield cut
                continue
            try:
                yield from _cut_rows(cut, audio, path)
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                yield Dropped(f"{path.rpartition('/')[2]}:{line}", path, f"broken row: not a cut of Shar ({error!r})")


def _cut_rows(cut: dict[str, Any], audio: dict[str, Member], path: str) -> Rows:
    recording = audio.get(str(cut["id"]))
    for supervision in cut.get("supervisions", []):
        if recording is None:
            yield Dropped(str(supervision["id"]), path, f"no audio: {cut['id']} is not in the recording's tar file")
        else:
            yield supervision_row(supervision, recording.address, 0.0, float(cut["duration"]))


# --- files ------------------------------------------------------------------------------------------------


def find_files(root: str, splits: list[str], pattern: str) -> list[str]:
    """The sorted files (paths or URLs) of a folder or its subfolder SPLIT, or those that the pattern `root` matches."""
    if "{" in root or "*" in root or re.search(r"\.tar(\.\w+)?$", root):
        return [path for name in expand_braces(root) for path in (_glob(name) if "*" in name else [_whole(name)])]
    folders = [f"{root.rstrip('/')}/{split}" for split in splits]
    within = [path for folder in folders for path in _glob(f"{folder}/{pattern}")]
    return within or _glob(f"{root.rstrip('/')}/{pattern}")


def expand_braces(pattern: str) -> list[str]:
    """`a-{000..002}.tar` -> a-000.tar, a-001.tar, a-002.tar; `{a,b}.tar` -> a.tar, b.tar."""
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if braces is None:
        return [pattern]
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
    if ends:
        names = [f"{number:0{len(ends[1])}d}" for number in range(int(ends[1]), int(ends[2]) + 1)]
    else:
        names = braces[1].split(",")
    begin, end = pattern[: braces.start()], pattern[braces.end() :]
    return [whole for name in names for whole in expand_braces(begin + name + end)]


def _whole(path: str) -> str:
    """A URL as it is, or an absolute path: a manifest's relative paths begin in its own folder."""
    return path if is_url(path) else os.path.abspath(path)


def _glob(pattern: str) -> list[str]:
    try:
        system, path = fsspec.url_to_fs(_whole(pattern))
        names = sorted(str(name) for name in system.glob(path))
    except Exception as error:  # every file system of fsspec has its own errors
        raise CorpusError(f"{pattern}: cannot be listed ({error})") from error
    return [system.unstrip_protocol(name) if is_url(pattern) else name for name in names]
