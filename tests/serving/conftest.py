"""A running server with a tiny random model, on a free port."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import soundfile
import uvicorn
from support.tiny_models import speech_like, tiny_blsp

from blsp.inference.listener import Listener
from blsp.serving.app import create_app
from blsp.serving.server import server_config
from blsp.settings import ServeSettings


def wav(clip: np.ndarray, rate: int = 16_000, kind: str = "WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, clip, rate, format=kind)
    return file.getvalue()


def spoken(seed: int = 0, seconds: float = 1.0) -> bytes:
    return wav(speech_like(seconds, seed))


def audio_part(data: bytes) -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"}}


def user(*parts: str | bytes) -> dict[str, Any]:
    content = [audio_part(p) if isinstance(p, bytes) else {"type": "text", "text": p} for p in parts]
    return {"role": "user", "content": content}


@dataclass
class Running:
    url: str
    app: Any
    listener: Listener

    def client(self, key: str = "none", **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **options)

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, **{"timeout": 60, **options})


@contextmanager
def running(listener: Listener, **settings: Any) -> Iterator[Running]:
    options = ServeSettings(**{"model": "tiny", "max_new_tokens": 64, **settings})
    app = create_app(listener, options)
    config = server_config(app, options)
    config.port = 0
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        patience = time.monotonic() + 60
        while httpx.get(f"{url}/health").status_code != 200:
            assert time.monotonic() < patience, "the server does not get ready"
            time.sleep(0.02)
        yield Running(url, app, listener)
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="session")
def listener(tmp_path_factory: pytest.TempPathFactory) -> Listener:
    """A grounded model that writes on: its end token is the rarest thing it says."""
    folder: Path = tmp_path_factory.mktemp("served")
    return Listener(*tiny_blsp(folder, family="llama", adapter="grounded"))


@pytest.fixture(scope="session")
def server(listener: Listener) -> Iterator[Running]:
    with running(listener) as each:
        yield each


@pytest.fixture
def server_with(listener: Listener) -> Callable[..., Any]:
    return lambda **settings: running(listener, **settings)
