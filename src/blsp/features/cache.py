"""Feature cache: the frozen encoder's output on disk, found by the content of the audio, read as memory maps.

In:  rows with audio, and the identity of an encoder (its tensor digest, padding, version of the mel features).
Out: keys of 16 bytes; encoder states (T, E) float16.
Try: `cache = FeatureCache("features", identity); cache.get(cache.key(row))`
Flow: `blsp encode` (encode.py) → **cache.py** → training/examples.py

A key is a hash of the audio's bytes, the cut (start, duration) and the encoder. So a changed clip gets another key, and
a clip in two manifests is encoded once. The hash of the bytes is stored for the file and for the row, so the features
can still be found after the audio was deleted or the manifest moved. The folder:

    files/NAME.log              records for each clip: hash of (path, size, time), hash of its bytes; and
                                hash of (id, text, cut, name of the file), hash of its bytes
    ENCODER/encoder.json        the encoder's identity and width E
    ENCODER/NAME.f16            a shard: frames of E float16 numbers, clip after clip
    ENCODER/NAME.idx            one record for each clip: key, offset in bytes, frames, CRC-32 of its bytes
    ENCODER/NAME.ok             size and time of both at the last check, and which records are damaged
    */index-DIGEST.npy          all records of all logs, sorted by key (and index-DIGEST.keys.npy: the keys alone)

Each process appends to its own files, so no locks are needed. A record is written after its bytes, so a killed writer
leaves no wrong record. A shard that changed after its .ok file was written is checked again; damaged clips are left out
of the index, and `blsp encode` makes them again. The index has a digest of the logs' names and sizes in its name.

Shapes: T encoder frames (50/s), E encoder width, n clips.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from blsp.data.files import append_bytes, require_there, write_json
from blsp.data.manifest import Utterance
from blsp.features.content_hashes import KEY, ContentHashes, cut_bytes, key_of, open_index, read_log

CLIP = np.dtype([("key", KEY), ("offset", "<u8"), ("frames", "<u4"), ("crc", "<u4")])  # in a shard's .idx
INDEXED_CLIP = np.dtype([*CLIP.descr, ("shard", "<u4")])  # in the index
SHARD_BYTES = 8 << 30  # a writer starts another shard after this many bytes
CHECKERS = 4  # shards that are checked at the same time
UNINDEXED_KEYS = 1 << 18  # the index is made again after this process has added more clips than this


class FeaturesError(ValueError):
    """An entry is missing or damaged; the message says how to make it."""


class FeatureCache:
    """One encoder's features in a folder. Threads and worker processes may read at the same time."""

    def __init__(self, folder: str | os.PathLike[str], encoder_id: str) -> None:
        self.root, self.encoder_id = Path(folder), encoder_id
        self.folder = self.root / hashlib.blake2b(encoder_id.encode(), digest_size=8).hexdigest()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.hashes = ContentHashes(self.root / "files")
        note = self.folder / "encoder.json"
        self.width = int(json.loads(note.read_text())["width"]) if note.exists() else 0
        self.refresh()

    def __reduce__(self) -> tuple[type[FeatureCache], tuple[Path, str]]:
        return FeatureCache, (self.root, self.encoder_id)

    def refresh(self) -> None:
        """Include the clips that any process has written since the cache was opened."""
        self._shards = sorted(path for path in self.folder.glob("*.f16") if path.with_suffix(".idx").exists())
        with ThreadPoolExecutor(CHECKERS) as pool:
            states = list(pool.map(lambda path: checked(path, self.width), self._shards))
        signature = [[path.name, *asdict(state).values()] for path, state in zip(self._shards, states, strict=True)]
        self._index = open_index(self.folder, signature, lambda: _sound_clips(self._shards, states))
        self._data: dict[int, np.ndarray] = {}  # number of a shard -> its bytes
        self._compared = np.zeros(len(self._index), dtype=bool)  # clips whose checksum this process compared
        self._unindexed: set[bytes] = set()

    def __len__(self) -> int:
        """Number of clips in the index, without those added since the last `refresh`."""
        return len(self._index)

    def key(self, row: Utterance, *, check: bool = True) -> bytes:
        """The key of a row's speech; for audio that cannot be read, a key that no clip has."""
        return self.keys([row], check=check)[0]

    def keys(self, rows: Sequence[Utterance], *, check: bool = True) -> list[bytes]:
        """The keys of several rows, faster than one by one. check: see `ContentHashes.of`."""
        contents = self.hashes.of(rows, check=check)
        return [self.key_with(row, content) for row, content in zip(rows, contents, strict=True)]

    def key_with(self, row: Utterance, content: bytes | None) -> bytes:
        """The key of a row whose audio has this hash."""
        content = content or b"unreadable" + row.audio.encode(errors="surrogateescape")
        return key_of(content + cut_bytes(row) + self.encoder_id.encode())

    def has(self, key: bytes) -> bool:
        return bool(self.held([key])[0])

    def held(self, keys: Sequence[bytes]) -> np.ndarray:
        """(n,) bool: whether the cache has each clip; clips that this process has just added count."""
        return (self._index.find(keys) >= 0) | np.array([key in self._unindexed for key in keys], dtype=bool)

    def lengths(self, keys: Sequence[bytes]) -> np.ndarray:
        """(n,) int32: the encoder frames of each clip, 0 for a missing one."""
        if self._unindexed:
            self.refresh()
        rows = self._index.find(keys)
        lengths = np.zeros(len(keys), dtype=np.int32)
        lengths[rows >= 0] = self._index.records["frames"][rows[rows >= 0]]
        return lengths

    def get(self, key: bytes) -> np.ndarray:
        """(T, E) float16: a read-only view of the file; its checksum is compared the first time.

        Raises FeaturesError if there is no such entry or its bytes are damaged.
        """
        if key in self._unindexed:
            self.refresh()
        row = int(self._index.find([key])[0])
        if row < 0:
            raise FeaturesError(f"{self.root}: no features under {key.hex()}; run `blsp encode` over the manifest")
        clip = self._index.records[row]
        shard = int(clip["shard"])
        if shard not in self._data:
            self._data[shard] = np.memmap(self._shards[shard], dtype=np.uint8, mode="r")
        data = self._data[shard]
        if not self._compared[row] and not is_sound(data, clip, self.width):
            self._shards[shard].with_suffix(".ok").unlink(missing_ok=True)  # the next start checks the shard again
            raise FeaturesError(
                f"{self._shards[shard]}: an entry is damaged; run `blsp encode` again, which makes it anew"
            )
        self._compared[row] = True
        begin, frames = int(clip["offset"]), int(clip["frames"])  # float16: 2 bytes a number
        return data[begin : begin + frames * self.width * 2].view(np.float16).reshape(frames, self.width)

    def writer(self, rank: int = 0, width: int | None = None) -> ShardWriter:
        """A writer for this process. width: E; an encoder's first writer must give it."""
        if width is not None and not self.width:
            write_json(self.folder / "encoder.json", {"encoder_id": self.encoder_id, "width": width})
            self.width = width
        if not self.width or (width or self.width) != self.width:
            raise ValueError(f"{self.folder}: features are {self.width or 'not yet any'} wide, not {width}")
        return ShardWriter(self.folder, self.width, rank, self._note_added)

    def _note_added(self, key: bytes) -> None:
        self._unindexed.add(key)
        if len(self._unindexed) > UNINDEXED_KEYS:
            self.refresh()


# --- shards -----------------------------------------------------------------------------------------------
class ShardWriter:
    """Appends clips to its own shards; an added clip is kept even if the process is killed."""

    def __init__(self, folder: Path, width: int, rank: int, on_add: Callable[[bytes], None]) -> None:
        self.folder, self.width, self.rank = folder, width, rank
        self._on_add = on_add
        self._files: list[FileIO] = []  # the shard and its records
        self._offset = 0

    def add(self, key: bytes, states: np.ndarray) -> None:
        """Write one clip's features (T, E) float16 under its key."""
        if states.ndim != 2 or states.shape[1] != self.width or not len(states) or states.dtype != np.float16:
            raise ValueError(f"features are (T, {self.width}) float16 here, not {states.shape} {states.dtype}")
        if not self._files:
            path = self.folder / f"{self.rank:04}-{time.time_ns():x}-{os.getpid():x}"
            self._files = [open(path.with_suffix(s), "xb", buffering=0) for s in (".f16", ".idx")]  # noqa: SIM115
            self._offset = 0
        content = np.ascontiguousarray(states).view(np.uint8).reshape(-1).data
        record = np.array([(key, self._offset, len(states), zlib.crc32(content))], dtype=CLIP)
        parts: list[Any] = [content, record.tobytes()]  # the clip's bytes first: see the module's docstring
        for file, part in zip(self._files, parts, strict=True):
            append_bytes(file, part)
        self._offset += len(content)
        self._on_add(key)
        if self._offset >= SHARD_BYTES:
            self.close()

    def close(self) -> None:
        """Close the shard and note that it is complete; the next clip starts another."""
        for file in self._files:
            require_there(file)
            file.close()
        if self._files:
            path = Path(self._files[0].name)
            write_json(path.with_suffix(".ok"), asdict(_state(path)))
        self._files = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class ShardState:
    """Size, time and records of a shard when it was checked."""

    bytes: int
    time: int  # nanoseconds
    records: int
    damaged: tuple[int, ...] = ()  # numbers of the records with a wrong checksum


def _state(path: Path, damaged: Sequence[int] = ()) -> ShardState:
    stat = path.stat()
    records = path.with_suffix(".idx").stat().st_size // CLIP.itemsize
    return ShardState(stat.st_size, stat.st_mtime_ns, records, tuple(damaged))


def checked(path: Path, width: int) -> ShardState:
    """The shard's state; checksums are compared unless the .ok file describes the files as they are now."""
    now, note = _state(path), path.with_suffix(".ok")
    if note.exists():
        known = ShardState(**json.loads(note.read_text()))
        if (known.bytes, known.time, known.records) == (now.bytes, now.time, now.records):
            return known
    data = np.memmap(path, dtype=np.uint8, mode="r") if now.bytes else np.zeros(0, dtype=np.uint8)
    clips = read_log(path.with_suffix(".idx"), CLIP)[: now.records]
    damaged = tuple(number for number, clip in enumerate(clips) if not is_sound(data, clip, width))
    state = ShardState(now.bytes, now.time, now.records, damaged)
    if os.access(path.parent, os.W_OK):
        write_json(note, asdict(state))
    return state


def is_sound(data: np.ndarray, clip: np.void, width: int) -> bool:
    """Whether the shard `data` (bytes,) holds the clip's bytes with the right checksum."""
    begin = int(clip["offset"])
    end = begin + int(clip["frames"]) * width * 2
    return begin < end <= len(data) and zlib.crc32(data[begin:end].data) == clip["crc"]


def _sound_clips(paths: Sequence[Path], states: Sequence[ShardState]) -> np.ndarray:
    """(n,) INDEXED_CLIP: the undamaged clips of all shards."""
    parts = []
    for number, (path, state) in enumerate(zip(paths, states, strict=True)):
        clips = np.delete(read_log(path.with_suffix(".idx"), CLIP)[: state.records], list(state.damaged))
        part = np.empty(len(clips), dtype=INDEXED_CLIP)
        part[[*(CLIP.names or ())]] = clips
        part["shard"] = number
        parts.append(part)
    return np.concatenate([np.zeros(0, dtype=INDEXED_CLIP), *parts])
