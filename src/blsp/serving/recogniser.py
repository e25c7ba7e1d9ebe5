"""The cascade's recogniser behind the page's compare switch: loaded when it is first asked.

In:  a clip. Out: its transcript by faster-whisper (or transformers), one clip at a time.
Try: `SharedRecogniser(None, listener).transcribe(clip, "en")`
Flow: serving/ — app.py -> **recogniser** -> evaluation/recognise.py. Never on the way from speech to an answer.
"""

from __future__ import annotations

import importlib.util
import threading

import numpy as np

from blsp.evaluation.recognise import Recogniser, recogniser_of
from blsp.inference.listener import Listener
from blsp.serving.schema import ApiError


class SharedRecogniser:
    """name: what `blsp serve --asr` says; None: the model's own Whisper."""

    def __init__(self, name: str | None, listener: Listener) -> None:
        self._name = name or recogniser_of(listener.model.config.audio_model_id)
        self._lock = threading.Lock()
        self._loaded: Recogniser | None = None

    @property
    def available(self) -> bool:
        return importlib.util.find_spec("faster_whisper") is not None

    def transcribe(self, clip: np.ndarray, language: str) -> str:
        if not self.available:
            raise ApiError(
                503,
                "model: this server has no recogniser (pip install 'blsp[cascade]', --asr NAME)",
                param="model",
            )
        with self._lock:
            try:
                self._loaded = self._loaded or Recogniser(self._name)
            except Exception as error:  # whatever a library says of weights that it cannot use
                raise ApiError(
                    503,
                    f"model: the recogniser cannot be loaded: {error}",
                    param="model",
                ) from error
            return self._loaded.hear(clip, language)
