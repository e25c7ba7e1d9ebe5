"""Settings of `blsp serve`.

In:  the command line, or a YAML file (cli.py). Out: one frozen object for serving/server.py.
Try: `blsp serve --help`
Flow: cli.py → **serving.py** → serving/
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from blsp.settings.applications import Model
from blsp.settings.shared import (
    DEFAULT_MODEL,
    AudioModel,
    ConfigFile,
    Device,
    Dtype,
    Llm,
    LlmWeights,
    Rescore,
    SettingsError,
    above_zero,
)

NAMED_KEY = re.compile(r"([A-Za-z][\w.-]*)=([^=].*)", re.ASCII)


@dataclass(frozen=True)
class ServeSettings:
    """Serve an OpenAI-compatible API that takes speech, and a web page with a microphone.

    Needs blsp[serve]. Requests that arrive together share batches. The server listens on this machine only;
    --host opens it to others, and then it needs a key.

        $ blsp serve                                   # then open http://127.0.0.1:8000
        $ BLSP_API_KEY=… blsp serve --host 0.0.0.0 --port 80
    """

    GROUPS: ClassVar[dict[str, str]] = {
        "model": "model audio_model llm rescore asr prefix_cache",
        "LLM elsewhere": "engine_url engine_model",
        "address and access": "host port api_key insecure cors_origin allow_remote_audio",
        "limit": "max_upload_mb max_audio_seconds max_batch queue deadline max_new_tokens rate_limit",
        "logging": "log_format log_content",
        "compute": "device dtype weights",
    }

    model: Model = DEFAULT_MODEL
    audio_model: AudioModel = None
    llm: Llm = None
    rescore: Rescore = "auto"
    host: str = "127.0.0.1"
    """the address to listen on"""
    port: int = 8000
    """the port; 0 takes a free one and prints it"""
    api_key: tuple[str, ...] = ()
    """the bearer token that clients must send, or several NAME=KEY; $BLSP_API_KEY (separated by spaces) is safer"""
    insecure: bool = False
    """let other machines connect without a key"""
    allow_remote_audio: bool = False
    """fetch audio_url from the public internet (private addresses are always refused)"""
    cors_origin: tuple[str, ...] = ()
    """web origins that may call from a browser; others than the server's own are refused"""
    max_upload_mb: float = 25.0
    """largest request, before decoding"""
    max_audio_seconds: float = 600.0
    """seconds of all recordings of a request together, after decoding"""
    max_batch: int = 16
    """requests answered together"""
    queue: int = 64
    """requests that may wait; further ones get status 429 and a time to try again"""
    deadline: float = 120.0
    """seconds for a whole request, from its first byte to its last"""
    max_new_tokens: int = 512
    """the most tokens of an answer that a request may ask for"""
    rate_limit: int = 0
    """requests per minute from one address; 0: no limit"""
    prefix_cache: int = 32
    """conversations whose key/values are kept"""
    asr: str | None = None
    """the recogniser for the page's comparison: a model that faster-whisper loads (without: the adapter's own
    Whisper)"""
    log_format: Literal["text", "json"] = "text"
    """json: one object for each line, with the fields of the request"""
    log_content: bool = False
    """also log questions and answers"""
    engine_url: tuple[str, ...] = ()
    """vLLM servers that run the LLM, such as http://localhost:8001/v1, each started with --enable-prompt-embeds;
    several share the requests, --max-batch at each ($BLSP_ENGINE_KEY: their key)"""
    engine_model: str | None = None
    """the servers' name of the LLM, if they serve several"""
    device: Device = "auto"
    dtype: Dtype = "auto"
    weights: LlmWeights = None
    config: ConfigFile = None

    def __post_init__(self) -> None:
        above_zero(self, "max_upload_mb", "max_audio_seconds", "max_batch", "queue", "deadline")
        above_zero(self, "max_new_tokens")
        if not 0 <= self.port <= 65535:
            raise SettingsError(f"--port {self.port}: must be 0 to 65535")
        for name in ("deadline", "max_upload_mb"):
            if not math.isfinite(getattr(self, name)):
                raise SettingsError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be a finite number")
        for name in ("prefix_cache", "rate_limit"):
            if getattr(self, name) < 0:
                raise SettingsError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be 0 or more")
        self.keys  # noqa: B018  (raises SettingsError for wrong keys)

    @property
    def keys(self) -> dict[str, str]:
        """Names of keys and the bearer tokens that clients must send, from --api-key or $BLSP_API_KEY.

        A key without a name gets its number as name. Raises SettingsError if two have the same name or are equal.
        """
        keys: dict[str, str] = {}
        for number, given in enumerate(self.api_key or os.environ.get("BLSP_API_KEY", "").split(), start=1):
            named = NAMED_KEY.fullmatch(given)  # "c2VjcmV0==" is a key, not a name
            name, key = named.groups() if named else (f"key-{number}", given)
            if not key or name in keys or key in keys.values():
                raise SettingsError(f"--api-key: number {number} is empty, or has the name or the key of another one")
            keys[name] = key
        return keys
