"""Audio of a request → 16 kHz samples, or a refusal with the reason.

In:  base64 of a file, a data-URI, an uploaded file's bytes, or an https:// URL if allowed. Never a path.
Out: (N,) float32 samples of each; together at most `--max-audio-seconds`.
Try: `await AudioInput(settings).clips([data], request, end)`
Flow: app.py, transcription.py → **audio_input.py** (remote_audio.py fetches URLs) → exchange.py

Files are decoded in separate threads, at the lowest priority, never in the thread of the model. Decoding stops at the
limits on seconds and on samples over all channels, at the deadline, and when the client has left.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from fastapi import Request

from blsp.data.audio import SAMPLE_RATE, AudioError, load_audio
from blsp.serving.api import AudioPart, AudioUrlPart
from blsp.serving.errors import ApiError, late
from blsp.serving.exchange import while_connected
from blsp.serving.remote_audio import fetch

if TYPE_CHECKING:
    from blsp.settings import ServeSettings

STANDARD_ALPHABET = bytes.maketrans(b"-_", b"+/")  # from base64's url-safe alphabet
SAMPLES_PER_SECOND = 2 * 48_000  # of the longest recording: the samples that are decoded, over all channels
SHORTEST = 0.1  # seconds of a clip that are decoded even if earlier clips have used all seconds
TOO_LONG = " s of audio"  # in the messages of data/audio.py about a clip that is too long

Source = bytes | AudioPart | AudioUrlPart
T = TypeVar("T")


class AudioInput:
    """The threads that decode what clients send. At most `--queue` requests wait for them."""

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        count = max(1, (os.cpu_count() or 1) // 2)
        self._threads = ThreadPoolExecutor(count, "decoder", initializer=_take_lowest_priority)
        self._pending = 0

    async def clips(self, sources: Sequence[Source], request: Request, end: float) -> list[np.ndarray]:
        """The samples (N,) of each source, together at most --max-audio-seconds.

        end: the monotonic time at which the request's deadline passes. Raises ApiError: 400, 413, 429, 504, or
        499 when the client has left.
        """
        if not sources:
            return []
        if self._pending >= self.settings.queue:
            raise ApiError(429, "too many recordings wait to be decoded", code="queue_full", retry_after=2)
        gone = threading.Event()
        self._pending += 1
        try:
            files = await self._fetched(sources, request, end)
            decoding = asyncio.get_running_loop().run_in_executor(self._threads, self._decode, files, gone, end)
            return await while_connected(request, until(end, decoding))
        finally:
            gone.set()
            self._pending -= 1

    async def _fetched(self, sources: Sequence[Source], request: Request, end: float) -> list[Source]:
        """The sources, with bytes instead of remote URLs; together at most the bytes of one upload."""
        left = int(self.settings.max_upload_mb * 1e6)
        files: list[Source] = []
        for source in sources:
            if isinstance(source, AudioUrlPart) and not _is_data_uri(source.audio_url.url):
                if not self.settings.allow_remote_audio:
                    raise ApiError(
                        400,
                        "audio_url: this server fetches nothing; send a data-URI (or start it with "
                        "--allow-remote-audio)",
                        param="audio_url",
                        code="remote_audio_disabled",
                    )
                source = await while_connected(request, fetch(source.audio_url.url, most_bytes=left, end=end))
                left -= len(source)
            files.append(source)
        return files

    def _decode(self, sources: Sequence[Source], gone: threading.Event, end: float) -> list[np.ndarray]:
        """Decode in one of the threads."""
        longest = self.settings.max_audio_seconds
        check = _limit(longest * SAMPLES_PER_SECOND, gone, end)
        clips: list[np.ndarray] = []
        for source in sources:
            check(0)
            try:
                clip = decode(bytes_of(source), max(longest, SHORTEST), check)
            except ApiError as error:
                raise self._with_seconds_before(error, longest) from error
            longest -= len(clip) / SAMPLE_RATE
            clips.append(clip)
        return clips

    def _with_seconds_before(self, error: ApiError, left: float) -> ApiError:
        """A refusal of a clip that is too long, with the seconds of the clips before it."""
        most = self.settings.max_audio_seconds
        if left < most and TOO_LONG in error.message:
            error.message += f" (the clips before it took {most - left:.1f} s of the {most:g} s of a request)"
        return error

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


async def until(end: float, work: Awaitable[T]) -> T:
    """The result of `work`, or the refusal of a late request. end: the deadline, as monotonic time."""
    try:
        return await asyncio.wait_for(work, end - time.monotonic())
    except TimeoutError as error:
        raise late() from error


def _take_lowest_priority() -> None:
    """Set the priority of this thread only (on Linux each thread has a niceness); other systems may refuse."""
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def _limit(most: float, gone: threading.Event, end: float) -> Callable[[int], None]:
    """A check that stops decoding: more than `most` samples, a client that has left, a passed deadline."""
    decoded = 0

    def check(samples: int) -> None:
        nonlocal decoded
        decoded += samples
        if decoded > most:
            text = f"more than {most:,.0f} samples over all channels; send it with fewer channels or a lower rate"
            raise AudioError(text)
        if gone.is_set() or time.monotonic() > end:
            raise late()

    return check


def decode(data: bytes, longest: float, check: Callable[[int], object] = int) -> np.ndarray:
    """The samples (N,) of a file; decoding stops at `longest` seconds, as the length in the header may be wrong."""
    try:
        return load_audio(data, longest=longest, check=check)
    except AudioError as error:
        raise ApiError(400, str(error), param="audio", code="invalid_audio") from error


def bytes_of(source: Source) -> bytes:
    """The file of an upload or of a part that holds it."""
    if isinstance(source, AudioPart):
        return from_base64(source.input_audio.data)
    if isinstance(source, AudioUrlPart):
        return from_data_uri(source.audio_url.url)
    return source


def from_base64(text: str) -> bytes:
    """The bytes of `input_audio.data`: base64 with or without line breaks and padding, in either alphabet; a
    data-URI is accepted too."""
    if _is_data_uri(text):
        text = text.partition(",")[2]
    try:
        digits = text.encode("ascii").translate(STANDARD_ALPHABET, b" \t\r\n\f\v").rstrip(b"=")
        return base64.b64decode(digits + b"=" * (-len(digits) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        message = f"input_audio.data: is not base64 ({error})"
        raise ApiError(400, message, param="audio", code="invalid_base64") from error


def from_data_uri(url: str) -> bytes:
    """The bytes of `audio_url.url` that is a data-URI."""
    head, _, data = url.partition(",")
    if not head.rstrip().lower().endswith(";base64"):
        raise ApiError(400, "audio_url: a data-URI must be base64", param="audio_url", code="invalid_url")
    return from_base64(data)


def _is_data_uri(text: str) -> bool:
    return text[:5].lower() == "data:"
