"""The cascade's recogniser behind the page's compare switch: loaded when it is first asked.

In:  a clip. Out: its transcript by faster-whisper (or transformers), one clip at a time, in a thread of its own.
Try: `await SharedRecogniser(None, listener).transcribe(clip, "en", seconds=60)`
Flow: serving/ — app.py -> **recogniser** -> evaluation/recogniser.py. Never on the way from speech to an answer.
"""

from __future__ import annotations

import asyncio
import importlib.util
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from blsp.evaluation.recogniser import Recogniser, recogniser_of
from blsp.inference.listener import Listener
from blsp.serving.api import ApiError

MOST_WAITING = 8  # clips; the next is told to come back later


class SharedRecogniser:
    """name: what `blsp serve --asr` says; None: the model's own Whisper."""

    def __init__(self, name: str | None, listener: Listener) -> None:
        self._name = name or recogniser_of(listener.model.config.audio_model_id)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="recogniser")
        self._asked = 0
        self._loaded: Recogniser | None = None

    @property
    def available(self) -> bool:
        return importlib.util.find_spec("faster_whisper") is not None

    async def transcribe(self, clip: np.ndarray, language: str, seconds: float) -> str:
        """Raises ApiError: 503 without a recogniser, 429 when too many wait, 504 after `seconds`."""
        if not self.available:
            raise ApiError(
                503,
                "model: this server has no recogniser (pip install 'blsp[cascade]', --asr NAME)",
                param="model",
            )
        if self._asked > MOST_WAITING:
            raise ApiError(
                429, "too many recordings wait for the recogniser", code="queue_full", retry_after=2
            )
        work = asyncio.get_running_loop().run_in_executor(self._thread, self._hear, clip, language)
        self._asked += 1
        try:
            return await asyncio.wait_for(work, seconds)
        except TimeoutError as error:
            raise ApiError(504, "the request's deadline passed", code="deadline_exceeded") from error
        finally:
            self._asked -= 1

    def _hear(self, clip: np.ndarray, language: str) -> str:
        try:
            self._loaded = self._loaded or Recogniser(self._name)
        except Exception as error:  # whatever a library says of weights that it cannot use
            raise ApiError(503, f"model: the recogniser cannot be loaded: {error}", param="model") from error
        try:
            return self._loaded.transcribe_clip(clip, language)
        except ValueError as error:  # a language that it does not know
            raise ApiError(400, f"language {language!r}: {error}", param="language") from error

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
