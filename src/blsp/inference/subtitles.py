"""Subtitles: words with times → readable cues, as SRT (SubRip) and WebVTT.

In:  `Word`s. Out: segments of at most two lines; the text of an .srt or .vtt file.
Try: `as_srt(segments_of(words))`
Flow: inference/ — word_times.py → **subtitles.py** → `blsp transcribe --format srt`, the server

Dynamic programming finds the cuts with the lowest cost. A cut at the end of a sentence or before a pause costs little,
a cut in the middle of a phrase much. A cue should not contain a pause or be shown for less than a second. The limits on
characters, lines and seconds (Netflix' and the BBC's guidelines, rounded) are never exceeded, except by a single word.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from blsp.inference.word_times import Word

LINE = 42  # characters
LINES = 2
LONGEST = 7.0  # seconds
SHORTEST = 1.0
PAUSE = 0.3  # seconds between two words that count as a pause
# Costs of a cut, in the unit of one cue
PER_CUE = 1.0
MID_PHRASE = 2.0  # the cue ends without punctuation or a pause
AT_COMMA = 0.5
AT_PAUSE = 0.3  # without punctuation
PAUSE_INSIDE = 2.0  # per second of pause inside a cue
SENTENCE_INSIDE = 1.5  # a sentence ends inside a cue; it costs more than another cue (PER_CUE)
TOO_SHORT = 8.0  # per second below SHORTEST


@dataclass(frozen=True)
class Segment:
    """A part of a transcript; seconds from the recording's start. words: empty if their times are not known."""

    start: float
    end: float
    text: str
    words: tuple[Word, ...] = ()


def segments_of(words: Sequence[Word]) -> list[Segment]:
    """The words cut into segments that can be shown as subtitles."""
    best = [0.0] + [float("inf")] * len(words)  # the least cost of the first n words
    begins = [0] * (len(words) + 1)  # where the last segment of them begins
    for end in range(1, len(words) + 1):
        for begin in range(end - 1, -1, -1):
            if end - begin > 1 and not _fits(words[begin:end]):
                break
            cost = best[begin] + _cost(words, begin, end)
            if cost < best[end]:
                best[end], begins[end] = cost, begin
    segments = []
    end = len(words)
    while end:
        segments.append(_segment(words[begins[end] : end]))
        end = begins[end]
    return segments[::-1]


def _segment(words: Sequence[Word]) -> Segment:
    return Segment(words[0].start, words[-1].end, " ".join(word.text for word in words), tuple(words))


def _fits(words: Sequence[Word]) -> bool:
    if words[-1].end - words[0].start > LONGEST:
        return False
    text = " ".join(word.text for word in words)
    return len(text) <= LINES * LINE + 1 and len(lines_of(text)) <= LINES


def _cost(words: Sequence[Word], begin: int, end: int) -> float:
    """The cost of the cue words[begin:end]."""
    cost = PER_CUE
    following = words[end].start if end < len(words) else float("inf")
    if end < len(words):
        cost += _cost_of_cut(words[end - 1], words[end])
    for first, second in zip(words[begin : end - 1], words[begin + 1 : end], strict=True):
        pause = second.start - first.end
        cost += PAUSE_INSIDE * pause if pause > PAUSE else 0.0
        cost += SENTENCE_INSIDE if _ends_sentence(first) else 0.0
    shown = min(max(words[end - 1].end - words[begin].start, SHORTEST), following - words[begin].start)
    return cost + TOO_SHORT * max(0.0, SHORTEST - shown)


def _cost_of_cut(before: Word, after: Word) -> float:
    if _ends_sentence(before):
        return 0.0
    if before.text[-1:] in ",;:，、；：—–":
        return AT_COMMA
    return AT_PAUSE if after.start - before.end > PAUSE else MID_PHRASE


def _ends_sentence(word: Word) -> bool:
    return word.text.rstrip("\"'”’»)")[-1:] in tuple(".?!…。？！")


def lines_of(text: str) -> list[str]:
    """The text in lines of at most `LINE` characters; two lines have similar lengths."""
    lines = textwrap.wrap(text, LINE)
    if len(lines) == 2:
        cuts = [i for i, letter in enumerate(text) if letter == " " and i <= LINE and len(text) - i - 1 <= LINE]
        if cuts:
            cut = min(cuts, key=lambda i: abs(2 * i + 1 - len(text)))
            return [text[:cut], text[cut + 1 :]]
    return lines


def cue_times(segments: Sequence[Segment]) -> list[tuple[float, float]]:
    """When each cue is shown: at least `SHORTEST` seconds, unless the next one begins earlier; at most `LONGEST`."""
    times = []
    for i, segment in enumerate(segments):
        following = segments[i + 1].start if i + 1 < len(segments) else float("inf")
        end = min(max(segment.end, segment.start + SHORTEST), segment.start + LONGEST, following)
        times.append((segment.start, end))
    return times


def as_srt(segments: Sequence[Segment]) -> str:
    """SubRip: for each cue a number, the times with a comma, the lines."""
    cues = []
    for number, ((start, end), segment) in enumerate(zip(cue_times(segments), segments, strict=True), start=1):
        times = f"{_clock(start)} --> {_clock(end)}".replace(".", ",")
        cues.append("\n".join([str(number), times, *lines_of(segment.text)]) + "\n")
    return "\n".join(cues)


def as_vtt(segments: Sequence[Segment]) -> str:
    """WebVTT (W3C): a header, the times with a point, the lines with & and < escaped."""
    cues = ["WEBVTT\n"]
    for (start, end), segment in zip(cue_times(segments), segments, strict=True):
        lines = [
            line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") for line in lines_of(segment.text)
        ]
        cues.append("\n".join([f"{_clock(start)} --> {_clock(end)}", *lines]) + "\n")
    return "\n".join(cues)


def as_txt(segments: Sequence[Segment]) -> str:
    """One line for each segment, after the time at which it begins."""
    return "".join(f"[{_clock(segment.start)}] {segment.text}\n" for segment in segments)


def _clock(seconds: float) -> str:
    """3725.5 → 01:02:05.500"""
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 1000:02d}.{rest % 1000:03d}"
