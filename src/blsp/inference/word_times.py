"""Times of the words of a transcript.

In:  a piece of a recording, its transcript, the encoder's states, a model whose adapter reads out.
Out: `Word`s with their beginnings and ends in seconds of the recording.
Try: `word_times(listener, pieces, states, texts)`
Flow: inference/ — transcripts → **words with times** → subtitles.py

The best CTC path that spells the transcript (features/align.py) gives the read-out frame at which each word begins. A
read-out gives a token near its beginning and says little about its end. So a word ends when the next one begins, or
when the recording becomes quiet:

    tokens       the . . cat . . . . . sat . .        . is blank
    quiet        _               _ _ _         _
    words         the     cat          sat

Shapes: T encoder frames, E encoder width, U tokens, W words, P quiet spans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from blsp.features.align import token_runs
from blsp.inference.pauses import Piece, quiet_spans
from blsp.llm.prompt import transcript_ids
from blsp.model.adapter_parts import place_centres
from blsp.model.modeling_blsp import BlspForConditionalGeneration

FRAME_SECONDS = 0.02  # of the encoder
SHORTEST_PAUSE = 0.15  # seconds of quiet inside a piece; shorter quiet is the closure of a consonant
REACH = 0.25  # the most seconds between a word's first token and the end of the pause before it
EDGE_REACH = 0.5  # the same at the beginning of a piece
LONGEST_END = 0.8  # seconds from a word's last token to its end
SHORTEST_WORD = 0.02


@dataclass(frozen=True)
class Word:
    """A word with its punctuation; seconds from the recording's start."""

    text: str
    start: float
    end: float

    def row(self) -> dict[str, Any]:
        """The fields in JSON, with the names of OpenAI's API."""
        return {"word": self.text, "start": self.start, "end": self.end}


def word_times(
    model: BlspForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    pieces: Sequence[Piece],
    states: Sequence[Tensor],
    texts: Sequence[str],
) -> list[list[Word]]:
    """The words of each piece. states: of this model's encoder, (T, E) for each piece. texts: their transcripts.

    If a transcript does not fit into the piece's frames, its words are spread over the piece by their length.
    """
    tokens = [transcript_ids(tokenizer, text) for text in texts]
    spoken = [i for i, ids in enumerate(tokens) if ids]
    runs = token_runs(model, [states[i] for i in spoken], [tokens[i] for i in spoken]) if spoken else []
    width, first_centre = (FRAME_SECONDS * frames for frames in place_centres(model.model.multi_modal_projector))
    words: list[list[Word]] = [[] for _ in texts]
    for i, ends in zip(spoken, runs, strict=True):
        piece, names = pieces[i], texts[i].split()
        if ends is None:
            words[i] = spread(texts[i], *sounding(piece))
            continue
        first, last = _word_runs(tokenizer, tokens[i], ends, len(names))  # (W,), (W,) places
        # the left edge of the first place, and the centre of the last
        starts = np.maximum(0.0, first_centre + (first - 0.5) * width)
        borders = _borders(starts, first_centre + last * width, quiet_spans(piece.audio), piece.end - piece.start)
        words[i] = [
            Word(name, round(piece.start + start, 3), round(piece.start + end, 3))
            for name, (start, end) in zip(names, borders.tolist(), strict=True)
        ]
    return words


def _word_runs(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], runs: NDArray[np.float64], count: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The first and the last place of each of `count` words, from those of the tokens (U, 2)."""
    # a token belongs to the last word of the text up to this token
    written = [len(tokenizer.decode(ids[: number + 1]).split()) for number in range(len(ids))]
    owners = np.clip(np.array(written) - 1, 0, count - 1)
    numbers = np.arange(count)
    first, last = np.searchsorted(owners, numbers), np.searchsorted(owners, numbers, side="right") - 1
    return runs[np.minimum(first, len(ids) - 1), 0], runs[np.maximum(last, 0), 1]


def _borders(
    starts: NDArray[np.float64], lasts: NDArray[np.float64], quiet: NDArray[np.float64], seconds: float
) -> NDArray[np.float64]:
    """Beginning and end (W, 2) of each word of a piece.

    starts, lasts (W,): seconds of the words' first and last tokens. quiet: spans (P, 2). seconds: the piece's length.
    """
    starts = starts.copy()
    ends = np.append(starts[1:], seconds)
    for begin, end in quiet:
        if end >= seconds - SHORTEST_WORD:  # the piece ends in quiet
            ends[-1] = begin
        elif begin == 0 and abs(starts[0] - end) < EDGE_REACH:
            starts[0] = end
        elif begin > 0 and end - begin >= SHORTEST_PAUSE:
            # the word that begins nearest to the end of the pause follows it
            word = int(np.abs(starts - end).argmin())
            if abs(starts[word] - end) < REACH:
                starts[word] = end
                if word:
                    ends[word - 1] = begin
    starts = np.maximum.accumulate(starts)
    ends = np.minimum(ends, lasts + LONGEST_END)
    ends[:-1] = np.minimum(ends[:-1], starts[1:])
    return np.stack([starts, np.maximum(ends, starts + SHORTEST_WORD)], axis=1)


def sounding(piece: Piece) -> tuple[float, float]:
    """Beginning and end of a piece in seconds of the recording, without the quiet at its edges."""
    quiet = quiet_spans(piece.audio)
    start, end = piece.start, piece.end
    if len(quiet) and quiet[0][0] == 0:
        start += float(quiet[0][1])
    if len(quiet) and piece.start + quiet[-1][1] >= piece.end - SHORTEST_WORD:
        end = piece.start + float(quiet[-1][0])
    return (round(start, 3), round(end, 3)) if end > start else (round(piece.start, 3), round(piece.end, 3))


def spread(text: str, start: float, end: float) -> list[Word]:
    """The words of a text without known times; the duration of each is its share of the characters."""
    words = text.split()
    shares = np.cumsum([0] + [len(word) + 1 for word in words]) / max(1, len(text) + 1)
    edges = np.round(start + (end - start) * np.minimum(shares, 1.0), 3).tolist()
    return [Word(word, *ends) for word, ends in zip(words, pairwise(edges), strict=True)]
