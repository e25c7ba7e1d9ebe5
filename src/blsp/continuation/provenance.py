"""The header of a continuations file: who wrote it, how, and from what.

In:  the facts of a run.
Out: `out.jsonl.meta.json` beside `out.jsonl`, written before the first row; a refusal when a run would go on
     with other facts than it began with.
Try: `read_header("out.jsonl")["llm_sha256"]`
Flow: continuation/ — step 2 reads it to know that the teacher is the LLM it will train against.

A header holds no dates and nothing that differs between two runs of the same command on the same machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from blsp.distributed import Runtime

PACKAGES = ("blsp", "torch", "transformers", "tokenizers", "numpy")
SURROUNDINGS = ("versions", "numerics", "server")  # may change while a job lasts: a warning, not a refusal


class HeaderError(ValueError):
    """A continuations file that was begun in another way; the message says what differs."""


def header_path(out: str | os.PathLike[str]) -> Path:
    """The header that belongs to a continuations file."""
    return Path(f"{os.fspath(out)}.meta.json")


def read_header(out: str | os.PathLike[str]) -> dict[str, Any]:
    """The header of a continuations file."""
    path = header_path(out)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HeaderError(f"{path}: no header ({error}); {out} was not written by blsp continue") from error


def write_header(out: str | os.PathLike[str], header: dict[str, Any]) -> None:
    """Write the header whole."""
    path = header_path(out)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(header, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def surroundings(runtime: Runtime) -> dict[str, Any]:
    """What may move the last bits of a sum: versions, device, number type, threads."""
    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    numerics = {
        "device": runtime.device.type,
        "dtype": str(runtime.dtype),
        "threads": torch.get_num_threads(),
    }
    return {"versions": versions, "numerics": numerics}


def require_same(out: str | os.PathLike[str], begun: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to go on with other facts; `now` may name fewer than `begun` holds."""
    differing = [name for name in now if name not in SURROUNDINGS and begun.get(name) != now[name]]
    if differing:
        told = "; ".join(
            f"{name} was {_short(begun.get(name))}, is {_short(now[name])}" for name in differing
        )
        raise HeaderError(
            f"{out}: was begun in another way ({told}). Give the settings it was begun with, "
            f"choose another --out, or remove {out}, {header_path(out)} and {out}.parts"
        )


def changed_surroundings(begun: dict[str, Any], now: dict[str, Any]) -> str:
    """What is different around the job since it was begun; "" when nothing is."""
    pairs = [
        (f"{group} {name}", begun.get(group, {}).get(name), value)
        for group in SURROUNDINGS
        for name, value in now.get(group, {}).items()
    ]
    return "; ".join(f"{name} was {before}, is {value}" for name, before, value in pairs if before != value)


def file_digest(paths: Iterable[Path]) -> str:
    """SHA-256 over the digests of files, in order."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def text_digest(text: str) -> str:
    """SHA-256 of a text, such as a chat template."""
    return hashlib.sha256(text.encode()).hexdigest()


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."
