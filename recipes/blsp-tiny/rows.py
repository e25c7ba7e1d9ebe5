"""Manifest rows of the recipe: one JSON object a clip, written whole or not at all.

In: dictionaries with the fields of `Utterance` plus `source`, `licence`, `seconds`, `split`. Out: JSONL
files whose audio paths are relative to the corpus folder.
Where in the flow: every step of the recipe ends here; `blsp encode` and `blsp train` begin here.

Try: `write_rows(Path("x.jsonl"), [{"id": "a", "audio": "a.flac", "text": "Hello."}])`
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from blsp.data.files import write_atomically


def write_rows(path: Path, rows: Iterable[dict]) -> int:
    """Replace `path` in one step; returns the number of rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with write_atomically(path) as partial, partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def read_rows(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def fraction(*parts: object) -> float:
    """A number in [0, 1) that depends on `parts` alone: the recipe's only source of chance."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def summary(name: str, rows: list[dict]) -> str:
    return f"{name}: {len(rows):,} clips, {sum(row['seconds'] for row in rows) / 3600:.2f} h"
