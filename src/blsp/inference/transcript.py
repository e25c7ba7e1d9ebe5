"""Transcripts of recordings of any length, with the times of their words if requested.

In:  recordings; a listener; another listener whose adapter reads out, if the first one's does not.
Out: a `Transcript` for each: text, segments with times, and where the times come from.
Try: `print(transcripts(blsp.load(), ["meeting.wav"], timestamps=True)[0].srt())`
Flow: inference/ — pieces (pauses.py) → listener.embed_audio → **transcripts** → word_times.py, subtitles.py

A recording is processed in pieces, a few minutes at a time, so that memory does not grow with its length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from blsp.data.audio import SAMPLE_RATE, load_audio
from blsp.inference.pauses import Piece, pieces_of
from blsp.inference.subtitles import Segment, as_srt, as_txt, as_vtt, segments_of
from blsp.inference.word_times import Word, sounding, spread, word_times
from blsp.model.adapter_parts import AudioEmbeds
from blsp.settings.shared import VoiceActivity

if TYPE_CHECKING:
    from blsp.inference.listener import Listener

TranscribeMethod = Literal["readout", "rescored", "repeat"]
TimesFrom = Literal["readout", "alignment", "pieces"]
WINDOW_SECONDS = 160.0  # of speech that is encoded together: 16 of the longest pieces


@dataclass(frozen=True)
class Transcript:
    """The transcript of a recording of `seconds`.

    times: where the segments' times come from; None if they were not requested.
        readout: the frames in which the adapter reads each token out.
        alignment: the LLM's text, aligned with an adapter's read-out.
        pieces: a segment is a piece between two pauses; its words have no times.
    """

    text: str
    seconds: float
    times: TimesFrom | None = None
    segments: tuple[Segment, ...] = ()

    def row(self) -> dict[str, Any]:
        """The fields of a line of JSON."""
        if self.times is None:
            return {"text": self.text}
        segments = [
            {"start": s.start, "end": s.end, "text": s.text, "words": [word.row() for word in s.words]}
            for s in self.segments
        ]
        return {"text": self.text, "seconds": self.seconds, "times": self.times, "segments": segments}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Transcript:
        """The transcript from the fields of a line of JSON."""
        segments = tuple(
            Segment(
                segment["start"],
                segment["end"],
                segment["text"],
                tuple(Word(word["word"], word["start"], word["end"]) for word in segment["words"]),
            )
            for segment in row.get("segments", ())
        )
        return cls(row["text"], row.get("seconds", 0.0), row.get("times"), segments)

    def txt(self) -> str:
        """One line for each segment, with the time at which it begins."""
        return as_txt(self.cues())

    def srt(self) -> str:
        """The text of an .srt file."""
        return as_srt(self.cues())

    def vtt(self) -> str:
        """The text of a .vtt file."""
        return as_vtt(self.cues())

    def cues(self) -> list[Segment]:
        """The segments cut into subtitles; words without times are spread over their segment."""
        if self.times != "pieces":
            return list(self.segments)
        return [cue for long in self.segments for cue in segments_of(spread(long.text, long.start, long.end))]


def transcripts(
    listener: Listener,
    audios: Sequence[Any],
    *,
    method: TranscribeMethod | None = None,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    timestamps: bool = False,
    aligner: Listener | None = None,
    vad: VoiceActivity = "auto",
    progress: Callable[[float], Any] = lambda seconds: None,
) -> list[Transcript]:
    """The transcript of each clip. A recording of more than 10 s is cut at pauses and transcribed in pieces.

    method: readout: the adapter's own tokens, without the LLM. rescored: the LLM chooses one of the adapter's likeliest
        read-outs. repeat: the LLM's answer to the instruction to repeat the speech. None: rescored if the adapter reads
        out, otherwise repeat.
    timestamps: find the times of the words, by the adapter's own read-out or that of `aligner`.
    vad: whether to search for speech first, see `pieces_of`.
    progress: called with the seconds of speech that have been transcribed.
    """
    method = method or ("rescored" if listener.reads_out else "repeat")
    samples = [samples_of(audio) for audio in audios]
    pieces = [(i, piece) for i, audio in enumerate(samples) for piece in pieces_of(audio, vad)]
    reader = (listener if listener.reads_out else aligner) if timestamps else None
    texts: list[list[str]] = [[] for _ in audios]
    words: list[list[Word]] = [[] for _ in audios]
    spans: list[list[Segment]] = [[] for _ in audios]
    for window in _windows(pieces):
        heard = [piece for _, piece in window]
        clips = listener.embed_audio(
            [piece.audio for piece in heard],
            rescore=None if method == "repeat" else method == "rescored",
            keep_states=reader is listener,
        )
        said = _texts(listener, clips, method, max_new_tokens, batch_size)
        timed = times_of_words(reader, heard, clips, said) if reader else [[] for _ in said]
        for (i, piece), text, found in zip(window, said, timed, strict=True):
            if text:
                texts[i].append(text)
                words[i] += found
                spans[i].append(Segment(*sounding(piece), text))
            progress(piece.end - piece.start)
    times: TimesFrom = "pieces" if reader is None else "alignment" if method == "repeat" else "readout"
    return [
        Transcript(
            " ".join(texts[i]),
            round(len(audio) / SAMPLE_RATE, 3),
            times if timestamps else None,
            tuple(segments_of(words[i]) if reader else spans[i]) if timestamps else (),
        )
        for i, audio in enumerate(samples)
    ]


def _windows(pieces: Sequence[tuple[int, Piece]]) -> Iterator[list[tuple[int, Piece]]]:
    """The pieces in groups of at most `WINDOW_SECONDS`."""
    window: list[tuple[int, Piece]] = []
    seconds = 0.0
    for entry in pieces:
        length = entry[1].end - entry[1].start
        if window and seconds + length > WINDOW_SECONDS:
            yield window
            window, seconds = [], 0.0
        window.append(entry)
        seconds += length
    if window:
        yield window


def _texts(
    listener: Listener, clips: Sequence[AudioEmbeds], method: TranscribeMethod, max_new_tokens: int, batch_size: int
) -> list[str]:
    if method == "repeat":
        return listener.repeat(clips, max_new_tokens, batch_size)
    return listener.readout(clips)


def times_of_words(
    reader: Listener, pieces: Sequence[Piece], clips: Sequence[AudioEmbeds], texts: Sequence[str]
) -> list[list[Word]]:
    """The words of each piece, by the read-out of `reader`; the clips may hold the states of its encoder already."""
    if any(clip.states is None for clip in clips):
        clips = reader.embed_audio([piece.audio for piece in pieces], keep_states=True)
    states = [clip.states for clip in clips if clip.states is not None]
    return word_times(reader.model, reader.tokenizer, pieces, states, texts)


def samples_of(audio: Any) -> np.ndarray:
    """Samples (N,) of a path, bytes or data-URI, or of an array at 16 kHz: integers are scaled, channels mixed."""
    if not isinstance(audio, np.ndarray):
        return load_audio(audio)
    if audio.ndim == 1 and audio.dtype.kind == "f":
        return audio
    return load_audio(audio, sampling_rate=SAMPLE_RATE)
