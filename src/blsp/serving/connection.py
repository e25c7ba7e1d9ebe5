"""HTTP connection with time limits, which uvicorn leaves to a proxy.

In:  bytes of a client. Out: requests for the application; the connection is closed if a request does not arrive, or if
     its answer is not fetched.
Try: `uvicorn.Config(app, http=partial(TimedConnection, deadline=120.0, refused=print))`
Flow: server.py → **connection.py** → middleware.py

    first byte ── HEAD_SECONDS ──▶ the headers must be complete (408)
    all headers ── deadline + FETCH_SECONDS ──▶ the answer must be fetched, or the connection is closed

uvicorn itself limits only how long a connection may be idle between two requests (`timeout_keep_alive`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from blsp.serving.errors import ApiError

HEAD_SECONDS = 20.0  # from the connection, or the first byte of a later request, to the end of its headers
FETCH_SECONDS = 10.0  # after the deadline, to fetch the rest of the answer
LATE = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class TimedConnection(H11Protocol):
    """A connection whose requests end after `deadline` seconds.

    refused: called with a path (not known here), the client and each refusal. options: uvicorn's own.
    """

    def __init__(self, *, deadline: float, refused: Callable[[str, str, ApiError], None], **options: Any) -> None:
        super().__init__(**options)
        self._deadline, self._refused = deadline, refused
        self._head_seconds = min(HEAD_SECONDS, deadline)
        self._timer: asyncio.TimerHandle | None = None
        self._head = False  # whether the timer waits for headers, not for the end of an answer
        self._begun = False  # whether any byte has arrived; browsers open connections before they need them

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        self._begun = True
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        self._stop()
        super().on_response_complete()
        if self.transport.is_closing():  # it closes after the rest is fetched
            self._timer = self.loop.call_later(FETCH_SECONDS, self.transport.abort)
        elif self.conn.their_state is not h11.IDLE:  # the next request has come already
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self.loop.call_later(FETCH_SECONDS, self.transport.abort)  # a client that fetches nothing keeps it open

    def _watch(self) -> None:
        """One timer at a time: first for the headers, then for the answer."""
        head = self.conn.their_state is h11.IDLE
        if self._timer is not None and self._head == head:
            return
        self._stop()
        self._head = head
        seconds = self._head_seconds if head else self._deadline + FETCH_SECONDS
        self._timer = self.loop.call_later(seconds, self._give_up)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        if self._head and self._begun:
            text = f"the head of the request did not arrive within {self._head_seconds:g} s"
            self._refused("", self.client[0] if self.client else "unknown", ApiError(408, text, code="request_timeout"))
            self.transport.write(LATE)
            self.transport.close()
            self._timer = self.loop.call_later(FETCH_SECONDS, self.transport.abort)
        else:
            self.transport.abort()
