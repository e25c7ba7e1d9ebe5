"""Audio from a path, bytes, a data-URI or an array as 16 kHz mono float32.

In:  wav, flac, ogg/vorbis, opus, mp3, m4a, webm, aac, amr or wma at any rate (also aiff, au, caf, w64, rf64, NIST
     sphere), as a file, a piece of a file or behind a URL (addresses.py); or an array.
Out: samples (N,) float32, or an `AudioError` that names the source if it is not usable speech audio.
Try: `load_audio("clip.opus", start=1.5, duration=2.0)`, `probe_audio("clip.opus").seconds`
Flow: data/ — every step that needs samples calls this file.

Files are decoded in blocks, from `start` on: only the piece takes time, not the whole recording. A piece is exact: it
equals the same slice of the whole clip. libsndfile or FFmpeg decodes the file (containers.py). Three faults of
libsndfile are corrected here: it decodes truncated files without an error, trusts wrong lengths in headers, and seeks
in mp3, vorbis and opus without decoding the frames that the next ones depend on.

Shapes: N samples at 16 kHz, n samples of a block at the file's rate, C channels.
"""

from __future__ import annotations

import base64
import io
import math
import os
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile
import soxr

from blsp.data.addresses import AudioError, is_address, is_url, read_address, remote_file
from blsp.data.containers import (
    READABLE,
    UNKNOWN_LENGTH,
    AudioStream,
    FfmpegStream,
    SndfileStream,
    ffmpeg_container,
    missing_bytes,
    without_id3,
)
from blsp.data.files import write_atomically

SAMPLE_RATE = 16_000  # samples per second, everywhere after this file
LONGEST_SECONDS = 24 * 3600.0  # a longer clip must be cut with start and duration
FARTHEST_SECONDS = 1e9  # no recording is that long
END_SLACK = 0.1  # seconds by which a segment may pass the file's end: published times are rounded
MARGIN = SAMPLE_RATE // 10  # 16 kHz samples decoded around a piece for the resampler's filter
LOWEST_RATE, HIGHEST_RATE = 1_000, 768_000  # samples per second that a recording may have
BLOCK = 1 << 20  # samples decoded at a time, over all channels
MOST_FRAMES_PER_BYTE = 8192  # FLAC's densest frame: 65,535 samples in about 10 bytes
RUN_UP = 1.0  # seconds decoded before a position in mp3, vorbis and opus
LAST_OGG_PAGE = 40.0  # seconds that an ogg file's last page may hold; padding makes a seek into it inexact
MIX_SHARE = 0.05  # channels cancel out if their mix has less than this share of the loudest channel's energy
MIX_SECONDS = 10.0  # from the file's start, used to decide how the channels are mixed

FileSource = str | os.PathLike[str] | bytes | bytearray | memoryview
AudioSource = FileSource | np.ndarray
ReadBlocks = Callable[[AudioStream, str, float], Iterator[np.ndarray]]


@dataclass(frozen=True)
class AudioInfo:
    """What a file's header says."""

    seconds: float
    sampling_rate: int
    channels: int
    format: str  # the container: WAV, FLAC, OGG, MP3, MOV (m4a, mp4), MATROSKA (webm), ...


def load_audio(
    source: AudioSource,
    *,
    start: float = 0.0,
    duration: float | None = None,
    sampling_rate: int | None = None,
    longest: float = LONGEST_SECONDS,
    name: str = "",
    check: Callable[[int], object] = int,
) -> np.ndarray:
    """Samples of `source` from `start` on, `duration` seconds or to its end: (N,) float32, mono, 16 kHz.

    `source`: a path or an address (addresses.py), the bytes of a file, a `data:audio/...;base64,` URI, or an array,
    which needs its `sampling_rate`; an array's shorter axis is its channels, integers are scaled by their type.
    Digital silence is not an error (see `is_silent`). Audio longer than `longest` seconds is an error; it is not
    decoded. `name`: the source's name in messages. `check`: called with the number of samples of each block, over all
    channels; it may raise an error.
    """
    name = _describe(name or source)
    if not 0 <= start <= FARTHEST_SECONDS:
        raise AudioError(f"{name}: start is {start!r:.40} seconds; it must be 0 or more")
    if duration is not None and not 0 < duration <= FARTHEST_SECONDS:
        raise AudioError(f"{name}: duration is {duration!r:.40} seconds; it must be more than 0")
    if isinstance(source, np.ndarray):
        audio = _cut_array(source, name, start, duration, sampling_rate, longest)
    else:
        with _open_file(source := _fetched(source), name) as stream:
            channel = _channel_of(source, name) if stream.channels > 1 else None
            read = partial(_read_blocks, channel=channel, check=check)
            audio = _cut_stream(stream, name, start, duration, longest, read)
    if not len(audio):
        raise AudioError(f"{name}: no sample lies between {start} s and {start + (duration or 0.0)} s")
    if not np.isfinite(audio).all():
        raise AudioError(f"{name}: holds NaN or infinite samples; make the file again or drop the row")
    return audio


def probe_audio(source: str | os.PathLike[str] | bytes) -> AudioInfo:
    """Read the header; the stream is decoded only if the header does not give its length."""
    name = _describe(source)
    with _open_file(_fetched(source), name) as stream:
        frames = stream.frames
        if frames >= UNKNOWN_LENGTH:
            frames = sum(len(block) for block in _read_blocks(stream, name))
        if not frames:
            raise AudioError(f"{name}: the recording is empty (no samples)")
        return AudioInfo(frames / stream.samplerate, stream.samplerate, stream.channels, stream.format)


def is_silent(audio: np.ndarray, threshold_db: float = -60.0) -> bool:
    """Whether all 20 ms stretches of `audio` (N,) are below `threshold_db` (RMS, dB relative to full scale).

    A constant offset does not count as sound.
    """
    if not len(audio):
        return True
    stretch = min(SAMPLE_RATE // 50, len(audio))
    squares = np.square(audio - audio.mean(dtype=np.float64), dtype=np.float64)
    energies = np.add.reduceat(squares, np.arange(0, len(audio), stretch))  # one sum for each stretch
    return bool(energies.max() / stretch < 10.0 ** (threshold_db / 10))


def write_wav(path: str | os.PathLike[str], audio: np.ndarray, rate: int = SAMPLE_RATE) -> None:
    """Write `audio` (N,), floats clipped to [-1, 1], as 16-bit PCM, atomically."""
    samples = np.clip(np.round(np.asarray(audio, dtype=np.float64) * 32768), -32768, 32767).astype(np.int16)
    with write_atomically(path) as partial:
        soundfile.write(partial, samples, rate, subtype="PCM_16", format="WAV")


@dataclass(frozen=True)
class _Cut:
    """Which frames to decode at the source's rate, and which of the resulting 16 kHz samples to keep."""

    first: int
    frames: float  # infinite: to the end
    skip: int = 0
    keep_to: int | None = None


def _plan_cut(rate: int, start: float, duration: float | None) -> _Cut:
    """The frames of the piece and of a margin around it, so that the resampler gives the same samples as in the clip.

    The first frame must coincide with a 16 kHz sample: at 44.1 kHz, 441 frames are 160 samples, so it is a multiple of
    441.
    """
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


def _cut_stream(
    stream: AudioStream, name: str, start: float, duration: float | None, longest: float, read: ReadBlocks
) -> np.ndarray:
    """Decode the piece with a margin, resample it, and trim the margin off at 16 kHz."""
    rate, total = stream.samplerate, stream.frames
    if total < UNKNOWN_LENGTH:
        _check_inside(name, total / rate, start, duration, longest)
    cut = _plan_cut(rate, start, duration)
    _go_to(stream, cut.first, name)
    audio, frames = _resample(read(stream, name, cut.frames), rate, name, longest)
    end = cut.first + frames
    if total >= UNKNOWN_LENGTH:
        _check_inside(name, end / rate, start, duration, longest)
    elif end < min(total, cut.first + cut.frames):
        promised = f"its header promises {total / rate:.3f} s"
        raise AudioError(f"{name}: truncated, {promised} but it ends at {end / rate:.3f} s; make it again")
    return np.ascontiguousarray(audio[cut.skip : cut.keep_to])


def _cut_array(
    array: np.ndarray, name: str, start: float, duration: float | None, rate: int | None, longest: float
) -> np.ndarray:
    if rate is None:
        raise AudioError(f"{name}: an array needs its sampling_rate, in samples per second")
    _check_rate(rate, name)
    scaled = _scale_array(array, name)  # (n, C)
    mono = _mix_channels(scaled, _loudest_alone(scaled[: round(MIX_SECONDS * rate)]))  # (n,)
    _check_inside(name, len(mono) / rate, start, duration, longest)
    cut = _plan_cut(rate, start, duration)
    piece = mono[cut.first : int(min(len(mono), cut.first + cut.frames))]
    audio, _ = _resample([piece], rate, name, longest)
    return np.array(audio[cut.skip : cut.keep_to], dtype=np.float32)  # never a view of the caller's array


def _scale_array(array: np.ndarray, name: str) -> np.ndarray:
    """Any numeric array of one or two axes -> (n, C) float32 in [-1, 1]."""
    if array.ndim not in (1, 2) or array.dtype.kind not in "fiu":
        raise AudioError(f"{name}: an audio array has one or two axes of integer or float samples")
    frames = array[:, None] if array.ndim == 1 else array if array.shape[0] >= array.shape[1] else array.T
    if not frames.size:
        raise AudioError(f"{name}: the recording is empty (no samples)")
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):  # an overflow becomes inf, which load_audio refuses
            return frames.astype(np.float32)
    half = float(2 ** (8 * array.dtype.itemsize - 1))
    centre = half if array.dtype.kind == "u" else 0.0
    return ((frames.astype(np.float64) - centre) / half).astype(np.float32)


def _mix_channels(block: np.ndarray, channel: int | None = None) -> np.ndarray:
    """(n, C) -> (n,): the mean of the channels, or only `channel`."""
    if channel is not None or block.shape[1] == 1:
        return block[:, channel or 0]
    return block.mean(axis=1, dtype=np.float32)


def _loudest_alone(block: np.ndarray) -> int | None:
    """The loudest channel of (n, C) if the channels cancel out (opposite phase); None if they can be mixed."""
    if block.shape[1] == 1:
        return None
    with np.errstate(over="ignore", invalid="ignore"):  # infinite samples are refused later, by name
        energies = np.square(block, dtype=np.float64).sum(axis=0)  # (C,)
        mixed = np.square(block.mean(axis=1, dtype=np.float64)).sum()
    return int(energies.argmax()) if mixed < MIX_SHARE * energies.max() else None


def _channel_of(source: FileSource, name: str) -> int | None:
    """The channel to use alone, or None. The file's first seconds decide, so that all its pieces agree."""
    with _open_file(source, name) as stream, _naming(f"{name}: damaged or truncated (REASON); make the file again"):
        frames = min(BLOCK // stream.channels, round(MIX_SECONDS * stream.samplerate))
        return _loudest_alone(stream.read(frames, dtype="float32", always_2d=True))  # of (n, C)


def _resample(blocks: Iterable[np.ndarray], rate: int, name: str, longest: float) -> tuple[np.ndarray, int]:
    """All blocks at 16 kHz as one array (N,) float32, and how many source frames there were."""
    stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32") if rate != SAMPLE_RATE else None
    pieces = [np.zeros(0, dtype=np.float32)]
    frames = 0
    for block in blocks:
        frames += len(block)
        if frames / rate > longest + 2.0:  # 2 s: more than the margins of a piece and a header's rounding
            raise AudioError(f"{name}: more than {longest:.0f} s of audio; cut it with start and duration")
        pieces.append(stream.resample_chunk(block) if stream else block)
    if stream:
        pieces.append(stream.resample_chunk(np.zeros(0, dtype=np.float32), last=True))
    return np.concatenate(pieces), frames


def _check_inside(name: str, seconds: float, start: float, duration: float | None, longest: float) -> None:
    """Raise AudioError for a piece that is not inside a recording of `seconds`, or is too long."""
    if start >= seconds:
        raise AudioError(f"{name}: start {start} s lies past its end at {seconds:.3f} s")
    if duration is not None and start + duration > seconds + END_SLACK:
        raise AudioError(f"{name}: the cut ends at {start + duration:.3f} s, the recording at {seconds:.3f} s")
    length = seconds - start if duration is None else duration
    if length > longest:
        raise AudioError(f"{name}: {length:.0f} s of audio; at most {longest:.0f} s are allowed, so cut it")


def _describe(source: AudioSource) -> str:
    """The source's name in messages."""
    if isinstance(source, np.ndarray):
        return f"audio array {source.shape} {source.dtype}"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"audio of {len(source)} bytes"
    if not isinstance(source, (str, os.PathLike)):
        raise AudioError(f"audio is a path, bytes, a data URI or an array, not {type(source).__name__}")
    if (text := os.fspath(source)).startswith("data:"):
        return f"{text[:32]}… (data URI)"
    return f"…{text[-200:]}" if len(text) > 300 else text or "audio path ''"


def _fetched(source: FileSource) -> FileSource:
    """The bytes at an address, unless it is the URL of a long file; any other source unchanged."""
    return read_address(source) if isinstance(source, str) and is_address(source) else source


@contextmanager
def _open_file(source: FileSource, name: str) -> Iterator[AudioStream]:
    """The decoder of a path, a URL, a file's bytes or a data-URI, after its header was compared with its size."""
    if isinstance(source, str) and source.startswith("data:"):
        source = _decode_data_uri(source, name)
    remote = isinstance(source, str) and is_url(source)
    with remote_file(str(source)) if remote else nullcontext(source) as file, _open_stream(file, name) as stream:
        yield stream


def _open_stream(source: FileSource | BinaryIO, name: str) -> AudioStream:
    remedy = "wav, flac, ogg, opus, mp3, m4a, webm, aac, amr and wma are read, others must be converted first"
    with _naming(f"{name}: cannot be read as audio (REASON); {remedy}"):
        if isinstance(source, (bytes, bytearray, memoryview)):
            source = io.BytesIO(source)
        if isinstance(source, (str, os.PathLike)):
            size = _file_size(Path(source), name)
            with open(source, "rb") as opened:
                stream = _open_decoder(opened, os.fspath(source), size, name)
        else:
            size = source.seek(0, io.SEEK_END)
            stream = _open_decoder(source, source, size, name)
        _check_header(stream, size, name)
    return stream


def _open_decoder(file: BinaryIO, source: str | BinaryIO, size: int, name: str) -> AudioStream:
    wav, size = without_id3(file, size)
    file, source = (wav, wav) if wav else (file, source)
    container = ffmpeg_container(file, size)
    missing = missing_bytes(file, size)
    if missing:
        raise AudioError(f"{name}: truncated, {missing} bytes are missing at its end; fetch or make it again")
    file.seek(0)
    return FfmpegStream(source, container) if container else SndfileStream(source)


def _read_blocks(
    stream: AudioStream, name: str, frames: float = math.inf, channel: int | None = None, check: Any = int
) -> Iterator[np.ndarray]:
    """At most the next `frames` frames, as mono float32 blocks (n,); stops at the end of the file."""
    step = max(1, BLOCK // stream.channels)
    while frames > 0:
        with _naming(f"{name}: damaged or truncated (REASON); make the file again"):
            block = stream.read(int(min(step, frames)), dtype="float32", always_2d=True)  # (n, C)
        if not len(block):
            return
        frames -= len(block)
        check(block.size)
        yield _mix_channels(block, channel)


def _go_to(stream: AudioStream, frame: int, name: str) -> None:
    """Make `frame` the next one to be read: seek to a frame before it, and decode from there."""
    run_up = frame if isinstance(stream, FfmpegStream) else 0  # FFmpeg reads forward from the start
    if isinstance(stream, SndfileStream) and stream.format in ("MP3", "MPEG", "OGG"):
        run_up = round(RUN_UP * stream.samplerate)
        if stream.format == "OGG":
            run_up = max(run_up, frame - stream.frames + round(LAST_OGG_PAGE * stream.samplerate))
    run_up = min(frame, run_up)
    if isinstance(stream, SndfileStream) and frame > run_up:
        with _naming(f"{name}: truncated? cannot go to {frame / stream.samplerate:.3f} s (REASON)"):
            stream.seek(frame - run_up)
    for _ in _read_blocks(stream, name, run_up):
        pass


@contextmanager
def _naming(message: str) -> Iterator[None]:
    """Turn a library's error into an AudioError with `message`, in which REASON is replaced by the error's text."""
    try:
        yield
    except AudioError:
        raise
    except (soundfile.SoundFileError, RuntimeError, TypeError, ValueError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else getattr(error, "error_string", error)
        raise AudioError(message.replace("REASON", str(reason).strip().rstrip("."))) from error


def _decode_data_uri(uri: str, name: str) -> bytes:
    head, comma, payload = uri.partition(",")
    if not comma:
        raise AudioError(f"{name}: the comma is missing; a data URI reads data:audio/wav;base64,<data>")
    if not head.endswith(";base64"):
        return urllib.parse.unquote_to_bytes(payload)
    with _naming(f"{name}: what follows the comma is not base64 (REASON)"):
        return base64.b64decode("".join(payload.split()), validate=True)


def _file_size(path: Path, name: str) -> int:
    if not path.is_file():
        raise AudioError(f"{name}: {'is a folder or device, not a file' if path.exists() else 'no such file'}")
    if not (size := path.stat().st_size):
        raise AudioError(f"{name}: the file is empty (0 bytes)")
    return size


def _check_rate(rate: int, name: str) -> None:
    if not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise AudioError(f"{name}: sampling rate {rate} Hz; {LOWEST_RATE} to {HIGHEST_RATE} Hz are read")


def _check_header(stream: AudioStream, size: int, name: str) -> None:
    if stream.format not in READABLE:
        raise AudioError(f"{name}: {stream.format} files are not read; convert it to wav or flac")
    _check_rate(stream.samplerate, name)
    if stream.frames <= 0:
        raise AudioError(f"{name}: the recording is empty (no samples)")
    if UNKNOWN_LENGTH > stream.frames > size * MOST_FRAMES_PER_BYTE:
        raise AudioError(f"{name}: damaged, its header promises {stream.frames} samples in {size} bytes")
