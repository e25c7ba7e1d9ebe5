"""The frozen encoder's output on disk: computed once a clip, found by what the clip is, read as memory maps.

A folder serves any number of manifests and encoders: a clip's key is a hash of the audio file's bytes, the
cut (start, duration) and the encoder's identity (tensor digest, padding, version of the feature extraction).
So a clip that changes gets another key, and one that two manifests share is encoded once.

    >>> cache = FeatureCache("features", "an encoder's identity")      # features.encoder_id makes it
    >>> keys = cache.keys(rows)                 # 16 bytes each
    >>> cache.lengths(keys)                     # (n,) int32 encoder frames, 0 where it must be encoded first
    >>> cache.get(keys[0])                      # (T, E) float16, a view of the file
    >>> with cache.writer(rank=0) as writer: writer.add(key, states)

Layout: DIR/files/ (hashes of audio files), DIR/<encoder>/ (encoder.json, shards, their merged index).
Flow:   features.py (`blsp encode`) fills it, training reads it. Memory stays flat at ten million clips.

Letters: T encoder frames (50/s), E encoder width, n clips.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from blsp.data.manifest import Utterance
from blsp.features.content_hashes import ContentHashes
from blsp.features.shards import ShardWriter, forget_check, is_sound, open_shards

KEY_BYTES = 16
FRESH = 1 << 18  # keys added by this process that are kept in memory before the index is merged anew


class FeaturesError(ValueError):
    """An entry is not there or damaged; the message says how to make it."""


class FeatureCache:
    """One encoder's features in a folder. Reading is safe in threads and in worker processes."""

    def __init__(self, folder: str | os.PathLike[str], encoder_id: str) -> None:
        self.root, self.encoder_id = Path(folder), encoder_id
        self.folder = self.root / hashlib.blake2b(encoder_id.encode(), digest_size=8).hexdigest()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.hashes = ContentHashes(self.root / "files")
        self.width = self._read_width()
        self.refresh()

    def __reduce__(self) -> tuple[type[FeatureCache], tuple[Path, str]]:
        return FeatureCache, (self.root, self.encoder_id)

    def refresh(self) -> None:
        """See what was written since this cache was opened, by this process or another."""
        self._paths, self._table = open_shards(self.folder, self.width)
        self._data: dict[int, np.ndarray] = {}  # shard number -> its bytes
        self._sound = np.zeros(
            len(self._table), dtype=bool
        )  # entries whose checksum this process has compared
        self._fresh: set[bytes] = set()

    def __len__(self) -> int:
        """Clips in the index (those added since `refresh` not counted)."""
        return len(self._table)

    def key(self, row: Utterance) -> bytes:
        """The key of a row's speech; where its file cannot be read, one under which nothing is ever kept."""
        return self.keys([row])[0]

    def keys(self, rows: Sequence[Utterance]) -> list[bytes]:
        """The keys of several rows, in less time than one by one."""
        contents = self.hashes.of([row.audio for row in rows])
        return [self._key(row, content) for row, content in zip(rows, contents, strict=True)]

    def _key(self, row: Utterance, content: bytes | None) -> bytes:
        if content is None:
            content = b"unreadable" + row.audio.encode(errors="surrogateescape")
        cut = struct.pack("<dd", row.start or 0.0, row.duration or 0.0)
        return hashlib.blake2b(content + cut + self.encoder_id.encode(), digest_size=KEY_BYTES).digest()

    def has(self, key: bytes) -> bool:
        return bool(self.held([key])[0])

    def held(self, keys: Sequence[bytes]) -> np.ndarray:
        """(n,) bool: whether each clip is there; those that this process just added count."""
        return (self._table.find(keys) >= 0) | np.array([key in self._fresh for key in keys], dtype=bool)

    def lengths(self, keys: Sequence[bytes]) -> np.ndarray:
        """(n,) int32: each clip's encoder frames, 0 where it is not there."""
        if self._fresh:
            self.refresh()
        places = self._table.find(keys)
        if not len(self._table):
            return np.zeros(len(keys), dtype=np.int32)
        return np.where(places < 0, 0, self._table.records["frames"][places]).astype(np.int32)

    def get(self, key: bytes) -> np.ndarray:
        """(T, E) float16: a read-only view of the file; its checksum is compared the first time.

        Raises FeaturesError where there is no such entry or its bytes are damaged.
        """
        if key in self._fresh:
            self.refresh()
        place = int(self._table.find([key])[0])
        if place < 0:
            raise FeaturesError(
                f"{self.root}: no features under {key.hex()}; run `blsp encode` over the manifest"
            )
        record = self._table.records[place]
        data = self._shard(int(record["shard"]))
        if not self._sound[place]:
            if not is_sound(data, record, self.width):
                self._report_damage(int(record["shard"]))
            self._sound[place] = True
        begin, frames = int(record["offset"]), int(record["frames"])
        return data[begin : begin + frames * self.width * 2].view(np.float16).reshape(frames, self.width)

    def writer(self, rank: int = 0, width: int | None = None) -> ShardWriter:
        """A writer for this process; `width` (E) is needed when the first entry of an encoder is written."""
        if width is not None and not self.width:
            self._note_width(width)
        if not self.width or (width or self.width) != self.width:
            raise ValueError(f"{self.folder}: features are {self.width or 'not yet any'} wide, not {width}")
        return ShardWriter(self.folder, self.width, rank, self._on_add)

    def _on_add(self, key: bytes) -> None:
        self._fresh.add(key)
        if len(self._fresh) > FRESH:
            self.refresh()

    def _shard(self, number: int) -> np.ndarray:
        if number not in self._data:
            path = self._paths[number]
            self._data[number] = np.memmap(path, dtype=np.uint8, mode="r")
        return self._data[number]

    def _report_damage(self, shard: int) -> None:
        path = self._paths[shard]
        forget_check(path)
        raise FeaturesError(f"{path}: an entry is damaged; run `blsp encode` again, which makes it anew")

    def _read_width(self) -> int:
        path = self.folder / "encoder.json"
        return int(json.loads(path.read_text())["width"]) if path.exists() else 0

    def _note_width(self, width: int) -> None:
        partial = self.folder / f".encoder.{os.getpid()}.partial"
        partial.write_text(json.dumps({"encoder_id": self.encoder_id, "width": width}, indent=2) + "\n")
        os.replace(partial, self.folder / "encoder.json")
        self.width = width
