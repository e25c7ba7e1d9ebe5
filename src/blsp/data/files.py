"""Atomic writes and digests of files.

In:  a path and what it shall hold; or values and files to be named by their content.
Out: files and folders that appear whole or not at all; SHA-256 digests in hexadecimal.
Try: `write_json("settings.json", {"seed": 1})`
Flow: data/ — under everything that writes; `jobs.py` builds on it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def write_atomically(path: str | os.PathLike[str], *, durable: bool = False) -> Iterator[Path]:
    """A path beside `path`, with the same suffix; what the block writes there gets the name `path` at the end.

    The block may make a file or a folder. When it raises, `path` stays as it was. `durable`: wait until the
    bytes are on the disk.
    """
    target = Path(path)
    partial = target.with_name(f".{target.stem}.{secrets.token_hex(4)}.partial{target.suffix}")
    try:
        yield partial
        if durable:
            for file in partial.rglob("*") if partial.is_dir() else [partial]:
                flush_to_disk(file)
        if target.is_dir():  # a folder cannot replace a folder with files in it
            shutil.rmtree(target)
        os.replace(partial, target)
        if durable:
            flush_to_disk(target.parent)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str, *, durable: bool = False) -> None:
    """Write a UTF-8 text file whole."""
    with write_atomically(path, durable=durable) as partial:
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
