"""Texts and voices that must never be trained on: held-out ones, and the evaluation half of questions and commands.

In: the committed transcript lists under `texts/`. Out: a yes or no for any text.
Where in the flow: every text passes here before it is spoken or trained on; `tests/recipes/test_recipe_split.py`
proves it.

Try: `HeldOut.load().touches("Please enter your agent number followed by the pound key.")` is True.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

TEXTS = Path(__file__).parent / "texts"
SHORTEST = 4  # words; shorter texts ("thank you", "two") are anybody's
HELD_OUT_LISTS = (
    "asterisk_en", "asterisk_es", "asterisk_fr", "asterisk_it", "asterisk_ru",
    "drascula_en", "fillets_cs", "fillets_nl",
)  # fmt: skip
# Voices (Kokoro) that speak in the evaluation only.
HELD_OUT_VOICES = ("af_nova", "af_sky", "am_eric", "am_onyx", "bf_lily", "bm_fable")


def read_list(name: str, folder: Path = TEXTS) -> list[dict]:
    """The rows of `texts/<name>.jsonl.gz`."""
    with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def words(text: str) -> tuple[str, ...]:
    """Lower case, no punctuation, no accents: what two spellings of the same words have in common."""
    plain = unicodedata.normalize("NFKD", text.lower().replace("’", "'"))
    plain = "".join(c for c in plain if not unicodedata.combining(c)).replace("'", "")
    return tuple(re.findall(r"\w+", plain))


def part_of(text: str) -> str:
    """ "train" or "eval", each half of all texts, decided by the text's words alone."""
    return "eval" if hashlib.sha256(" ".join(words(text)).encode()).digest()[0] & 1 else "train"


@dataclass(frozen=True)
class HeldOut:
    """`whole`: word sequences of held-out texts; `spans`: every run of four or more words inside one."""

    whole: frozenset[int]
    spans: frozenset[int]

    @classmethod
    def load(cls, folder: Path = TEXTS) -> HeldOut:
        return cls.of(held_out_texts(folder))

    @classmethod
    def of(cls, texts: Iterable[str]) -> HeldOut:
        sequences = {words(text) for text in texts}
        whole = frozenset(hash(s) for s in sequences if len(s) >= SHORTEST)
        return cls(whole, frozenset(hash(span) for s in sequences for span in _spans(s)))

    def touches(self, text: str) -> bool:
        """True if `text` equals, contains or is contained in a held-out text, counting from four words on."""
        sequence = words(text)
        if len(sequence) >= SHORTEST and hash(sequence) in self.spans:
            return True
        return any(hash(span) in self.whole for span in _spans(sequence))


def held_out_texts(folder: Path = TEXTS) -> Iterator[str]:
    for name in HELD_OUT_LISTS:
        for row in read_list(name, folder):
            yield row["text"]
            if "en" in row:
                yield row["en"]
    yield from (row["text"] for row in read_list("split", folder) if row["part"] == "eval")


def _spans(sequence: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for start in range(len(sequence) - SHORTEST + 1):
        for end in range(start + SHORTEST, len(sequence) + 1):
            yield sequence[start:end]
