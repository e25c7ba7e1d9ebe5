"""Server process: `blsp serve` from its flags to its exit code.

In:  settings. Out: a running server; 0 after SIGTERM or Ctrl-C, when all accepted requests are answered.
Try: `blsp serve`, then http://127.0.0.1:8000
Flow: cli.py → **server.py** → connection.py, app.py (the routes) → scheduler.py (the thread of the model)
"""

from __future__ import annotations

import json
import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI

from blsp.inference.listener import load, load_options
from blsp.serving.app import create_app
from blsp.serving.connection import TimedConnection
from blsp.serving.middleware import is_local

if TYPE_CHECKING:
    from blsp.settings import ServeSettings


def serve(settings: ServeSettings) -> None:
    """Load the model and serve until SIGTERM or Ctrl-C; accepted requests are finished first."""
    check_exposure(settings)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    if settings.log_format == "json":
        logging.getLogger().handlers[0].setFormatter(JsonLines())
    logging.getLogger("blsp").setLevel(logging.INFO)  # other loggers would print URLs and parts of requests
    address = reserve(settings.host, settings.port)
    listener = load(settings.model, **load_options(settings))
    Server(server_config(create_app(listener, settings), settings)).run(sockets=[address])


def server_config(app: FastAPI, settings: ServeSettings) -> uvicorn.Config:
    """How uvicorn serves the application."""
    return uvicorn.Config(
        app,
        # uvicorn only calls it, as it would a class
        http=partial(TimedConnection, deadline=settings.deadline, refused=app.state.refused),  # type: ignore[arg-type]
        log_level="warning",
        access_log=False,
        ws="none",
        timeout_graceful_shutdown=round(settings.deadline),
        timeout_keep_alive=30,
    )


class JsonLines(logging.Formatter):
    """A JSON object a line: time (UTC), level, message, and the fields of a request."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def check_exposure(settings: ServeSettings) -> None:
    """Exit if other machines could connect without a key, unless --insecure allows it."""
    if not is_local(settings.host) and not settings.keys and not settings.insecure:
        raise SystemExit(
            f"--host {settings.host} is open to other machines: set $BLSP_API_KEY (or --api-key), or give --insecure"
        )


def _address(host: str, port: int) -> str:
    """Host and port as in a URL: an IPv6 address is in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def reserve(host: str, port: int) -> socket.socket:
    """A socket bound to the address before the model is loaded; it listens when the server has started."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        where = f"{_address(host, port)} ({error.strerror})"
        raise SystemExit(f"cannot listen on {where}: name another --host or --port (0: any free one)") from error
    return bound


class Server(uvicorn.Server):
    """A uvicorn server that prints its address, and ends with exit code 0 after SIGTERM."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for server in self.servers:
            for listening in server.sockets:
                host, port = listening.getsockname()[:2]
                print(f"listening on http://{_address(host, port)}", flush=True)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As in uvicorn, but without raising the signal again at the end, which would become the exit code."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle_exit)
        yield
