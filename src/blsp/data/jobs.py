"""How a job that writes one row per input goes on after it was killed.

In:  the output file, the inputs in their order, and what the job was asked.
Out: how many inputs are dealt with; a refusal where the file was begun in another way.
Try: `require_same_job("out.jsonl", {"model": "blsp-tiny"})`
Flow: inference/ — `blsp generate` and `blsp transcribe`. Rows are written in the inputs' order, so the place where a
      job stopped is one number, and no list of finished keys is held in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from blsp.data.jsonl import SkippedLog, read_rows, show
from blsp.weights.shipped import find_model


class ResumeError(ValueError):
    """An output file that this job did not begin; the message says what differs and the way out."""


def require_same_job(out: Path, asked: dict[str, Any]) -> None:
    """Note in `<out>.meta.json` what the job was asked; raise ResumeError when it was begun in another way."""
    path = Path(f"{out}.meta.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        begun = json.loads(path.read_text(encoding="utf-8"))
        different = [name for name in asked if begun.get(name) != asked[name]]
        if different:
            told = "; ".join(
                f"{name} was {show(begun.get(name))}, is {show(asked[name])}" for name in different
            )
            raise ResumeError(
                f"{out}: was begun in another way ({told}); choose another --out or remove it and {path}"
            )
    elif out.exists() and out.stat().st_size:
        raise ResumeError(
            f"{out}: exists, and {path} that would say how it was made does not; choose another --out"
        )
    else:
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(asked, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, path)


def count_dealt_with(
    out: Path, inputs: Iterable[dict[str, Any]], key: str, answer: str, skipped: SkippedLog
) -> int:
    """How many of `inputs` are dealt with, from the first on: they are in `out`, in this order, or skipped.

    An input's `key` names it; in `out` it stands with its `answer`. Raises ResumeError when `out` holds other rows.
    """
    rows = (row for _, row in read_rows(out))
    waiting = next(rows, None)
    count = 0
    for row in inputs:
        if waiting is not None and row[key] == waiting.get(key):
            changed = [
                name for name in {**waiting, **row} if name != answer and row.get(name) != waiting.get(name)
            ]
            if changed:
                raise ResumeError(
                    f"{out}: {key} {show(row[key])} was answered when its {changed[0]} was "
                    f"{show(waiting.get(changed[0]))}; choose another --out or remove it"
                )
            waiting = next(rows, None)
        elif row[key] not in skipped:
            break
        count += 1
    if waiting is not None:
        raise ResumeError(
            f"{out}: holds {key} {show(waiting.get(key))} where the input has another; choose another --out or "
            "remove it"
        )
    return count


def model_digest(model: str) -> str | None:
    """SHA-256 over a local model folder's own weights and configuration; None for a hub id."""
    folder = Path(find_model(model))
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")])
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()
