"""Files: JSON Lines, atomic writes, digests.

In:  a path and its new content, or a value to be hashed.
Out: rows, one JSON object a line, or a `ManifestError` that names file, line and what to do; files and folders that
     are written completely or not at all, or a `DiskFullError`; SHA-256 digests in hexadecimal.
Try: `write_json("settings.json", {"seed": 1})`, `for line, row in read_rows("train.jsonl"): ...`
Flow: data/ — used by everything that reads and writes; `jobs.py` and `manifest.py` build on it.
"""

import errno
import hashlib
import io
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
END_BYTES = 65_536
# errors of a full disk, a used-up quota, or a file system's limit (FAT: 4 GB a file); Windows has no EDQUOT
FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


# --- full disks, and files that were removed --------------------------------------------------------------
class DiskFullError(OSError):
    """The disk has no room for a file; the message names the file and says how much room is needed."""

    def __init__(self, path: str | os.PathLike[str], needs: str) -> None:
        self.path = Path(path)
        folder = next(folder for folder in Path(path).absolute().parents if folder.exists())
        super().__init__(
            f"{os.fspath(path)}: no room for it: {needs} needed, {shutil.disk_usage(folder).free:,} bytes are free; "
            "make room, and run the same command to continue"
        )


@contextmanager
def naming_full_disk(path: str | os.PathLike[str], needs: int = 0) -> Iterator[None]:
    """Turn a library's error about a full disk into DiskFullError. needs: bytes, if the caller knows the number."""
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:  # safetensors, torch and SQLite each have their own class
        told = re.search("no space left|disk is full|failed writing file|unexpected pos", str(error), re.IGNORECASE)
        written = getattr(error, "sqlite_errorname", "") == "SQLITE_IOERR_WRITE"  # a quota, or the largest file
        if told or written or getattr(error, "errno", None) in FULL:
            raise DiskFullError(path, f"{needs:,} bytes are" if needs else "more is") from error
        raise


def append_bytes(file: io.FileIO, content: bytes | memoryview) -> None:
    """Write all of `content` at the end of an unbuffered file.

    Raises DiskFullError, or FileNotFoundError if the file has been removed, since the bytes would be lost.
    """
    require_there(file)
    left = memoryview(content)
    with naming_full_disk(file.name, len(left)):
        while left:
            left = left[file.write(left) :]


def require_there(file: io.FileIO) -> None:
    """Raise FileNotFoundError if an open file no longer exists under its name."""
    try:
        if os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):
            return
    except OSError:
        pass
    raise FileNotFoundError(f"{file.name}: was removed with its content while the job was running; start the job again")


def take_room(path: Path) -> None:
    """Reserve disk space for a whole sparse file: on a full disk, writing into a mapped hole kills the process."""
    if hasattr(os, "posix_fallocate") and (size := path.stat().st_size):
        with naming_full_disk(path, size), open(path, "rb+") as file:
            os.posix_fallocate(file.fileno(), 0, size)


# --- atomic writes ----------------------------------------------------------------------------------------
@contextmanager
def write_atomically(
    path: str | os.PathLike[str], *, through: Path | None = None, durable: bool = False, needs: int = 0
) -> Iterator[Path]:
    """A path beside `path` with the same suffix; the file or folder that the block writes there is renamed to `path`.

    If the block raises an error, `path` does not change. `through`: write at this path; what a killed writer left
    there is removed. `durable`: wait until the bytes are on the disk. `needs`: bytes, for the message about a full
    disk.
    """
    target = Path(path)
    partial = through or target.with_name(f".{target.stem}.{secrets.token_hex(4)}.partial{target.suffix}")
    _remove(partial)
    try:
        with naming_full_disk(target, needs):
            yield partial
            written = [partial, *partial.rglob("*")]
            for file in written:
                if file.suffix == ".safetensors":
                    _let_read(file)
            if durable:
                for file in written:
                    flush_to_disk(file)
            if target.is_dir():  # a folder cannot replace a folder with files in it
                _remove(target)
            os.replace(partial, target)
            if durable:
                flush_to_disk(target.parent)
    finally:
        _remove(partial)


def _let_read(file: Path) -> None:
    """Give a file the usual permissions of a new file; safetensors makes its files readable only to their owner."""
    other = file.with_name(f"{file.name}.rights")
    other.touch()
    file.chmod(other.stat().st_mode & 0o777)
    other.unlink()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str, *, durable: bool = False) -> None:
    """Write a UTF-8 text file atomically."""
    with write_atomically(path, durable=durable, needs=len(text.encode())) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any, *, durable: bool = False) -> None:
    """Write a JSON file atomically, indented."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", durable=durable)


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk (if the system can tell)."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- digests ----------------------------------------------------------------------------------------------
def read_ends(path: Path) -> tuple[int, bytes]:
    """The length of a file in bytes, and its first and last 64 KiB, to find out whether a long file has changed."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        first = file.read(END_BYTES)
        file.seek(max(0, size - END_BYTES))
        return size, first + file.read(END_BYTES)


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value; the order of names does not matter. Other values are turned into text."""
    return text_digest(json.dumps(value, sort_keys=True, default=str))


def text_digest(text: str) -> str:
    """SHA-256 of a text, such as a chat template."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(*paths: Path) -> str:
    """SHA-256 over the SHA-256 digests of files, in order."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


# --- JSON Lines -------------------------------------------------------------------------------------------
class ManifestError(ValueError):
    """A manifest or one of its rows is not usable; the message names the file, the line and what to do."""


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


DECODER = json.JSONDecoder(parse_constant=_refuse_constant)  # json.loads would make a decoder for each row


def read_rows(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, JSON object) of each row of a file, one at a time; blank lines are skipped."""
    try:
        with open(path, "rb") as lines:
            for number, raw in enumerate(lines, start=1):
                if number == 1:
                    raw = raw.removeprefix(BYTE_ORDER_MARK)
                if raw.strip():
                    yield number, parse_row(raw, f"{os.fspath(path)}:{number}")
    except (OSError, ValueError) as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError(f"{os.fspath(path)!r}: cannot be read ({error})") from error


def parse_row(raw: bytes, where: str) -> dict[str, Any]:
    """One line of JSONL as a JSON object; anything else is a `ManifestError` that begins with `where`."""
    try:
        text = raw.decode("utf-8")
        row = DECODER.decode(text)
        if "\\u" in text:
            json.dumps(row, ensure_ascii=False).encode()  # fails for half of a surrogate pair
    except UnicodeDecodeError as error:
        raise ManifestError(f"{where}: is not UTF-8 (byte {error.start}); convert the file to UTF-8") from error
    except UnicodeEncodeError as error:
        raise ManifestError(f"{where}: holds half of a surrogate pair (\\ud800…); write the character whole") from error
    except json.JSONDecodeError as error:
        cut = "; the file ends in the middle of this row: remove it or write it again"
        cut = "" if raw.endswith(b"\n") else cut
        raise ManifestError(f"{where}: is not JSON ({error.msg} at column {error.colno}){cut}") from error
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{where}: is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise ManifestError(f"{where}: must be a JSON object {{...}}, not {show(row)}")
    return row


def show(value: Any) -> str:
    """A value as it is printed in messages, shortened."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def dump_row(row: dict[str, Any], where: str) -> bytes:
    """One line of JSONL, newline included."""
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise ManifestError(f"{where}: the row {show(row.get('id'))} cannot be written as JSON ({error})") from error
