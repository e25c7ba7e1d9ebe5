"""Recogniser of the page's comparison, loaded at its first request.

In:  a clip. Out: its transcript by faster-whisper (or transformers), one clip at a time, in a separate thread.
Try: `await SharedRecogniser(None, listener).transcribe(clip, "en", seconds=60)`
Flow: app.py → **shared_recogniser.py** → evaluation/recogniser.py. It is not used for answers to speech.
"""

from __future__ import annotations

import asyncio
import importlib.util
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from blsp.evaluation.recogniser import Recogniser, recogniser_of
from blsp.inference.listener import Listener
from blsp.serving.errors import ApiError, late

RECOGNISER = "recogniser"  # its model name in requests
MAX_WAITING = 8  # clips; the next one gets status 429


class SharedRecogniser:
    """One recogniser for all requests. name: as in `blsp serve --asr`; None: the model's own Whisper."""

    def __init__(self, name: str | None, listener: Listener) -> None:
        self._name = name or recogniser_of(listener.model.config.audio_model_id)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="recogniser")
        self._pending = 0
        self._loaded: Recogniser | None = None

    @property
    def available(self) -> bool:
        return importlib.util.find_spec("faster_whisper") is not None

    async def transcribe(self, clip: np.ndarray, language: str | None, seconds: float) -> str:
        """The transcript. language: a code; None: the recogniser finds it, if it knows several.

        Raises ApiError: 503 without a recogniser, 429 when too many wait, 504 after `seconds`."""
        if not self.available:
            raise ApiError(
                503, "model: this server has no recogniser (pip install 'blsp[cascade]', --asr NAME)", param="model"
            )
        if self._pending > MAX_WAITING:
            raise ApiError(429, "too many recordings wait for the recogniser", code="queue_full", retry_after=2)
        work = asyncio.get_running_loop().run_in_executor(self._thread, self._transcribe, clip, language)
        self._pending += 1
        try:
            return await asyncio.wait_for(work, seconds)
        except TimeoutError as error:
            raise late() from error
        finally:
            self._pending -= 1

    def _transcribe(self, clip: np.ndarray, language: str | None) -> str:
        try:
            self._loaded = self._loaded or Recogniser(self._name)
        except Exception as error:  # libraries raise many kinds of errors for weights that they cannot load
            raise ApiError(503, f"model: the recogniser cannot be loaded: {error}", param="model") from error
        if language and not self._loaded.supports_language(language):
            raise ApiError(400, f"language: this recogniser hears English alone, not {language!r}", param="language")
        try:
            wanted = language or (None if self._loaded.multilingual else "en")
            return self._loaded.transcribe_clip(clip, wanted)
        except ValueError as error:  # an unknown language
            raise ApiError(400, f"language {language!r}: {error}", param="language") from error

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
