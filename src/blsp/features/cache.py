"""Feature cache: the frozen encoder's output on disk, found by the content of the audio, read as memory maps.

In:  rows with audio, and the identity of an encoder (its tensor digest, padding, version of the mel features).
Out: keys of 16 bytes; encoder states (T, E) float16.
Try: `cache = FeatureCache("features", identity); cache.get(cache.key(row))`
Flow: `blsp encode` (encode.py) → **cache.py** → training/examples.py

A key is a hash of the audio file's bytes, the cut (start, duration) and the encoder. So a clip that changes gets
another key, and a clip that two manifests share is encoded once. The folder:

    files/NAME.log              one record for each audio file: hash of (path, size, time), hash of its bytes
    ENCODER/encoder.json        the encoder's identity and width E
    ENCODER/NAME.f16            a shard: frames of E float16 numbers, clip after clip
    ENCODER/NAME.idx            one record for each clip: key, offset in bytes, frames, CRC-32 of its bytes
    ENCODER/NAME.ok             size and time of both at the last check, and which records are damaged
    */index-DIGEST.npy          all records of all logs, sorted by key (and index-DIGEST.keys.npy: the keys alone)

Each process appends to files of its own, so no locks are needed. A record is written after its bytes, so a killed
writer leaves nothing that counts. A shard that changed since its .ok file is checked again; damaged clips are left out
of the index, and `blsp encode` makes them again. The index is named by a digest of the logs' names and sizes.

Shapes: T encoder frames (50/s), E encoder width, n clips.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from blsp.data.files import write_atomically, write_json
from blsp.data.manifest import Utterance

KEY = "S16"  # 16 bytes; numpy compares such strings byte by byte
CLIP = np.dtype([("key", KEY), ("offset", "<u8"), ("frames", "<u4"), ("crc", "<u4")])  # in a shard's .idx
INDEXED_CLIP = np.dtype([*CLIP.descr, ("shard", "<u4")])  # in the index
FILE = np.dtype([("key", KEY), ("content", "V16")])  # in the logs of audio files
SHARD_BYTES = 8 << 30  # a writer begins another shard after this many bytes
CHECKERS = 4  # shards that are checked at the same time
UNINDEXED_KEYS = 1 << 18  # clips that this process added since the index was made; more of them, and it is made again
RECENT_FILES = 1 << 14  # hashes of this process that are held in memory
SETTLED_NS = 2_000_000_000  # a younger file may change again without a change of its time stamp


class FeaturesError(ValueError):
    """An entry is missing or damaged; the message says how to make it."""


def key_of(content: bytes) -> bytes:
    """The 16-byte hash of a few bytes."""
    return hashlib.blake2b(content, digest_size=16).digest()


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
        """Include what this process or another has written since the cache was opened."""
        self._shards = sorted(path for path in self.folder.glob("*.f16") if path.with_suffix(".idx").exists())
        with ThreadPoolExecutor(CHECKERS) as pool:
            states = list(pool.map(lambda path: checked(path, self.width), self._shards))
        signature = [[path.name, *asdict(state).values()] for path, state in zip(self._shards, states, strict=True)]
        self._index = open_index(self.folder, signature, lambda: _sound_clips(self._shards, states))
        self._data: dict[int, np.ndarray] = {}  # number of a shard -> its bytes
        self._compared = np.zeros(len(self._index), dtype=bool)  # clips whose checksum this process compared
        self._unindexed: set[bytes] = set()

    def __len__(self) -> int:
        """Clips in the index; those added since `refresh` do not count."""
        return len(self._index)

    def key(self, row: Utterance) -> bytes:
        """The key of a row's speech; for a file that cannot be read, a key that no clip has."""
        return self.keys([row])[0]

    def keys(self, rows: Sequence[Utterance]) -> list[bytes]:
        """The keys of several rows, faster than one by one."""
        keys = []
        for row, content in zip(rows, self.hashes.of([row.audio for row in rows]), strict=True):
            content = content or b"unreadable" + row.audio.encode(errors="surrogateescape")
            cut = struct.pack("<dd", row.start or 0.0, row.duration or 0.0)
            keys.append(key_of(content + cut + self.encoder_id.encode()))
        return keys

    def has(self, key: bytes) -> bool:
        return bool(self.held([key])[0])

    def held(self, keys: Sequence[bytes]) -> np.ndarray:
        """(n,) bool: whether each clip is there, also if this process has just added it."""
        return (self._index.find(keys) >= 0) | np.array([key in self._unindexed for key in keys], dtype=bool)

    def lengths(self, keys: Sequence[bytes]) -> np.ndarray:
        """(n,) int32: the encoder frames of each clip, 0 for one that is not there."""
        if self._unindexed:
            self.refresh()
        rows = self._index.find(keys)
        lengths = np.zeros(len(keys), dtype=np.int32)
        lengths[rows >= 0] = self._index.records["frames"][rows[rows >= 0]]
        return lengths

    def get(self, key: bytes) -> np.ndarray:
        """(T, E) float16: a read-only view of the file; its checksum is compared the first time.

        Raises FeaturesError where there is no such entry or its bytes are damaged.
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
            self._shards[shard].with_suffix(".ok").unlink(missing_ok=True)  # check it when it is opened again
            raise FeaturesError(
                f"{self._shards[shard]}: an entry is damaged; run `blsp encode` again, which makes it anew"
            )
        self._compared[row] = True
        begin, frames = int(clip["offset"]), int(clip["frames"])  # float16: 2 bytes a number
        return data[begin : begin + frames * self.width * 2].view(np.float16).reshape(frames, self.width)

    def writer(self, rank: int = 0, width: int | None = None) -> ShardWriter:
        """A writer for this process; an encoder's first writer names the `width` (E)."""
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
    """Appends clips to shards of its own until it is closed; an added clip is kept even if the process is killed."""

    def __init__(self, folder: Path, width: int, rank: int, on_add: Callable[[bytes], None]) -> None:
        self.folder, self.width, self.rank = folder, width, rank
        self._on_add = on_add
        self._files: list[BinaryIO] = []  # the shard and its records
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
            if (written := file.write(part)) != len(part):
                raise OSError(f"{file.name}: {written} of {len(part)} bytes were written; is the disk full?")
        self._offset += len(content)
        self._on_add(key)
        if self._offset >= SHARD_BYTES:
            self.close()

    def close(self) -> None:
        """Close the shard and note that it is whole; the next clip begins another."""
        for file in self._files:
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
    """A shard's files as they were when they were checked."""

    bytes: int
    time: int  # nanoseconds
    records: int
    damaged: tuple[int, ...] = ()  # numbers of the records whose bytes are not what was written


def _state(path: Path, damaged: Sequence[int] = ()) -> ShardState:
    stat = path.stat()
    records = path.with_suffix(".idx").stat().st_size // CLIP.itemsize
    return ShardState(stat.st_size, stat.st_mtime_ns, records, tuple(damaged))


def checked(path: Path, width: int) -> ShardState:
    """The shard's state; checksums are compared unless the .ok file tells of these very files."""
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
    """Whether the clip's bytes are in the shard `data` (bytes,) and are those that were written."""
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


# --- the index --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Index:
    """Records sorted by their keys; both arrays are memory-mapped."""

    keys: np.ndarray  # (n,) KEY, apart from the records for the binary search
    records: np.ndarray  # (n,)

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, keys: Sequence[bytes]) -> np.ndarray:
        """(m,) int64: the row of each of m keys, or -1."""
        asked = np.frombuffer(b"".join(keys), dtype=KEY)
        rows = np.searchsorted(self.keys, asked)
        # a key that is not there gets the row of the next larger one, or the end of the table
        known = rows < len(self.keys)
        known[known] = self.keys[rows[known]] == asked[known]
        return np.where(known, rows, -1)


def open_index(folder: Path, signature: Any, records: Callable[[], np.ndarray]) -> Index:
    """The index of `records()`, made unless the folder has the one of this `signature`; of equal keys one stays.

    Where the folder cannot be written, the index goes to the system's folder for temporary files.
    """
    digest = hashlib.blake2b(json.dumps(signature).encode(), digest_size=16).hexdigest()
    path = folder / f"index-{digest}.npy"
    if not path.exists() and not os.access(folder, os.W_OK):
        path = Path(tempfile.gettempdir()) / f"blsp-{path.name}"
        warnings.warn(f"{folder} cannot be written; its index goes to {path}", stacklevel=2)
    if not path.exists():
        unsorted = records()
        keys, order = np.unique(unsorted["key"], return_index=True)  # sorted
        for target, array in ((path.with_suffix(".keys.npy"), keys), (path, unsorted[order])):
            with write_atomically(target) as partial:
                np.save(partial, array)
        for old in [*folder.glob("index-*"), *folder.glob("*.sorted")]:  # .sorted: of earlier versions
            if path.parent == folder and not old.name.startswith(path.stem):
                old.unlink(missing_ok=True)  # a process that has it open keeps it
    try:
        return Index(_mapped(path.with_suffix(".keys.npy")), _mapped(path))
    except FileNotFoundError:  # another process has just made a newer one
        return open_index(folder, signature, records)


def _mapped(path: Path) -> np.ndarray:
    """A .npy file as a memory map; an empty array cannot be mapped."""
    return np.load(path, mmap_mode="r" if path.stat().st_size > 4096 else None)


def read_log(path: Path, dtype: np.dtype) -> np.ndarray:
    """The whole records of a log, memory-mapped; half a record at the end does not count."""
    count = path.stat().st_size // dtype.itemsize
    return np.memmap(path, dtype=dtype, mode="r", shape=(count,)) if count else np.zeros(0, dtype=dtype)


# --- hashes of audio files --------------------------------------------------------------------------------
class ContentHashes:
    """Hashes of audio files, remembered by path, size and time, so that a file is read once. Threads may share one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._recent: dict[bytes, bytes] = {}
        self._log: BinaryIO | None = None
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        paths = sorted(folder.glob("*.log"))
        logs = [read_log(path, FILE) for path in paths]  # others may be appending: their lengths are fixed here
        signature = [[path.name, len(log)] for path, log in zip(paths, logs, strict=True)]
        self._index = open_index(folder, signature, lambda: np.concatenate([np.zeros(0, dtype=FILE), *logs]))

    def of(self, sources: Sequence[str]) -> list[bytes | None]:
        """16 bytes for each path or data URI; None where a file cannot be read."""
        stamps = [_stamp(source) for source in sources]
        keys = [key_of(stamp.encode(errors="surrogateescape")) if stamp else bytes(16) for stamp, _ in stamps]
        rows = self._index.find(keys)
        hashes: list[bytes | None] = []
        for source, (stamp, changed), key, row in zip(sources, stamps, keys, rows, strict=True):
            if source.startswith("data:"):
                hashes.append(key_of(source.encode()))
            elif not stamp:
                hashes.append(None)
            elif row >= 0:
                hashes.append(self._index.records["content"][row].tobytes())
            else:
                hashes.append(self._recent.get(key) or self._read(source, key, changed))
        return hashes

    def _read(self, source: str, key: bytes, changed: int) -> bytes | None:
        try:
            with open(source, "rb") as file:
                content = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
        except OSError:
            return None
        if time.time_ns() - changed > SETTLED_NS:
            with self._lock:
                if len(self._recent) >= RECENT_FILES:
                    self._recent.pop(next(iter(self._recent)))
                self._recent[key] = content
                self._log = self._log or self._new_log()
                self._log.write(key + content)
        return content

    def _new_log(self) -> BinaryIO:
        try:
            return open(self.folder / f"{time.time_ns():x}-{os.getpid():x}.log", "xb", buffering=0)
        except PermissionError as error:
            warnings.warn(f"{self.folder}: {error.strerror}; audio files are hashed at every start", stacklevel=4)
            return open(os.devnull, "wb")


def _stamp(source: str) -> tuple[str, int]:
    """A file's path, size and time as one string, and its time in nanoseconds; "" where there is no file."""
    try:
        stat = os.stat(source)
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return "", 0
    path = source if os.path.isabs(source) else os.path.abspath(source)
    return f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}", stat.st_mtime_ns
