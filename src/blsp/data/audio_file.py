"""A sound file, opened and distrusted: its header is held against its size before anything is decoded.

    >>> with open_audio("clip.mp3", "clip.mp3") as stream:
    ...     go_to(stream, 16000, "clip.mp3")
    ...     first = next(read_blocks(stream, "clip.mp3", 8000))      # (8000,) float32, mono

libsndfile decodes (wav, flac, ogg/vorbis, opus, mp3; also aiff, au, caf, w64, rf64, NIST sphere) but plays
truncated wav and ogg files in silence about it, believes any length a header claims, and seeks in mp3
without the frames that the next one leans on. Each of these is settled here, so that `audio.py` above can
be plain.

Letters: n frames of a block, C channels.
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
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile

LOWEST_RATE, HIGHEST_RATE = 1_000, 768_000  # samples per second that a recording may have
BLOCK = 1 << 20  # samples decoded at a time, over all channels
MOST_FRAMES_PER_BYTE = 8192  # FLAC's densest frame: 65,535 samples in some 10 bytes
UNKNOWN_LENGTH = 1 << 62  # libsndfile reports about 2**63 frames when a stream does not say
STREAMED_WAV = 0x7FFF0000  # data lengths from here on are what programs write into a pipe
OGG_PAGE = 27 + 255 + 255 * 255  # bytes of the largest page (RFC 3533)
RUN_UP = 1.0  # seconds decoded before a place in mp3, vorbis and opus, whose frames lean on those before
LAST_OGG_PAGE = 40.0  # seconds that an ogg file's last page may hold; seeking into it is off by its padding
CONTAINERS = frozenset(
    ["WAV", "WAVEX", "RF64", "W64", "FLAC", "OGG", "MP3", "MPEG", "AIFF", "AU", "CAF", "NIST"]
)

AudioSource = str | os.PathLike[str] | bytes | bytearray | memoryview | np.ndarray


class AudioError(ValueError):
    """The source is not usable speech audio; the message names the source, the reason and the way out."""


class SoundStream(soundfile.SoundFile):
    """A file read forward: soundfile seeks after each read of a "seekable" one, which mp3 and pipes' FLAC
    mind."""

    def seekable(self) -> bool:
        return False


def describe_source(source: AudioSource) -> str:
    """How a message names the source."""
    if isinstance(source, np.ndarray):
        return f"audio array {source.shape} {source.dtype}"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"audio of {len(source)} bytes"
    if not isinstance(source, (str, os.PathLike)):
        raise AudioError(f"audio is a path, bytes, a data URI or an array, not {type(source).__name__}")
    text = os.fspath(source)
    if text.startswith("data:"):
        return f"{text[:32]}… (data URI)"
    return f"…{text[-200:]}" if len(text) > 300 else text or "audio path ''"


def open_audio(source: str | os.PathLike[str] | bytes | bytearray | memoryview, name: str) -> SoundStream:
    """The decoder of a path, a file's bytes or a data-URI; `name` begins every message."""
    if isinstance(source, str) and source.startswith("data:"):
        source = _decode_data_uri(source, name)
    try:
        if isinstance(source, (bytes, bytearray, memoryview)):
            size = len(source)
            _check_complete(io.BytesIO(source), size, name)
            stream = SoundStream(io.BytesIO(source))
        else:
            size = _file_size(Path(source), name)
            with open(source, "rb") as raw:
                _check_complete(raw, size, name)
            stream = SoundStream(os.fspath(source))
    except AudioError:
        raise
    except (soundfile.SoundFileError, TypeError, ValueError, OSError) as error:
        raise AudioError(
            f"{name}: cannot be read as audio ({reason_of(error)}); "
            "wav, flac, ogg, opus and mp3 are read, other formats must be converted first"
        ) from error
    try:
        _check_header(stream, size, name)
    except AudioError:
        stream.close()
        raise
    return stream


def read_blocks(stream: SoundStream, name: str, frames: float = math.inf) -> Iterator[np.ndarray]:
    """At most `frames` further frames as mono float32 blocks (n,); stops early where the file does."""
    step = max(1, BLOCK // stream.channels)
    while frames > 0:
        try:
            block = stream.read(int(min(step, frames)), dtype="float32", always_2d=True)  # (n, C)
        except (soundfile.SoundFileError, RuntimeError, ValueError) as error:
            raise AudioError(
                f"{name}: damaged or truncated ({reason_of(error)}); make the file again"
            ) from error
        if not len(block):
            return
        frames -= len(block)
        yield mix_channels(block)


def go_to(stream: SoundStream, frame: int, name: str) -> None:
    """Make `frame` the next one to be read."""
    run_up = _run_up(stream, frame)
    if frame > run_up:
        try:
            stream.seek(frame - run_up)
        except (soundfile.SoundFileError, RuntimeError, ValueError) as error:
            seconds = frame / stream.samplerate
            raise AudioError(
                f"{name}: truncated? cannot go to {seconds:.3f} s ({reason_of(error)})"
            ) from error
    for _ in read_blocks(stream, name, run_up):
        pass


def _run_up(stream: SoundStream, frame: int) -> int:
    """How many frames before `frame` to seek to, and decode from there, so that `frame` comes out exact."""
    if stream.format not in ("MP3", "MPEG", "OGG"):
        return 0
    run_up = round(RUN_UP * stream.samplerate)
    if stream.format == "OGG":
        run_up = max(run_up, frame - stream.frames + round(LAST_OGG_PAGE * stream.samplerate))
    return min(frame, run_up)


def mix_channels(block: np.ndarray) -> np.ndarray:
    """(n, C) -> (n,), the mean of the channels."""
    return block[:, 0] if block.shape[1] == 1 else block.mean(axis=1, dtype=np.float32)


def check_rate(rate: int, name: str) -> None:
    if not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise AudioError(
            f"{name}: its sampling rate is {rate} Hz; {LOWEST_RATE} to {HIGHEST_RATE} Hz are read"
        )


def reason_of(error: Exception) -> str:
    """What a library's exception says, without its own prefix."""
    text = error.strerror if isinstance(error, OSError) else getattr(error, "error_string", error)
    return str(text).strip().rstrip(".")


def _decode_data_uri(uri: str, name: str) -> bytes:
    head, comma, payload = uri.partition(",")
    if not comma:
        raise AudioError(f"{name}: the comma is missing; a data URI reads data:audio/wav;base64,<data>")
    if not head.endswith(";base64"):
        return urllib.parse.unquote_to_bytes(payload)
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise AudioError(f"{name}: what follows the comma is not base64 ({error})") from error


def _file_size(path: Path, name: str) -> int:
    if not path.exists():
        raise AudioError(f"{name}: no such file")
    if not path.is_file():
        raise AudioError(f"{name}: is a folder or device, not a file")
    size = path.stat().st_size
    if not size:
        raise AudioError(f"{name}: the file is empty (0 bytes)")
    return size


def _check_header(stream: SoundStream, size: int, name: str) -> None:
    if stream.format not in CONTAINERS:
        raise AudioError(f"{name}: {stream.format} files are not read; convert it to wav or flac")
    check_rate(stream.samplerate, name)
    if stream.channels < 1:
        raise AudioError(f"{name}: its header names {stream.channels} channels")
    if stream.frames <= 0:
        raise AudioError(f"{name}: the recording is empty (no samples)")
    if UNKNOWN_LENGTH > stream.frames > size * MOST_FRAMES_PER_BYTE:
        raise AudioError(f"{name}: damaged, its header promises {stream.frames} samples in {size} bytes")


def _check_complete(raw: BinaryIO, size: int, name: str) -> None:
    """Refuse a file that ends before its own container says so."""
    head = raw.read(12)
    missing = 0
    if head[:4] == b"RIFF" and head[8:] == b"WAVE":
        missing = _missing_wav_bytes(raw, size)
    elif head[:4] == b"FORM" and len(head) == 12:
        missing = struct.unpack(">I", head[4:8])[0] + 8 - size
    elif head[:4] == b"OggS":
        missing = _missing_ogg_bytes(raw, size)
    if missing > 0:
        raise AudioError(f"{name}: truncated, {missing} bytes are missing at its end; fetch or make it again")


def _missing_wav_bytes(raw: BinaryIO, size: int) -> int:
    """Bytes by which the data chunk passes the file's end."""
    place = 12
    while place + 8 <= size:
        raw.seek(place)
        tag, length = struct.unpack("<4sI", raw.read(8))
        if tag == b"data":
            return 0 if length >= STREAMED_WAV else place + 8 + length - size
        place += 8 + length + length % 2
    return place - size


def _missing_ogg_bytes(raw: BinaryIO, size: int) -> int:
    """Bytes by which the last page passes the file's end (RFC 3533: 27 bytes, segment table, segments)."""
    raw.seek(max(0, size - OGG_PAGE))
    tail = raw.read()
    page = tail.rfind(b"OggS")
    if page < 0:
        return 0  # something else follows the last page
    if len(tail) < page + 27:
        return page + 27 - len(tail)
    table_end = page + 27 + tail[page + 26]
    if len(tail) < table_end:
        return table_end - len(tail)
    return table_end + sum(tail[page + 27 : table_end]) - len(tail)
