"""Files: JSON Lines, atomic writes, digests.

In:  a path; what it shall hold, or values to be named by their content.
Out: rows, one JSON object a line, or a `ManifestError` that names file, line and way out; files and folders
     that appear whole or not at all, or a `DiskFullError`; SHA-256 digests in hexadecimal.
Try: `write_json("settings.json", {"seed": 1})`, `for line, row in read_rows("train.jsonl"): ...`
Flow: data/ — under everything that reads and writes; `jobs.py` and `manifest.py` build on it.
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
# The errors of a disk, a quota or a file system (FAT: 4 GB a file) that takes no more; Windows has no quota's
FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


# --- full disks, and files that were removed --------------------------------------------------------------
class DiskFullError(OSError):
    """A file for which there is no room; the message names it and says how much is needed."""

    def __init__(self, path: str | os.PathLike[str], needs: str) -> None:
        self.path = Path(path)
        folder = next(folder for folder in Path(path).absolute().parents if folder.exists())
        super().__init__(
            f"{os.fspath(path)}: no room for it: {needs} needed, {shutil.disk_usage(folder).free:,} bytes are free; "
            "make room, and the same command goes on from here"
        )


@contextmanager
def naming_full_disk(path: str | os.PathLike[str], needs: int = 0) -> Iterator[None]:
    """Raise what a library says of a full disk as DiskFullError. needs: bytes, where the caller knows them."""
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:  # of safetensors, torch, SQLite: each has a class of its own
        told = re.search("no space left|disk is full|failed writing file", str(error), re.IGNORECASE)
        if told or getattr(error, "errno", None) in FULL:
            raise DiskFullError(path, f"{needs:,} bytes are" if needs else "more is") from error
        raise


def append_bytes(file: io.FileIO, content: bytes | memoryview) -> None:
    """Write all of `content` at the end of an unbuffered file.

    Raises DiskFullError, or FileNotFoundError where the file has been removed, since its bytes would go with it.
    """
    require_there(file)
    left = memoryview(content)
    with naming_full_disk(file.name, len(left)):
        while left:
            left = left[file.write(left) :]


def require_there(file: io.FileIO) -> None:
    """Raise FileNotFoundError where an open file is no longer found under its name."""
    try:
        if os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):
            return
    except OSError:
        pass
    raise FileNotFoundError(f"{file.name}: was removed while the job was at work, and what it held; begin again")


def take_room(path: Path) -> None:
    """Let the disk set aside all of a file with holes: writing into a mapped hole of a full disk kills the process."""
    if hasattr(os, "posix_fallocate") and (size := path.stat().st_size):
        with naming_full_disk(path, size), open(path, "rb+") as file:
            os.posix_fallocate(file.fileno(), 0, size)


# --- atomic writes ----------------------------------------------------------------------------------------
@contextmanager
def write_atomically(
    path: str | os.PathLike[str], *, through: Path | None = None, durable: bool = False, needs: int = 0
) -> Iterator[Path]:
    """A path beside `path`, with the same suffix; what the block writes there gets the name `path` at the end.

    The block may make a file or a folder. When it raises, `path` stays as it was. `through`: write at this path;
    what a killed writer left there is removed. `durable`: wait until the bytes are on the disk. `needs`: bytes, for
    the message of a full disk.
    """
    target = Path(path)
    partial = through or target.with_name(f".{target.stem}.{secrets.token_hex(4)}.partial{target.suffix}")
    _remove(partial)
    try:
        with naming_full_disk(target, needs):
            yield partial
            written = [*partial.rglob("*")] if partial.is_dir() else [partial]
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
    """Give a file the rights of any new file; safetensors lets nobody but the writer read its own."""
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
    """Write a UTF-8 text file whole."""
    with write_atomically(path, durable=durable, needs=len(text.encode())) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any, *, durable: bool = False) -> None:
    """Write a JSON file whole, indented."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", durable=durable)


def flush_to_disk(path: Path) -> None:
    """Wait until a file is on the disk, or the names in a folder are (where the system can tell)."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- digests ----------------------------------------------------------------------------------------------
def read_ends(path: Path) -> tuple[int, bytes]:
    """The length of a file in bytes, and its first and last 64 KiB: they tell that a long file has changed."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        first = file.read(END_BYTES)
        file.seek(max(0, size - END_BYTES))
        return size, first + file.read(END_BYTES)


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value; the order of names does not matter. What JSON cannot hold counts as its text."""
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
    """A manifest or one of its rows is not usable; the message names the file, the line and the way out."""


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


DECODER = json.JSONDecoder(parse_constant=_refuse_constant)  # json.loads would make one for each row


def read_rows(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, JSON object) of every row of one file, one at a time; blank lines are skipped."""
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
        torn = "; the file ends in the middle of this row: remove it or write it again"
        torn = "" if raw.endswith(b"\n") else torn
        raise ManifestError(f"{where}: is not JSON ({error.msg} at column {error.colno}){torn}") from error
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{where}: is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise ManifestError(f"{where}: must be a JSON object {{...}}, not {show(row)}")
    return row


def show(value: Any) -> str:
    """A value as messages print it, shortened."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def dump_row(row: dict[str, Any], where: str) -> bytes:
    """One line of JSONL, newline included."""
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise ManifestError(f"{where}: the row {show(row.get('id'))} cannot be written as JSON ({error})") from error
