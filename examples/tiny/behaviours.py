"""The transcripts whose continuations the shipped adapter is aligned with: every manifest of the recipe, once a text.

In: `train_*.jsonl` under the corpus folder. Out: `behaviours.jsonl` there, at most half of it in flite's voices,
shuffled by a hash of the text, so that the first N are a fair sample.
Where in the flow: after the speech is made, before `blsp continue`.

Try: `python -m examples.tiny.behaviours --root C`
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

from examples.tiny.rows import fraction, read_rows, summary, write_rows

MANIFESTS = ("train_fotaq", "train_kokoro", "train_piper")  # of equal texts the first's clip is taken
CHEAP = "train_flite"  # as many rows of it as of all the others
FEWEST_WORDS = 3


def spoken(path: Path) -> Iterator[dict]:
    """Rows of a manifest, if it is there, that say enough to go on from."""
    if path.exists():
        yield from (row for row in read_rows(path) if len(row["text"].split()) >= FEWEST_WORDS)


def transcripts(root: Path) -> list[dict]:
    """Rows of the manifests that are there, one a text, in the order of a hash of it."""
    chosen: dict[str, dict] = {}
    for name in (*MANIFESTS, CHEAP):
        room = len(chosen) if name == CHEAP else math.inf
        for row in spoken(root / f"{name}.jsonl"):
            if room <= 0:
                break
            room -= row["text"].casefold() not in chosen
            chosen.setdefault(row["text"].casefold(), row)
    return sorted(chosen.values(), key=lambda row: fraction(row["text"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="the corpus folder")
    options = parser.parse_args()
    rows = transcripts(options.root)
    write_rows(options.root / "behaviours.jsonl", rows)
    print(summary("behaviours", rows))


if __name__ == "__main__":
    main()
