"""The transcripts whose continuations the shipped adapter is aligned with: every manifest of the recipe, once a text.

In:  `train_*.jsonl` under the corpus folder.
Out: there, `behaviours_voices.jsonl` (recordings and neural voices) and `behaviours_flite.jsonl` (as much of flite as
     makes 20,480 texts in all), each shuffled by a hash of the text, so that the first N are a fair sample.
Where in the flow: after the speech is made, before `blsp continue`.

Try: `python recipes/blsp-tiny/behaviours.py --root C`
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

from rows import fraction, read_rows, summary, write_rows

VOICES = ("train_fotaq", "train_kokoro", "train_piper")  # of equal texts the first's clip is taken
TEXTS = 20_480
FEWEST_WORDS = 3


def spoken(path: Path) -> Iterator[dict]:
    """Rows of a manifest, if it is there, that say enough to go on from."""
    if path.exists():
        yield from (row for row in read_rows(path) if len(row["text"].split()) >= FEWEST_WORDS)


def transcripts(root: Path) -> tuple[list[dict], list[dict]]:
    """Rows of the better voices and of flite, one a text over both, in the order of a hash of it."""
    voices: dict[str, dict] = {}
    for name in VOICES:
        for row in spoken(root / f"{name}.jsonl"):
            voices.setdefault(row["text"].casefold(), row)
    flite = {row["text"].casefold(): row for row in spoken(root / "train_flite.jsonl")}
    others = _shuffled(row for text, row in flite.items() if text not in voices)
    return _shuffled(voices.values()), others[: max(TEXTS - len(voices), 0)]


def _shuffled(rows: Iterable[dict]) -> list[dict]:
    return sorted(rows, key=lambda row: fraction(row["text"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="the corpus folder")
    options = parser.parse_args()
    for name, rows in zip(("voices", "flite"), transcripts(options.root), strict=True):
        write_rows(options.root / f"behaviours_{name}.jsonl", rows)
        print(summary(f"behaviours_{name}", rows))


if __name__ == "__main__":
    main()
