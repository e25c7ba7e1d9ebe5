"""The server process: `blsp serve` from its flags to its exit code.

In:  settings. Out: a running server; 0 after SIGTERM or Ctrl-C, once what was taken has been answered.
Try: `blsp serve`, then http://127.0.0.1:8000
Flow: cli.py -> **process** -> app.py (the routes) -> scheduler.py (the model's thread).
"""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import uvicorn

from blsp.inference.listener import load
from blsp.serving.app import create_app
from blsp.serving.middleware import is_local

if TYPE_CHECKING:
    from blsp.settings import ServeSettings


def serve(settings: ServeSettings) -> None:
    """Load the model and serve until SIGTERM or Ctrl-C; requests that were taken are finished first."""
    check_exposure(settings)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("blsp").setLevel(logging.INFO)  # others would name URLs and parts of requests
    address = reserve(settings.host, settings.port)
    listener = load(settings.model, device=settings.device, dtype=settings.dtype)
    config = uvicorn.Config(
        create_app(listener, settings),
        log_level="warning",
        access_log=False,
        ws="none",
        timeout_graceful_shutdown=round(settings.deadline),
        timeout_keep_alive=30,
    )
    Server(config).run(sockets=[address])


def check_exposure(settings: ServeSettings) -> None:
    """Beyond this machine only with a key, or when told so twice."""
    if not is_local(settings.host) and not settings.key and not settings.insecure:
        raise SystemExit(
            f"--host {settings.host} lets others in: set $BLSP_API_KEY (or --api-key), or say --insecure"
        )


def reserve(host: str, port: int) -> socket.socket:
    """The address to listen on, taken before anything is loaded. Who connects is let in once the server listens."""
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        taken = socket.socket(family, socket.SOCK_STREAM)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(place)
    except OSError as error:
        raise SystemExit(
            f"{host}:{port} cannot be listened on ({error.strerror}): name another --host or --port (0: any free one)"
        ) from error
    return taken


class Server(uvicorn.Server):
    """Says where it listens, and ends with exit code 0 after SIGTERM."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for server in self.servers:
            for each in server.sockets:
                host, port = each.getsockname()[:2]
                print(f"listening on http://{host}:{port}", flush=True)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Without uvicorn's raising of the signal once more at the end, which would be the exit code."""
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, self.handle_exit)
        yield
