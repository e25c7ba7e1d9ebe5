"""Word drills: lists of unrelated words, so that every common word is heard often.

In: `texts/words_en.txt.gz`, the words of our sentence lists that the LLM writes as one token, commonest first.
Out: lines of eight words in random order, in rounds; each word once a round, the commoner half twice.
Where in the flow: `lines.py` plans them for the engine "words" (flite's voices).

A token is read out as well as it has been heard: with sentences alone, words heard more than thirty times were
wrong in 12 % of their places and words heard at most three times in 80 to 98 %. Sentences follow Zipf's law and
never mend that; drills do, at a thirtieth of a CPU second a second of speech.

Try: `next(drills(seed=0))`
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator

from heldout import TEXTS, HeldOut
from rows import fraction

ROUNDS = 24
WORDS_A_LINE = 8


def word_list() -> list[str]:
    with gzip.open(TEXTS / "words_en.txt.gz", "rt", encoding="utf-8") as file:
        return file.read().split()


def drills(seed: int) -> Iterator[tuple[str, float]]:
    """(line, its place in [0, 1)): round after round, so that any beginning holds every word as often."""
    words, held_out = word_list(), HeldOut.load()
    for turn in range(ROUNDS):
        said = words if turn % 2 == 0 else words[: len(words) // 2]
        said = sorted(said, key=lambda word, turn=turn: fraction("drill", seed, turn, word))
        for start in range(0, len(said), WORDS_A_LINE):
            line = " ".join(said[start : start + WORDS_A_LINE])
            if not held_out.touches(line):
                yield line[0].upper() + line[1:] + ".", (turn + start / len(said)) / ROUNDS
