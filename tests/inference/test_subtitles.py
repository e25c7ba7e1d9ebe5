"""Subtitles keep their limits, lose no word, and end at sentences and pauses."""

from __future__ import annotations

import re
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from blsp.inference.subtitles import LINE, LONGEST, SHORTEST, Segment, as_srt, as_vtt, cue_times, lines_of, segments_of
from blsp.inference.word_times import Word, spread

SPOKEN = st.lists(
    st.tuples(st.text("abcdefghij", min_size=1, max_size=14), st.sampled_from(["", "", "", ",", "."])),
    min_size=1,
    max_size=80,
)


@st.composite
def speech(draw: st.DrawFn) -> list[Word]:
    """Words of 0.1 to 1.5 s with pauses of 0 to 3 s."""
    words, now = [], 0.0
    for letters, sign in draw(SPOKEN):
        now += draw(st.sampled_from([0, 0, 0, 0, 0.1, 0.4, 3.0]))
        end = now + draw(st.floats(0.1, 1.5))
        words.append(Word(letters + sign, now, end))
        now = end
    return words


@given(speech())
def test_cues_keep_to_their_limits_and_lose_nothing(words: list[Word]) -> None:
    segments = segments_of(words)
    assert [word for segment in segments for word in segment.words] == words
    shown = cue_times(segments)
    for segment, (start, end) in zip(segments, shown, strict=True):
        assert len(lines_of(segment.text)) <= 2
        assert all(len(line) <= LINE for line in lines_of(segment.text))
        assert " ".join(lines_of(segment.text)) == segment.text
        assert start < end <= start + LONGEST
    for (_, end), (start, _) in pairwise(shown):
        assert end <= start, "two cues are never shown at once"


@given(speech())
def test_a_cue_is_shown_for_a_second_where_it_can_be(words: list[Word]) -> None:
    """Short cues remain only where neither joining nor waiting helps: a limit on the text forbids it."""
    segments = segments_of(words)
    for i, (start, end) in enumerate(cue_times(segments)):
        if end - start < SHORTEST - 1e-9:
            after = segments[i + 1]
            joined = f"{segments[i].text} {after.text}"
            assert len(lines_of(joined)) > 2 or after.end - start > LONGEST


def test_cues_end_at_signs_and_pauses() -> None:
    text = "Good morning, everybody. Today we talk about the weather of the north and about its people. Thank you."
    words = spread(text, 0.0, 9.0)
    assert [segment.text for segment in segments_of(words)] == [
        "Good morning, everybody.",
        "Today we talk about the weather of the north and about its people.",
        "Thank you.",
    ]
    paused = [Word("one", 0, 1), Word("two", 1, 2), Word("three", 5, 6), Word("four", 6, 7)]
    assert [segment.text for segment in segments_of(paused)] == ["one two", "three four"]


def test_two_lines_are_of_like_length() -> None:
    assert lines_of("Today we talk about the weather of the north and the south.") == [
        "Today we talk about the weather",
        "of the north and the south.",
    ]
    assert lines_of("short") == ["short"]
    assert all(len(line) <= LINE for line in lines_of("w" * 100))


def test_srt_and_vtt_as_players_read_them() -> None:
    segments = [Segment(0.5, 2.0, "It's 2 < 3 & so on."), Segment(3725.0404, 3725.5, "Later.")]
    assert as_srt(segments) == (
        "1\n00:00:00,500 --> 00:00:02,000\nIt's 2 < 3 & so on.\n\n"
        "2\n01:02:05,040 --> 01:02:06,040\nLater.\n"
    )  # fmt: skip
    assert as_vtt(segments) == (
        "WEBVTT\n\n00:00:00.500 --> 00:00:02.000\nIt's 2 &lt; 3 &amp; so on.\n\n"
        "01:02:05.040 --> 01:02:06.040\nLater.\n"
    )  # fmt: skip
    assert as_srt([]) == "" and as_vtt([]) == "WEBVTT\n"
    assert not re.search(r"\n\n\n", as_vtt(segments))
