"""Addresses of audio: a file or a piece of a file, local or behind a URL.

In:  the `audio` of a row, in one of these forms:

         clips/a.flac                           a file
         s3://bucket/clips/a.flac               a file behind any URL that fsspec knows (gs, hf, https, memory, ...)
         shard-000.tar#bytes=1536+48044         48,044 bytes of a file, from byte 1536 on
         shard-000.tar.gz#member=a/b.flac       a member of a tar file, compressed or not
         part-0.parquet#row=17&column=audio     the bytes in a row of a Parquet or Arrow file, from row 0

     The file before the `#` may be behind a URL too. The default column is `audio`.
Out: the bytes of the recording, or an `AddressError`.
Try: `read_address("shard-000.tar#member=a.flac")`
Flow: **addresses.py** → data/audio.py, features/content_hashes.py

A file that holds several recordings stays open: rows in its order read it once from start to end. Credentials and
options of URLs come from fsspec's configuration; the user installs the package of a protocol (s3fs, gcsfs).
"""

from __future__ import annotations

import os
import re
import tarfile
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, BinaryIO, Self

import fsspec

PIECE = re.compile(
    r"(?P<path>.+?)#(?:member=(?P<member>.+)|bytes=(?P<first>\d+)\+(?P<length>\d+)"
    r"|row=(?P<row>\d+)(?:&column=(?P<column>.+))?)",
    re.DOTALL,
)
URL = re.compile(r"(?!data:)[A-Za-z][A-Za-z0-9+.-]*(://|::)")
MOST_BYTES = 1 << 31  # of one piece, which is read into memory
MOST_BYTES_AT_ONCE = 1 << 24  # a file behind a URL up to this size is fetched whole, a longer one in parts
MOST_BYTES_PASSED = 1 << 25  # of skipped members of a compressed tar file that are kept in memory
BLOCK_BYTES = 1 << 20  # of one request for a part of a file
SHARDS_KEPT = 16  # open files with pieces in one process
LOOK_AGAIN = 10.0  # seconds after which the server is asked again whether a file has changed
MARKS = {"size", "etag", "lastmodified", "last-modified", "mtime", "created", "md5hash", "blob_id", "versionid"}


class AudioError(ValueError):
    """The source is not usable speech audio; the message names the source, the reason and what to do."""


class AddressError(AudioError):
    """There is no audio at an address."""


@dataclass(frozen=True)
class Address:
    """Where a recording is: a whole file, or the piece of it given by the field that is not None."""

    path: str  # a local path or a URL
    member: str | None = None
    span: tuple[int, int] | None = None  # first byte, number of bytes
    row: int | None = None
    column: str = "audio"

    @property
    def is_whole(self) -> bool:
        return self.member is None and self.span is None and self.row is None


def is_url(path: str) -> bool:
    """Whether fsspec opens this path: `s3://bucket/a.wav`, or a chain such as `zip://a.wav::clips.zip`."""
    return URL.match(path) is not None


def parse_address(audio: str) -> Address:
    """The address in `audio`; text that names no piece is the path of a whole file."""
    piece = PIECE.fullmatch(audio)
    if piece is None:
        return Address(audio)
    span = (int(piece["first"]), int(piece["length"])) if piece["first"] else None
    row = int(piece["row"]) if piece["row"] else None
    return Address(piece["path"], piece["member"], span, row, piece["column"] or "audio")


def is_address(audio: object) -> bool:
    """Whether `audio` is a text that names a piece of a file or a URL, not a data-URI or a plain path."""
    if not isinstance(audio, str) or audio.startswith("data:"):
        return False
    address = parse_address(audio)
    return is_url(address.path) or not address.is_whole


def read_address(audio: str) -> bytes | str:
    """The recording's bytes; for a long file its URL, from which `open_url` reads the parts that are needed."""
    address = parse_address(audio)
    with _as_address_error(audio):
        if not address.is_whole:
            return _shard(address.path, _version(address.path), os.getpid()).read(address)
        system, path = fsspec.url_to_fs(address.path)
        size = system.info(path).get("size")
        if size is not None:
            return bytes(system.cat_file(path)) if size <= MOST_BYTES_AT_ONCE else audio
        with system.open(path, "rb") as stream:
            data = bytes(stream.read(MOST_BYTES_AT_ONCE + 1))
        if len(data) > MOST_BYTES_AT_ONCE:
            raise AddressError("the server does not say how long it is; copy it to a disk")
        return data


def open_url(url: str) -> BinaryIO:
    """A file behind a URL, for reading and seeking; each part is fetched when it is read."""
    with _as_address_error(url):
        system, path = fsspec.url_to_fs(url)
        file: Any = RemoteFile(url, system.open(path, "rb", block_size=BLOCK_BYTES, cache_type="blockcache"))
        return file


class RemoteFile:
    """A file behind a URL; a read that fails raises AddressError."""

    def __init__(self, url: str, file: Any) -> None:
        self._url, self._file = url, file

    def read(self, size: int = -1) -> bytes:
        with _as_address_error(self._url):
            return bytes(self._file.read(size))

    def readinto(self, buffer: Any) -> int:
        with _as_address_error(self._url):
            return int(self._file.readinto(buffer))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


@contextmanager
def remote_file(url: str) -> Iterator[BinaryIO]:
    """`open_url` for a decoder in C, which cannot pass on the error of a read.

    For the decoder the file ends at a read that fails; the error is then raised here instead of the decoder's own.
    """
    file: Any = _QuietFile(open_url(url))
    try:
        yield file
    finally:
        if file.error is not None:
            raise file.error


class _QuietFile:
    """A file that ends at the first read that fails; `error` is its error."""

    def __init__(self, file: BinaryIO) -> None:
        self.error: AddressError | None = None
        self.seek, self.tell, self._file = file.seek, file.tell, file

    def read(self, size: int = -1) -> bytes:
        try:
            return b"" if self.error else self._file.read(size)
        except AddressError as error:
            self.error = error
            return b""


def version_of(audio: str) -> str:
    """A text that changes when the file of an address does; "" if there is no file."""
    address = parse_address(audio)
    try:
        return _version(address.path)
    except Exception:  # every file system of fsspec has its own errors
        return ""


def audio_size(audio: str) -> int:
    """Bytes of the file of an address, or of its byte range; 0 if there is no file."""
    address = parse_address(audio)
    version = version_of(audio) if audio else ""
    return 0 if not version else address.span[1] if address.span else int(version.split()[0])


def _version(path: str) -> str:
    """Size and time (or the tag that a server gives) of a file."""
    if is_url(path):
        return _version_of_url(path, int(time.monotonic() / LOOK_AGAIN), os.getpid())
    stat = os.stat(path)
    return f"{stat.st_size} {stat.st_mtime_ns}"


@lru_cache(maxsize=1024)
def _version_of_url(url: str, moment: int, process: int) -> str:
    """`moment` and `process` are keys of the cache: a later moment or another process makes a new request."""
    system, path = fsspec.url_to_fs(url)
    info: dict[str, Any] = system.info(path)
    marks = sorted(f"{name}={value}" for name, value in info.items() if name.lower() in MARKS and name != "size")
    return f"{info.get('size') or 0} {' '.join(marks)}"


@contextmanager
def _as_address_error(audio: str) -> Iterator[None]:
    """Turn any error of a file system or archive into an AddressError."""
    name = audio if len(audio) <= 300 else f"…{audio[-200:]}"
    try:
        yield
    except AddressError as error:
        named = str(error).startswith(parse_address(audio).path)  # by the file that holds the piece
        raise AddressError(str(error) if named else f"{name}: {error}") from error
    except FileNotFoundError as error:
        silent = ", or no answer from its server" if is_url(audio) else ""
        raise AddressError(f"{name}: no such file{silent}") from error
    except ImportError as error:
        raise AddressError(f"{name}: the package that opens it is missing ({error})") from error
    except Exception as error:  # botocore, aiohttp, pyarrow, zlib, ... have their own errors
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise AddressError(f"{name}: cannot be read ({reason})") from error


# --- files with pieces ------------------------------------------------------------------------------------
class Shard:
    """An open file with pieces. Threads may share an object."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._file: BinaryIO = open_url(path) if is_url(path) else open(path, "rb")  # noqa: SIM115 (stays open)
        self._lock = threading.Lock()
        self._tar: tarfile.TarFile | None = None
        self._members: dict[str, tarfile.TarInfo] = {}  # members that were passed so far
        self._passed: dict[str, bytes] = {}  # contents of the last passed members of a compressed tar file
        self._table: Table | None = None

    def read(self, address: Address) -> bytes:
        """The bytes of one piece; raises AddressError if there is no such piece."""
        with self._lock:
            if address.span is not None:
                return self._read_span(*address.span)
            if address.member is not None:
                return self._read_member(address.member)
            assert address.row is not None
            self._table = self._table or Table(self._file)
            return self._table.read(address.row, address.column)

    def _read_span(self, first: int, length: int) -> bytes:
        _check_size(length)
        if self._file.tell() != first:
            self._file.seek(first)
        data = self._file.read(length)
        if len(data) < length:
            raise AddressError(f"the file ends {length - len(data)} bytes before the piece does; fetch it again")
        return data

    def _read_member(self, name: str) -> bytes:
        """Go forward to the member; the members on the way are remembered.

        Threads that share the rows of a shard ask slightly out of order. In a compressed tar file, going back means
        reading again from the start, so the contents of the last passed members are kept until they are asked for.
        """
        if name in self._passed:
            return self._passed.pop(name)
        if self._tar is None:
            self._file.seek(0)  # spans may have been read before
            self._tar = tarfile.open(fileobj=self._file)  # noqa: SIM115 (stays open)
        while name not in self._members:
            member = self._tar.next()
            if member is None:
                raise AddressError(f"the archive has no such member; it has {len(self._members)} others")
            self._members.setdefault(member.name, member)
            if self._tar.fileobj is not self._file and member.name != name:
                self._keep(member)
        _check_size(self._members[name].size)
        content = self._tar.extractfile(self._members[name])
        if content is None:
            raise AddressError("the member is a folder or a device, not a file")
        return content.read()

    def _keep(self, member: tarfile.TarInfo) -> None:
        """Keep the contents of a member, and drop the oldest ones."""
        assert self._tar is not None
        if member.isreg() and member.size <= MOST_BYTES_PASSED:
            content = self._tar.extractfile(member)
            self._passed[member.name] = content.read() if content else b""
            while sum(map(len, self._passed.values())) > MOST_BYTES_PASSED:
                self._passed.pop(next(iter(self._passed)))


class Table:
    """A Parquet or Arrow file: one row group of Parquet is in memory, Arrow is memory-mapped."""

    def __init__(self, file: BinaryIO) -> None:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise ImportError('reading Parquet needs pyarrow: pip install "blsp[data]"') from error
        file.seek(0)
        if file.read(4) == b"PAR1":
            self._parquet = parquet.ParquetFile(file)
            meta = self._parquet.metadata
            sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        else:
            file.seek(0)
            name = getattr(file, "name", None)
            source = pyarrow.memory_map(name) if isinstance(name, str) and os.path.exists(name) else file
            self._parquet = None
            self._values = pyarrow.ipc.open_stream(source).read_all()
            sizes = [self._values.num_rows]
        self._starts = [0, *accumulate(sizes)]  # of each row group, and the end
        self._read: tuple[int, str] | None = None  # row group and column that are in memory

    def read(self, row: int, column: str) -> bytes:
        """The bytes in a row. The column holds bytes, or `{"bytes": ..., "path": ...}` as Hugging Face writes it."""
        if row >= self._starts[-1]:
            raise AddressError(f"the table has {self._starts[-1]} rows, so no row {row}")
        group = bisect_right(self._starts, row) - 1
        if self._parquet is not None and self._read != (group, column):
            _check_size(self._parquet.metadata.row_group(group).total_byte_size)
            self._values = self._parquet.read_row_group(group, columns=[column])
            self._read = group, column
        if column not in self._values.column_names:
            raise AddressError(f"the table has no column {column!r}")
        value = self._values.column(column)[row - self._starts[group]].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise AddressError(f"column {column!r} holds no bytes in this row")
        return data


@lru_cache(maxsize=SHARDS_KEPT)
def _shard(path: str, version: str, process: int) -> Shard:
    """`version` and `process` are keys of the cache: a changed file, or a forked process, opens the file again."""
    return Shard(path)


def _check_size(size: int) -> None:
    if size > MOST_BYTES:
        raise AddressError(f"the piece has {size} bytes; at most {MOST_BYTES} are read from inside another file")
