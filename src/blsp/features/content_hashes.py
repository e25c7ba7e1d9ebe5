"""What is in a file, as 16 bytes, without reading it a second time.

A clip's features are filed under a hash of the audio file's bytes. Terabytes are not hashed again at every
start: a file's hash is remembered under its path, size and time, in logs beside the features.

    >>> hashes = ContentHashes(Path("features/files"))
    >>> hashes.of(["/data/a.flac"])          # read the first time, looked up ever after

Flow:  features.py asks here for each row's audio.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from blsp.features.sorted_table import KEY, merged_table, read_log

RECORD = np.dtype([*KEY, ("content", "V16")])
UNSETTLED_NS = 2_000_000_000  # a file this young may yet change within its time stamp's resolution
RECENT = 1 << 14  # hashes of this run that are kept in memory


@dataclass(frozen=True)
class Look:
    """A file from outside."""

    key: bytes  # hash of path, size and time
    changed: int  # nanoseconds


def _look(source: str) -> Look | None:
    try:
        stat = os.stat(source)
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return None
    path = source if os.path.isabs(source) else os.path.abspath(source)
    looks = f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}".encode(errors="surrogateescape")
    return Look(hashlib.blake2b(looks, digest_size=16).digest(), stat.st_mtime_ns)


class ContentHashes:
    """Path -> blake2b-128 of the file's bytes. Threads may share one; processes write logs of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._recent: dict[bytes, bytes] = {}
        self._log: BinaryIO | None = None
        self._lock = threading.Lock()
        self._writable = True
        folder.mkdir(parents=True, exist_ok=True)
        paths = sorted(folder.glob("*.log"))
        logs = [read_log(path, RECORD) for path in paths]  # memory-mapped; others may be writing on
        looks = [[path.name, len(log)] for path, log in zip(paths, logs, strict=True)]
        self._table = merged_table(folder, "hashes", lambda: logs, RECORD, looks)

    def of(self, sources: Sequence[str]) -> list[bytes | None]:
        """16 bytes for each path, or data URI; None where a file cannot be read."""
        looks = [_look(source) for source in sources]
        asked = [i for i, look in enumerate(looks) if look]
        places = self._table.find([looks[i].key for i in asked])  # type: ignore[union-attr]
        found: list[bytes | None] = [None] * len(sources)
        for i, place in zip(asked, places, strict=True):
            found[i] = self._table.records["content"][place].tobytes() if place >= 0 else None
        for i, (source, look) in enumerate(zip(sources, looks, strict=True)):
            if source.startswith("data:"):
                found[i] = hashlib.blake2b(source.encode(), digest_size=16).digest()
            elif look and found[i] is None:
                found[i] = self._recent.get(look.key) or self._read(source, look)
        return found

    def _read(self, source: str, look: Look) -> bytes | None:
        try:
            with open(source, "rb") as file:
                content = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
        except OSError:
            return None
        if time.time_ns() - look.changed > UNSETTLED_NS:
            self._remember(look.key, content)
        return content

    def _remember(self, key: bytes, content: bytes) -> None:
        with self._lock:
            if len(self._recent) >= RECENT:
                self._recent.pop(next(iter(self._recent)))
            self._recent[key] = content
            if not self._writable:
                return
            try:
                if self._log is None:
                    name = f"{time.time_ns():x}-{os.getpid():x}.log"
                    self._log = open(self.folder / name, "xb", buffering=0)  # noqa: SIM115 (lives as long as this)
                self._log.write(key + content)
            except PermissionError as error:
                self._writable = False
                warnings.warn(
                    f"{self.folder}: {error.strerror}; audio files are hashed at every start", stacklevel=3
                )
