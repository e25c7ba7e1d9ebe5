"""Audio in: a path, bytes, a data-URI or an array -> 16 kHz mono float32.

    >>> audio = load_audio("clip.opus", start=1.5, duration=2.0)     # (32000,) float32
    >>> probe_audio("clip.opus").seconds                             # header only, nothing decoded
    >>> is_silent(audio)

Reads wav, flac, ogg/vorbis, opus and mp3 (`audio_file.py`), resamples through soxr. Files are read from
`start` on, in blocks, so a cut out of a ten-hour recording costs a cut, and a header that promises a
terabyte costs nothing. A cut is sample-accurate: it equals the same slice of the whole clip. Whatever
cannot be speech (no samples, NaN, truncated, not audio) is an `AudioError` that names the source. First in
the flow: every step that hears gets its samples here.

Letters: N samples, C channels.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from blsp.data.audio_file import (
    UNKNOWN_LENGTH,
    AudioError,
    AudioSource,
    SoundStream,
    check_rate,
    describe_source,
    go_to,
    mix_channels,
    open_audio,
    read_blocks,
)

SAMPLE_RATE = 16_000  # samples per second, everywhere after this file
LONGEST_SECONDS = 24 * 3600.0  # a longer clip must be cut with start and duration
FARTHEST = 1e9  # seconds: no recording is that long
END_SLACK = 0.1  # seconds: published segment times overshoot the file's end by a rounding
MARGIN = SAMPLE_RATE // 10  # 16 kHz samples decoded around a cut for the resampler's filter

__all__ = [
    "SAMPLE_RATE",
    "AudioError",
    "AudioInfo",
    "load_audio",
    "probe_audio",
    "is_silent",
    "write_wav",
]


@dataclass(frozen=True)
class AudioInfo:
    """What a file's header says."""

    seconds: float
    sampling_rate: int
    channels: int
    format: str  # libsndfile's name of the container: WAV, FLAC, OGG, MP3, ...


def load_audio(
    source: AudioSource,
    *,
    start: float = 0.0,
    duration: float | None = None,
    sampling_rate: int | None = None,
    longest: float = LONGEST_SECONDS,
) -> np.ndarray:
    """Samples of `source` from `start` on, `duration` seconds or to its end: (N,) float32, mono, 16 kHz.

    `source`: a path, the bytes of a file, a `data:audio/...;base64,` URI, or an array, which needs its
    `sampling_rate`; an array's shorter axis is its channels, integers are scaled by their type. Digital
    silence is fine here (see `is_silent`); more than `longest` seconds are not (so a decompression bomb
    ends early).
    """
    name = describe_source(source)
    _check_cut(name, start, duration)
    if isinstance(source, np.ndarray):
        audio = _cut_array(source, name, start, duration, sampling_rate, longest)
    else:
        with open_audio(source, name) as stream:
            audio = _cut_stream(stream, name, start, duration, longest)
    if not len(audio):
        raise AudioError(f"{name}: no sample lies between {start} s and {start + (duration or 0.0)} s")
    if not np.isfinite(audio).all():
        raise AudioError(f"{name}: holds NaN or infinite samples; make the file again or drop the row")
    return audio


def probe_audio(source: str | os.PathLike[str] | bytes) -> AudioInfo:
    """What the header says; decodes only a stream whose header does not tell its length."""
    name = describe_source(source)
    with open_audio(source, name) as stream:
        frames = stream.frames
        if frames >= UNKNOWN_LENGTH:
            frames = sum(len(block) for block in read_blocks(stream, name))
        if not frames:
            raise AudioError(f"{name}: the recording is empty (no samples)")
        return AudioInfo(frames / stream.samplerate, stream.samplerate, stream.channels, stream.format)


def is_silent(audio: np.ndarray, threshold_db: float = -60.0) -> bool:
    """Whether no 20 ms stretch of `audio` (N,) is louder than `threshold_db` (RMS, dB below full scale).

    A constant offset is no sound.
    """
    if not len(audio):
        return True
    stretch = min(SAMPLE_RATE // 50, len(audio))
    squares = np.square(audio - audio.mean(dtype=np.float64), dtype=np.float64)
    energies = np.add.reduceat(squares, np.arange(0, len(audio), stretch))
    return bool(energies.max() / stretch < 10.0 ** (threshold_db / 10))


def write_wav(path: str | os.PathLike[str], audio: np.ndarray, rate: int = SAMPLE_RATE) -> None:
    """Write `audio` (N,), float in [-1, 1], as 16-bit PCM, clipped beyond. The file appears whole."""
    target = Path(path)
    samples = np.clip(np.round(np.asarray(audio, dtype=np.float64) * 32768), -32768, 32767).astype(np.int16)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        soundfile.write(partial, samples, rate, subtype="PCM_16", format="WAV")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _cut_stream(
    stream: SoundStream, name: str, start: float, duration: float | None, longest: float
) -> np.ndarray:
    """Decode the cut with a margin, resample it, and trim the margin off at 16 kHz."""
    rate, total = stream.samplerate, stream.frames
    if total < UNKNOWN_LENGTH:
        _check_place(name, total / rate, start, duration, longest)
    cut = _plan_cut(rate, start, duration)
    go_to(stream, cut.first, name)
    audio, frames = _resample(read_blocks(stream, name, cut.frames), rate, name, longest)
    end = cut.first + frames
    if total >= UNKNOWN_LENGTH:
        _check_place(name, end / rate, start, duration, longest)
    elif end < min(total, cut.first + cut.frames):
        promised = f"its header promises {total / rate:.3f} s"
        raise AudioError(f"{name}: truncated, {promised} but it ends at {end / rate:.3f} s; make it again")
    return np.ascontiguousarray(audio[cut.skip : cut.skip_and_keep])


def _cut_array(
    array: np.ndarray, name: str, start: float, duration: float | None, rate: int | None, longest: float
) -> np.ndarray:
    if rate is None:
        raise AudioError(f"{name}: an array needs its sampling_rate, in samples per second")
    check_rate(rate, name)
    mono = mix_channels(_scale_array(array, name))  # (N,)
    if not len(mono):
        raise AudioError(f"{name}: the recording is empty (no samples)")
    _check_place(name, len(mono) / rate, start, duration, longest)
    cut = _plan_cut(rate, start, duration)
    piece = mono[cut.first : int(min(len(mono), cut.first + cut.frames))]
    audio, _ = _resample([piece], rate, name, longest)
    return np.array(audio[cut.skip : cut.skip_and_keep], dtype=np.float32)  # never a view of the caller's


def _scale_array(array: np.ndarray, name: str) -> np.ndarray:
    """Any numeric array of one or two axes -> (N, C) float32 in [-1, 1]."""
    if array.ndim not in (1, 2) or array.dtype.kind not in "fiu":
        raise AudioError(f"{name}: an audio array has one or two axes of integer or float samples")
    frames = array[:, None] if array.ndim == 1 else array if array.shape[0] >= array.shape[1] else array.T
    if not frames.size:
        raise AudioError(f"{name}: the recording is empty (no samples)")
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):  # what overflows becomes inf, which load_audio refuses
            return frames.astype(np.float32)
    half = float(2 ** (8 * array.dtype.itemsize - 1))
    centre = half if array.dtype.kind == "u" else 0.0
    return ((frames.astype(np.float64) - centre) / half).astype(np.float32)


@dataclass(frozen=True)
class _Cut:
    """Which frames to decode at the source's rate, and which of the resulting 16 kHz samples to keep."""

    first: int
    frames: float  # infinite: to the end
    skip: int = 0
    skip_and_keep: int | None = None


def _plan_cut(rate: int, start: float, duration: float | None) -> _Cut:
    """The first frame falls on a 16 kHz sample (44.1 kHz: every 441 frames are 160 samples), a margin
    before the cut, so that the resampler meets what it would meet in the whole clip."""
    begin = round(start * SAMPLE_RATE)
    keep = math.inf if duration is None else round((start + duration) * SAMPLE_RATE) - begin
    if rate == SAMPLE_RATE:
        return _Cut(begin, keep)
    shared = math.gcd(rate, SAMPLE_RATE)
    periods = max(0, begin - MARGIN) // (SAMPLE_RATE // shared)
    skip = begin - periods * (SAMPLE_RATE // shared)
    if duration is None:
        return _Cut(periods * (rate // shared), math.inf, skip)
    frames = math.ceil((skip + keep + MARGIN) * rate / SAMPLE_RATE)
    return _Cut(periods * (rate // shared), frames, skip, skip + int(keep))


def _resample(blocks: Iterable[np.ndarray], rate: int, name: str, longest: float) -> tuple[np.ndarray, int]:
    """All blocks at 16 kHz as one array (N,) float32, and how many source frames there were."""
    stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32") if rate != SAMPLE_RATE else None
    pieces: list[np.ndarray] = []
    frames = 0
    for block in blocks:
        frames += len(block)
        if frames / rate > longest + 2.0:  # 2 s: more than the margins of a cut and a header's rounding
            raise AudioError(f"{name}: more than {longest:.0f} s of audio; cut it with start and duration")
        pieces.append(stream.resample_chunk(block) if stream else block)
    if stream:
        pieces.append(stream.resample_chunk(np.zeros(0, dtype=np.float32), last=True))
    return (np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.float32)), frames


def _check_cut(name: str, start: float, duration: float | None) -> None:
    if not 0 <= start <= FARTHEST:
        raise AudioError(f"{name}: start is {start!r:.40} seconds; it must be 0 or more")
    if duration is not None and not 0 < duration <= FARTHEST:
        raise AudioError(f"{name}: duration is {duration!r:.40} seconds; it must be more than 0")


def _check_place(name: str, seconds: float, start: float, duration: float | None, longest: float) -> None:
    """Whether the cut lies in a recording of `seconds`, and is not too long."""
    if start >= seconds:
        raise AudioError(f"{name}: start {start} s lies past its end at {seconds:.3f} s")
    if duration is not None and start + duration > seconds + END_SLACK:
        end = start + duration
        raise AudioError(f"{name}: the cut ends at {end:.3f} s, but the recording at {seconds:.3f} s")
    wanted = seconds - start if duration is None else duration
    if wanted > longest:
        raise AudioError(f"{name}: {wanted:.0f} s of audio; at most {longest:.0f} s are taken, so cut it")
