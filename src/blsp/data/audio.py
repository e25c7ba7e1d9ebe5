"""Audio in: a path, bytes, a data-URI or an array -> 16 kHz mono float32.

    >>> audio = load_audio("clip.opus", start=1.5, duration=2.0)     # (32000,) float32
    >>> probe_audio("clip.opus").seconds                             # header only, nothing decoded
    >>> is_silent(audio)

Reads wav, flac, ogg/vorbis, opus and mp3 (also aiff, au, caf, w64, rf64 and NIST sphere) through soundfile;
resamples through soxr. Files are read from `start` on, in blocks, so a cut out of a ten-hour recording costs a
cut, and a header that promises a terabyte costs nothing. A cut is sample-accurate: it equals the same slice of
the whole clip. Whatever cannot be speech (no samples, NaN, truncated, not audio) is an `AudioError` that names
the source. First in the flow: every step that hears gets its samples here.

Letters: N samples, C channels.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import os
import struct
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

SAMPLE_RATE = 16_000  # samples per second, everywhere after this file
LOWEST_RATE, HIGHEST_RATE = 1_000, 768_000  # samples per second that a recording may have
LONGEST_SECONDS = 24 * 3600.0  # a longer clip must be cut with start and duration
END_SLACK = 0.1  # seconds: published segment times overshoot the file's end by a rounding
BLOCK = 1 << 20  # samples decoded at a time, over all channels
MOST_FRAMES_PER_BYTE = 8192  # FLAC's densest frame: 65,535 samples in some 10 bytes
UNKNOWN_LENGTH = 1 << 62  # libsndfile reports about 2**63 frames when a stream does not say
CONTAINERS = frozenset("WAV WAVEX RF64 W64 FLAC OGG MP3 MPEG AIFF AU CAF NIST".split())

AudioSource = str | os.PathLike[str] | bytes | bytearray | memoryview | np.ndarray


class AudioError(ValueError):
    """The source is not usable speech audio; the message names the source, the reason and the way out."""


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
    """Samples of `source` from `start` for `duration` seconds (to the end without) at 16 kHz, mono: (N,) float32.

    `source`: a path, the bytes of a file, a `data:audio/...;base64,` URI, or an array, which needs its
    `sampling_rate`; an array's shorter axis is its channels, integers are scaled by their type. Digital silence is
    fine here (see `is_silent`); more than `longest` seconds are not (a decompression bomb looks like that).
    """
    name = describe_source(source)
    _check_cut(name, start, duration)
    if isinstance(source, np.ndarray):
        audio = _cut_array(source, name, start, duration, sampling_rate, longest)
    else:
        with _open(source, name) as file:
            audio = _read_cut(file, name, start, duration, longest)
    if not len(audio):
        raise AudioError(f"{name}: no samples between {start} s and the end of the cut")
    if not np.isfinite(audio).all():
        raise AudioError(f"{name}: contains NaN or infinite samples; make the file again or drop the row")
    return audio


def probe_audio(source: str | os.PathLike[str] | bytes) -> AudioInfo:
    """What the header says; decodes only a stream whose header does not tell its length."""
    name = describe_source(source)
    with _open(source, name) as file:
        frames = file.frames if file.frames < UNKNOWN_LENGTH else sum(len(b) for b in _blocks(file, name, math.inf))
        if frames <= 0:
            raise AudioError(f"{name}: has no samples; the recording is empty")
        return AudioInfo(frames / file.samplerate, file.samplerate, file.channels, file.format)


def is_silent(audio: np.ndarray, threshold_db: float = -60.0) -> bool:
    """Whether no 20 ms stretch of `audio` (N,) is louder than `threshold_db` (RMS, dB below full scale)."""
    if not len(audio):
        return True
    stretch = SAMPLE_RATE // 50
    squares = np.square(audio, dtype=np.float64)
    sums = np.add.reduceat(squares, np.arange(0, len(audio), stretch))
    return bool(sums.max() / min(stretch, len(audio)) < 10.0 ** (threshold_db / 10))


def write_wav(path: str | os.PathLike[str], audio: np.ndarray, rate: int = SAMPLE_RATE) -> None:
    """Write `audio` (N,) float in [-1, 1] as 16-bit PCM; louder samples are clipped. The file appears whole."""
    target = Path(path)
    samples = np.clip(np.round(np.asarray(audio, dtype=np.float64) * 32768), -32768, 32767).astype(np.int16)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        soundfile.write(partial, samples, rate, subtype="PCM_16", format="WAV")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def describe_source(source: AudioSource) -> str:
    """How a message names the source."""
    if isinstance(source, np.ndarray):
        return f"audio array {source.shape} {source.dtype}"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"audio of {len(source)} bytes"
    text = os.fspath(source)
    return f"{text[:32]}… (data URI)" if text.startswith("data:") else text


# --- checks before any decoding -------------------------------------------------------------------------------


def _check_cut(name: str, start: float, duration: float | None) -> None:
    if not (math.isfinite(start) and start >= 0):
        raise AudioError(f"{name}: start is {start} seconds; it must be 0 or more")
    if duration is not None and not (math.isfinite(duration) and duration > 0):
        raise AudioError(f"{name}: duration is {duration} seconds; it must be more than 0")


def _check_rate(name: str, rate: int) -> None:
    if not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise AudioError(f"{name}: sampling rate {rate} Hz is outside {LOWEST_RATE} to {HIGHEST_RATE} Hz")


def _decode_data_uri(uri: str, name: str) -> bytes:
    head, comma, payload = uri.partition(",")
    if not comma:
        raise AudioError(f"{name}: a data URI reads data:audio/wav;base64,<data>; the comma is missing")
    if not head.endswith(";base64"):
        return urllib.parse.unquote_to_bytes(payload)
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise AudioError(f"{name}: the data is not valid base64 ({error})") from error


def _open(source: str | os.PathLike[str] | bytes | bytearray | memoryview, name: str) -> soundfile.SoundFile:
    """The decoder of a path, bytes or data-URI, its header checked against the file's size."""
    if isinstance(source, str) and source.startswith("data:"):
        source = _decode_data_uri(source, name)
    try:
        opened: io.BytesIO | str
        if isinstance(source, (bytes, bytearray, memoryview)):
            opened, size = io.BytesIO(source), len(source)
            _check_complete(opened, size, name)
            opened.seek(0)
        else:
            opened, size = os.fspath(source), _file_size(Path(source), name)
            with open(opened, "rb") as raw:
                _check_complete(raw, size, name)
        file = soundfile.SoundFile(opened)
    except AudioError:
        raise
    except (soundfile.SoundFileError, TypeError, ValueError, OSError) as error:
        raise AudioError(
            f"{name}: cannot be read as audio ({_reason(error)}); "
            "wav, flac, ogg, opus and mp3 are read, other formats must be converted first"
        ) from error
    try:
        _check_header(file, size, name)
    except AudioError:
        file.close()
        raise
    return file


def _file_size(path: Path, name: str) -> int:
    if not path.exists():
        raise AudioError(f"{name}: no such file")
    if not path.is_file():
        raise AudioError(f"{name}: is not a file")
    size = path.stat().st_size
    if not size:
        raise AudioError(f"{name}: the file is empty (0 bytes)")
    return size


def _reason(error: Exception) -> str:
    return str(getattr(error, "error_string", error)).strip().rstrip(".")


def _check_header(file: soundfile.SoundFile, size: int, name: str) -> None:
    if file.format not in CONTAINERS:
        raise AudioError(f"{name}: {file.format} audio is not supported; convert it to wav or flac")
    _check_rate(name, file.samplerate)
    if file.channels < 1:
        raise AudioError(f"{name}: the header names {file.channels} channels")
    if UNKNOWN_LENGTH > file.frames > size * MOST_FRAMES_PER_BYTE:
        raise AudioError(f"{name}: the header promises {file.frames} samples in {size} bytes; the file is damaged")


def _check_complete(raw: io.BufferedIOBase | io.BytesIO, size: int, name: str) -> None:
    """Refuse a file that ends before its own container says so (libsndfile plays such files silently)."""
    head = raw.read(12)
    missing = 0
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
        missing = _missing_wav_bytes(raw, size)
    elif head[:4] == b"OggS":
        missing = _missing_ogg_bytes(raw, size)
    if missing > 0:
        raise AudioError(f"{name}: truncated, {missing} bytes are missing at the end; fetch or make the file again")


def _missing_wav_bytes(raw: io.BufferedIOBase | io.BytesIO, size: int) -> int:
    """Bytes by which the data chunk passes the file's end; 0 for streams, which write a placeholder length."""
    place = 12
    while place + 8 <= size:
        raw.seek(place)
        tag, length = struct.unpack("<4sI", raw.read(8))
        if tag == b"data":
            return 0 if length >= 0x7FFF0000 else place + 8 + length - size
        place += 8 + length + length % 2
    return 0


def _missing_ogg_bytes(raw: io.BufferedIOBase | io.BytesIO, size: int) -> int:
    """Bytes by which the last page passes the file's end (RFC 3533: 27 bytes, segment table, segments)."""
    tail_start = max(0, size - 65_536 - 282)  # longer than any page
    raw.seek(tail_start)
    tail = raw.read()
    page = tail.rfind(b"OggS")
    while page >= 0 and len(tail) > page + 5 and (tail[page + 4] != 0 or tail[page + 5] > 7):
        page = tail.rfind(b"OggS", 0, page)  # the letters occurred inside compressed data
    if page < 0:
        return 0
    if len(tail) < page + 27:
        return page + 27 - len(tail)
    table_end = page + 27 + tail[page + 26]
    if len(tail) < table_end:
        return table_end - len(tail)
    return table_end + sum(tail[page + 27 : table_end]) - len(tail)


# --- decoding -------------------------------------------------------------------------------------------------


def _blocks(file: soundfile.SoundFile, name: str, frames: float) -> Iterator[np.ndarray]:
    """At most `frames` further frames of the file as mono float32 blocks; stops early where the file does."""
    step = max(1, BLOCK // file.channels)
    while frames > 0:
        try:
            block = file.read(int(min(step, frames)), dtype="float32", always_2d=True)  # (n, C)
        except (soundfile.SoundFileError, RuntimeError, ValueError) as error:
            raise AudioError(f"{name}: damaged audio ({_reason(error)})") from error
        if not len(block):
            return
        frames -= len(block)
        yield mix_channels(block)


def _go_to(file: soundfile.SoundFile, frame: int, name: str) -> None:
    """Seek; MP3 is decoded up to the place instead, since its frames lean on those before them."""
    if file.format in ("MP3", "MPEG"):
        for _ in _blocks(file, name, frame):
            pass
    elif frame:
        try:
            file.seek(frame)
        except (soundfile.SoundFileError, RuntimeError, ValueError) as error:
            raise AudioError(f"{name}: cannot go to sample {frame} ({_reason(error)}); truncated?") from error


def mix_channels(block: np.ndarray) -> np.ndarray:
    """(n, C) -> (n,), the mean of the channels."""
    return block[:, 0] if block.shape[1] == 1 else block.mean(axis=1, dtype=np.float32)


def _read_cut(
    file: soundfile.SoundFile, name: str, start: float, duration: float | None, longest: float
) -> np.ndarray:
    """Decode the cut with a margin, resample it, and trim the margin off at 16 kHz."""
    rate, total = file.samplerate, file.frames
    known = total < UNKNOWN_LENGTH
    if total <= 0:
        raise AudioError(f"{name}: has no samples; the recording is empty")
    if known:
        _check_end(name, total / rate, start, duration)
    _check_longest(name, duration if duration is not None else (total / rate - start if known else 0.0), longest)
    first, wanted, skip, keep = _plan_cut(rate, start, duration)
    _go_to(file, first, name)
    limit = wanted if wanted is not None else math.inf
    audio, frames = _resample_blocks(_blocks(file, name, limit), rate, name, longest)
    if known and frames < min(limit, total - first):
        raise AudioError(
            f"{name}: truncated, the header promises {total / rate:.3f} s but it ends at {(first + frames) / rate:.3f} s"
        )
    if not known:
        _check_end(name, (first + frames) / rate, start, duration)
    return np.ascontiguousarray(audio[skip : skip + keep if keep is not None else None])


def _cut_array(
    array: np.ndarray, name: str, start: float, duration: float | None, rate: int | None, longest: float
) -> np.ndarray:
    if rate is None:
        raise AudioError(f"{name}: an array needs its sampling_rate, in samples per second")
    _check_rate(name, rate)
    mono = mix_channels(_scale_array(array, name))  # (N,)
    if not len(mono):
        raise AudioError(f"{name}: has no samples")
    _check_end(name, len(mono) / rate, start, duration)
    _check_longest(name, duration if duration is not None else len(mono) / rate - start, longest)
    first, wanted, skip, keep = _plan_cut(rate, start, duration)
    piece = mono[first : first + wanted if wanted is not None else None]
    audio, _ = _resample_blocks(iter([piece]), rate, name, longest)
    audio = np.array(audio[skip : skip + keep if keep is not None else None], dtype=np.float32)
    return audio


def _scale_array(array: np.ndarray, name: str) -> np.ndarray:
    """Any numeric array of one or two axes -> (N, C) float32 in [-1, 1]."""
    if array.ndim not in (1, 2) or array.dtype.kind not in "fiu":
        raise AudioError(f"{name}: an audio array has one or two axes and integer or float samples")
    frames = array[:, None] if array.ndim == 1 else array if array.shape[0] >= array.shape[1] else array.T
    if frames.shape[1] < 1:
        raise AudioError(f"{name}: has no samples")
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):  # what overflows becomes inf, which load_audio refuses
            return frames.astype(np.float32)
    half = float(2 ** (8 * array.dtype.itemsize - 1))
    centre = half if array.dtype.kind == "u" else 0.0
    return ((frames.astype(np.float64) - centre) / half).astype(np.float32)


def _check_end(name: str, seconds: float, start: float, duration: float | None) -> None:
    if start >= seconds:
        raise AudioError(f"{name}: start {start} s is past its end at {seconds:.3f} s")
    if duration is not None and start + duration > seconds + END_SLACK:
        raise AudioError(f"{name}: the cut ends at {start + duration:.3f} s, the recording at {seconds:.3f} s")


def _check_longest(name: str, seconds: float, longest: float) -> None:
    if seconds > longest:
        raise AudioError(f"{name}: {seconds:.0f} s of audio; at most {longest:.0f} s are taken: cut it (start, duration)")


def _plan_cut(rate: int, start: float, duration: float | None) -> tuple[int, int | None, int, int | None]:
    """(first source frame, source frames, 16 kHz samples to skip, samples to keep) for a cut.

    The first source frame falls on a 16 kHz sample (44.1 kHz: every 441 frames are 160 samples), a little before the
    cut, so that the resampler's filter sees what it would see in the whole clip.
    """
    first_sample = round(start * SAMPLE_RATE)
    keep = None if duration is None else round((start + duration) * SAMPLE_RATE) - first_sample
    if rate == SAMPLE_RATE:
        return first_sample, keep, 0, keep
    shared = math.gcd(rate, SAMPLE_RATE)
    period_in, period_out = rate // shared, SAMPLE_RATE // shared
    margin = SAMPLE_RATE // 10
    periods = max(0, first_sample - margin) // period_out
    skip = first_sample - periods * period_out
    first = periods * period_in
    wanted = None if keep is None else math.ceil((skip + keep + margin) * rate / SAMPLE_RATE)
    return first, wanted, skip, keep


def _resample_blocks(blocks: Iterator[np.ndarray], rate: int, name: str, longest: float) -> tuple[np.ndarray, int]:
    """All blocks at 16 kHz as one array (N,) float32, and how many source frames there were."""
    stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32") if rate != SAMPLE_RATE else None
    pieces: list[np.ndarray] = []
    frames = 0
    for block in blocks:
        frames += len(block)
        _check_longest(name, frames / rate - 1.0, longest)  # 1 s: the margin around a cut
        pieces.append(stream.resample_chunk(block) if stream else block)
    if stream:
        pieces.append(stream.resample_chunk(np.zeros(0, dtype=np.float32), last=True))
    return (np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.float32)), frames
