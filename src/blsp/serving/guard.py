"""What is checked before a route runs: the key, and how much a client may send.

In:  ASGI messages. Out: the same, or a refusal in OpenAI's form before anything was read or decoded.
Try: `app.add_middleware(Guard, api_key="…", most_bytes=25_000_000)`
Flow: serving/ — a request -> **guard** -> app.py.
"""

from __future__ import annotations

import hmac
import json
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blsp.serving.schema import ApiError

HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]


class Guard:
    """Refuses wrong keys (401) and bodies over `most_bytes` (413), declared or not; adds protective headers.

    The page itself and /health are open: they hold nothing, and the page asks for the key.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, most_bytes: int) -> None:
        self.app, self.most_bytes = app, most_bytes
        self._key = api_key.encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if refusal := self._refusal(scope, headers):
            await _refuse(send, refusal)
            return
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return {"type": "http.disconnect"} if received > self.most_bytes else message

        begun = False

        async def protected(message: Message) -> None:
            nonlocal begun
            if received > self.most_bytes and not begun:
                return  # whatever the route makes of half a body: the refusal below is the answer
            if message["type"] == "http.response.start":
                begun = True
                message = {**message, "headers": [*message.get("headers", []), *HEADERS]}
            await send(message)

        try:
            await self.app(scope, limited, protected)
        finally:
            if received > self.most_bytes and not begun:
                await _refuse(send, self._too_large())

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> ApiError | None:
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
