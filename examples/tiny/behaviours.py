"""The transcripts whose continuations the shipped adapter is aligned with: every manifest of the recipe, once a text.

In: `train_*.jsonl` under the corpus folder. Out: `behaviours.jsonl` there, rows of all of them, shuffled by a hash of
their text, so that the first N are a fair sample. Where in the flow: after the speech is made, before `blsp continue`.

Try: `python -m examples.tiny.behaviours --root C`
"""

from __future__ import annotations

import argparse
from pathlib import Path

from examples.tiny.rows import fraction, read_rows, summary, write_rows

MANIFESTS = (
    "train_fotaq",
    "train_kokoro",
    "train_piper",
    "train_flite",
)  # of equal texts the first's clip is taken
FEWEST_WORDS = 3


def transcripts(root: Path) -> list[dict]:
    """Rows of the manifests that are there, one a text, in the order of a hash of it."""
    chosen: dict[str, dict] = {}
    for name in MANIFESTS:
        if (path := root / f"{name}.jsonl").exists():
            for row in read_rows(path):
                if len(row["text"].split()) >= FEWEST_WORDS:
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
