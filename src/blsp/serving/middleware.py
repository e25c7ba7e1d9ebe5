"""What is checked before a route runs: the key, the host, how much a client may send and how long it may take.

In:  ASGI messages. Out: the same, or a refusal in OpenAI's form before anything was read or decoded.
Try: `app.add_middleware(Guard, api_key="…", most_bytes=25_000_000, patience=120.0)`
Flow: serving/ — a request -> **guard** -> app.py.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blsp.serving.api import ApiError

LOCAL = {"127.0.0.1", "localhost", "::1", "[::1]"}
DISCARDED = 8  # times the largest request are read of a refused one
DISCARDING = 5.0  # seconds
PORT = re.compile(rb":\d*$")
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]


def is_local(host: str) -> bool:
    """Whether `host` names this machine as only this machine sees it."""
    return host.lower() in LOCAL


class Guard:
    """Refuses wrong keys (401), bodies over `most_bytes` (413), declared or not, and bodies that have not come after
    `patience` seconds (408); adds protective headers.

    The page itself and /health are open: they hold nothing, and the page asks for the key. local: a server for this
    machine alone answers under this machine's names only (403), so that no web site reaches it under a name of its
    own (DNS rebinding).
    """

    def __init__(
        self, app: ASGIApp, api_key: str | None, most_bytes: int, patience: float, local: bool = False
    ) -> None:
        self.app, self.most_bytes, self.patience, self.local = app, most_bytes, patience, local
        self._key = api_key.encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if refusal := self._refusal(scope, headers):
            if b"expect" not in headers:
                await self._discard(receive)
            await _refuse(send, refusal)
            return
        received = 0
        whole = begun = False
        refused: ApiError | None = None
        end = time.monotonic() + self.patience

        async def limited() -> Message:
            nonlocal received, whole, refused
            if whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
            except TimeoutError:
                refused = ApiError(408, f"the request did not arrive within {self.patience:g} s")
                return {"type": "http.disconnect"}
            received += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if received > self.most_bytes:
                refused = self._too_large()
            return {"type": "http.disconnect"} if refused else message

        async def protected(message: Message) -> None:
            nonlocal begun
            if refused and not begun:
                return  # whatever the route makes of half a body: the refusal below is the answer
            if message["type"] == "http.response.start":
                begun = True
                message = {**message, "headers": [*message.get("headers", []), *HEADERS]}
            await send(message)

        try:
            await self.app(scope, limited, protected)
        finally:
            if refused and not begun:
                if refused.status == 413:
                    await self._discard(receive)
                await _refuse(send, refused)

    async def _discard(self, receive: Receive) -> None:
        """Read on for a while without keeping anything: a connection that is closed over unread bytes is reset, and the
        client would not see the refusal."""
        unread = DISCARDED * self.most_bytes
        try:
            async with asyncio.timeout(DISCARDING):
                while unread > 0:
                    message = await receive()
                    unread -= len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return
        except TimeoutError:
            return

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> ApiError | None:
        host = PORT.sub(b"", headers.get(b"host", b"localhost")).decode("latin-1")
        if self.local and not is_local(host):
            return ApiError(
                403, "this server answers to this machine alone; start it with a key, or with --insecure"
            )
        guarded = scope["path"].startswith("/v1/") or scope["path"] in ("/metrics", "/openapi.json")
        if self._key is not None and guarded and scope["method"] != "OPTIONS":
            given = headers.get(b"authorization", b"")
            given = given[7:].strip() if given[:7].lower() == b"bearer " else b""
            if not hmac.compare_digest(given, self._key):
                return ApiError(
                    401, "a valid API key is needed: Authorization: Bearer …", code="invalid_api_key"
                )
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self.most_bytes:
            return self._too_large()
        return None

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request is larger than {self.most_bytes:,} bytes", code="too_large")


async def _refuse(send: Send, error: ApiError) -> None:
    body = json.dumps(error.body()).encode()
    headers: list[Any] = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
        *HEADERS,
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
