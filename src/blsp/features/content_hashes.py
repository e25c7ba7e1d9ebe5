"""Hashes of the audio of rows, kept on disk; and the index that finds these hashes and cached clips.

In:  rows with audio.
Out: 16 bytes for the content of each recording; `open_index`: records sorted by keys of 16 bytes, memory-mapped.
Try: `ContentHashes(Path("features/files")).of(rows)`
Flow: **content_hashes.py** → cache.py, which makes the keys of clips from these hashes

A hash is stored under two keys. The file's key (address, size, time) saves reading an unchanged file again. The row's
key (id, text, cut, file name without its folder) is used if the audio is gone, and during training, whose rows are
checked at its start. Rows with the same row key but different audio are found by the file's key alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from blsp.data.addresses import AddressError, is_address, is_url, open_url, parse_address, read_address, version_of
from blsp.data.files import append_bytes, write_atomically
from blsp.data.manifest import Utterance

KEY = "S16"  # 16 bytes; numpy compares such strings byte by byte
FILE = np.dtype([("key", KEY), ("content", "V16")])  # in the logs
RECENT_FILES = 1 << 15  # hashes that this process keeps in memory
AMBIGUOUS = bytes(16)  # stored instead of a hash if rows with the same row key have different audio
SETTLED_NS = 2_000_000_000  # a younger file may change again without a new time stamp


def key_of(content: bytes) -> bytes:
    """The 16-byte hash of `content`."""
    return hashlib.blake2b(content, digest_size=16).digest()


# --- the index --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Index:
    """Records sorted by their keys; both arrays are memory-mapped."""

    keys: np.ndarray  # (n,) KEY; a separate array makes the binary search faster
    records: np.ndarray  # (n,)

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, keys: Sequence[bytes]) -> np.ndarray:
        """(m,) int64: the row of each of m keys, or -1."""
        asked = np.frombuffer(b"".join(keys), dtype=KEY)
        rows = np.searchsorted(self.keys, asked)
        # for a missing key, searchsorted gives the row of the next larger key, or the table's length
        known = rows < len(self.keys)
        known[known] = self.keys[rows[known]] == asked[known]
        return np.where(known, rows, -1)


def open_index(folder: Path, signature: Any, records: Callable[[], np.ndarray]) -> Index:
    """The index of `records()`, made unless the folder has one with this `signature`; the last of equal keys wins.

    If the folder cannot be written, the index is put into the system's folder for temporary files.
    """
    digest = hashlib.blake2b(json.dumps(signature).encode(), digest_size=16).hexdigest()
    path = folder / f"index-{digest}.npy"
    if not path.exists() and not os.access(folder, os.W_OK):
        path = Path(tempfile.gettempdir()) / f"blsp-{path.name}"
        warnings.warn(f"{folder} cannot be written; its index goes to {path}", stacklevel=2)
    if not path.exists():
        unsorted = records()[::-1]
        keys, order = np.unique(unsorted["key"], return_index=True)  # sorted
        for target, array in ((path.with_suffix(".keys.npy"), keys), (path, unsorted[order])):
            with write_atomically(target) as partial:
                np.save(partial, array)
        for old in [*folder.glob("index-*"), *folder.glob("*.sorted")]:  # .sorted: of earlier versions
            if path.parent == folder and not old.name.startswith(path.stem):
                old.unlink(missing_ok=True)  # processes that have it open can still read it
    try:
        return Index(_mapped(path.with_suffix(".keys.npy")), _mapped(path))
    except FileNotFoundError:  # another process has just made a newer one
        return open_index(folder, signature, records)


def _mapped(path: Path) -> np.ndarray:
    """A .npy file as a memory map; an empty array cannot be mapped."""
    return np.load(path, mmap_mode="r" if path.stat().st_size > 4096 else None)


def read_log(path: Path, dtype: np.dtype) -> np.ndarray:
    """The records of a log, memory-mapped; an incomplete one at the end is ignored."""
    count = path.stat().st_size // dtype.itemsize
    return np.memmap(path, dtype=dtype, mode="r", shape=(count,)) if count else np.zeros(0, dtype=dtype)


# --- hashes of audio ------------------------------------------------------------------------------------
class ContentHashes:
    """Hashes of the audio of rows, stored so that audio is read once. Threads may share an object."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._recent: dict[bytes, bytes] = {}
        self._log: FileIO | None = None
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        paths = sorted(folder.glob("*.log"))
        logs = [read_log(path, FILE) for path in paths]  # others may be appending: their lengths are fixed here
        signature = [[path.name, len(log)] for path, log in zip(paths, logs, strict=True)]
        self._index = open_index(folder, signature, lambda: np.concatenate([np.zeros(0, dtype=FILE), *logs]))

    def of(self, rows: Sequence[Utterance], *, check: bool = True, read: bool = True) -> list[bytes | None]:
        """16 bytes for the audio of each row; None if its hash is not stored and the audio cannot be read.

        check: look whether the files have changed; otherwise trust the hashes stored for the rows.
        read: also read audio in shards and behind URLs, if its hash is not stored.
        """
        remembered = self._known([_row_key(row) for row in rows])
        hashes = [None if content == AMBIGUOUS else content for content in remembered]
        asked = [i for i, content in enumerate(hashes) if check or content is None]
        stamps = _stamps([rows[i].audio for i in asked])
        for i, stamp, content in zip(asked, stamps, self._known([stamp.key for stamp in stamps]), strict=True):
            if rows[i].audio.startswith("data:"):
                hashes[i] = key_of(rows[i].audio.encode())
            elif stamp.key != NO_FILE:  # without a file, the hash stored for the row is used
                if content is None and (read or not is_address(rows[i].audio)):
                    content = self._read(rows[i])
                hashes[i] = content
                self._note_row(rows[i], content, remembered[i])
        return hashes

    def read(self, row: Utterance) -> tuple[bytes, bytes | str]:
        """Read a row's audio: its hash, and its bytes (or the path or URL, if it is a file of its own)."""
        (stamp,) = _stamps([row.audio])
        source = read_address(row.audio) if is_address(row.audio) else row.audio
        if isinstance(source, bytes):
            content = key_of(source)
        else:
            with open_url(source) if is_url(source) else open(source, "rb") as file:
                content = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()  # type: ignore[arg-type]
        if time.time_ns() - stamp.changed > SETTLED_NS:
            self._note(stamp.key, content)
        self._note_row(row, content, self._known([_row_key(row)])[0])
        return content, source

    def _read(self, row: Utterance) -> bytes | None:
        try:
            return self.read(row)[0]
        except (OSError, AddressError):
            return None

    def _known(self, keys: Sequence[bytes]) -> list[bytes | None]:
        found = self._index.find(keys)
        stored = [self._index.records["content"][row].tobytes() if row >= 0 else None for row in found]
        return [self._recent.get(key, content) for key, content in zip(keys, stored, strict=True)]

    def _note_row(self, row: Utterance, content: bytes | None, remembered: bytes | None) -> None:
        if content is not None and remembered not in (content, AMBIGUOUS):
            self._note(_row_key(row), content if remembered is None else AMBIGUOUS)

    def _note(self, key: bytes, content: bytes) -> None:
        with self._lock:
            if len(self._recent) >= RECENT_FILES:
                self._recent.pop(next(iter(self._recent)))
            self._recent[key] = content
            self._log = self._log or self._new_log()
            append_bytes(self._log, key + content)

    def _new_log(self) -> FileIO:
        try:
            return open(self.folder / f"{time.time_ns():x}-{os.getpid():x}.log", "xb", buffering=0)
        except PermissionError as error:
            warnings.warn(f"{self.folder}: {error.strerror}; audio files are hashed at every start", stacklevel=4)
            return open(os.devnull, "wb", buffering=0)


@dataclass(frozen=True)
class Stamp:
    """Identifies one version of the file behind an address."""

    key: bytes  # hash of the address and its file's size and time, or NO_FILE
    changed: int  # the file's time in nanoseconds; 0 behind a URL


NO_FILE = bytes(16)


def _stamps(addresses: Sequence[str]) -> list[Stamp]:
    """The stamp of each address; a file with many pieces is checked once."""
    versions: dict[str, str] = {}
    stamps = []
    for address in addresses:
        path = parse_address(address).path
        if not address.startswith("data:") and path not in versions:
            versions[path] = version_of(path)
        if not (version := versions.get(path, "")):
            stamps.append(Stamp(NO_FILE, 0))
            continue
        full = address if is_url(address) or os.path.isabs(address) else os.path.abspath(address)
        stamp = "\0".join([full, *version.split()])
        changed = 0 if is_url(path) else int(version.split()[1])
        stamps.append(Stamp(key_of(stamp.encode(errors="surrogateescape")), changed))
    return stamps


def _row_key(row: Utterance) -> bytes:
    """A key of the row that does not depend on the folders of its manifest and its audio."""
    name = row.audio if row.audio.startswith("data:") else re.split(r"[/\\]", parse_address(row.audio).path)[-1]
    piece = row.audio.removeprefix(parse_address(row.audio).path)
    text = "\0".join([row.id, row.text, name, piece])
    return key_of(b"row\0" + text.encode(errors="surrogateescape") + cut_bytes(row))


def cut_bytes(row: Utterance) -> bytes:
    """The part of a recording that a row names, as bytes of a key."""
    return struct.pack("<dd", row.start or 0.0, row.duration or 0.0)
