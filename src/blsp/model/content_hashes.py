"""What is in a file, as 16 bytes, without reading it a second time.

A clip's features are filed under a hash of the audio file's bytes. Terabytes are not hashed again at every
start: a file's hash is remembered under its path, size and time, in logs beside the features.

    >>> hashes = ContentHashes(Path("features/files"))
    >>> hashes.of("/data/a.flac")          # read the first time, looked up ever after

Flow:  features.py asks here for each row's audio.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np

from blsp.model.sorted_table import KEY, merged_table, read_log

RECORD = np.dtype([*KEY, ("content", "V16")])
UNSETTLED_NS = 2_000_000_000  # a file this young may yet change within its time stamp's resolution
RECENT = 1 << 14  # hashes of this run that are kept in memory


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

    def of(self, source: str) -> bytes:
        """16 bytes for a path, or for a data URI's text. Raises OSError where the file cannot be read."""
        if source.startswith("data:"):
            return hashlib.blake2b(source.encode(), digest_size=16).digest()
        stat = os.stat(source)
        looks = f"{os.path.abspath(source)}\0{stat.st_size}\0{stat.st_mtime_ns}"
        key = hashlib.blake2b(looks.encode(errors="surrogateescape"), digest_size=16).digest()
        known = self._recent.get(key) or self._look_up(key)
        if known:
            return known
        with open(source, "rb") as file:
            content = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
        if time.time_ns() - stat.st_mtime_ns > UNSETTLED_NS:
            self._remember(key, content)
        return content

    def _look_up(self, key: bytes) -> bytes | None:
        place = int(self._table.find([key])[0])
        return None if place < 0 else self._table.records["content"][place].tobytes()

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
