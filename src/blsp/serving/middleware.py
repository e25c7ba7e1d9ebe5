"""Checks before a route runs: host name, API key, size and arrival time of the request.

In:  ASGI messages. Out: the same, or a refusal in OpenAI's form, before anything is decoded.
Try: `app.add_middleware(RequestGuard, keys={"me": "…"}, max_bytes=25_000_000, deadline=120.0, refused=print)`
Flow: a request → **middleware.py** (rate_limit.py) → app.py

A request's deadline counts from its first byte; routes find its end in `request.state.end`.

Starlette's TrustedHostMiddleware and FastAPI's HTTPBearer are not enough: the first cuts IPv6 addresses at their first
colon, the second runs after the whole body has been read.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import math
import re
import time
from collections.abc import Callable, Collection, Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blsp.serving.errors import ApiError
from blsp.serving.rate_limit import RateLimit

LOCAL = {"127.0.0.1", "localhost", "::1", "[::1]"}
JSON_ROUTES = {
    "/v1/chat/completions",
    "/v1/responses",
}  # the body counts as JSON here whatever its content type, unless the request comes from a web site
MAX_COMMAS = 100_000  # in a JSON body, also in texts: parsing millions of entries would take seconds
WRONG_KEYS = 20  # a minute from one address; more requests with a wrong key get 429
DISCARDED = 8  # of a refused request, this many times the size limit is read and dropped
DISCARD_SECONDS = 5.0
PROTECTIVE = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "cache-control": "no-store"}


def is_local(host: str) -> bool:
    """Whether `host` is a name of this machine that only this machine can use."""
    return host.lower() in LOCAL


class RequestGuard:
    """Refuses foreign host names (403), web pages of foreign origins under /v1/ (403), wrong keys (401), more than
    `rate_limit` requests a minute from one address (429), bodies over `max_bytes` (413), declared or not, JSON of very
    many entries (400), and bodies that have not arrived after `deadline` seconds (408); adds protective headers.

    refused: called with the request's path, its client and each refusal. local: the server is only for this machine and
    answers only to this machine's names, so that no web site can reach it under its own name (DNS rebinding). keys:
    names and tokens; the name is put into the request's state, as `key`. The page and /health need no key: they hold
    no data, and the page asks for the key.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Mapping[str, str],
        max_bytes: int,
        deadline: float,
        refused: Callable[[str, str, ApiError], None],
        local: bool = False,
        rate_limit: int = 0,
        origins: Collection[str] = (),
    ) -> None:
        self._origins = origins
        self.app, self.max_bytes, self.deadline, self.local = app, max_bytes, deadline, local
        self._refused = refused
        self._requests, self._wrong_keys = RateLimit(rate_limit), RateLimit(WRONG_KEYS)
        self._keys = {name: key.encode() for name, key in keys.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        client = (scope.get("client") or ("unknown",))[0]
        if refusal := self._head_refusal(scope, headers, client):
            self._refused(scope["path"], client, refusal)
            if "expect" not in headers:  # a client with this header has not sent its body yet
                await _discard(receive, self.max_bytes)
            await _refuse(send, refusal)
            return
        if scope["path"] in JSON_ROUTES and "origin" not in headers:
            MutableHeaders(scope=scope)["content-type"] = "application/json"
        commas = MAX_COMMAS if scope["path"] in JSON_ROUTES else self.max_bytes
        body = LimitedBody(receive, send, self.max_bytes, self.deadline, commas)
        scope.setdefault("state", {})["end"] = body.end
        try:
            await self.app(scope, body.receive, body.send)
        finally:
            if body.refusal:
                self._refused(scope["path"], client, body.refusal)
            await body.answer_refusal()

    def _head_refusal(self, scope: Scope, headers: Headers, client: str) -> ApiError | None:
        """The refusal of the request by its path and headers; None if they are right."""
        if self.local and not is_local(re.sub(r":\d*$", "", headers.get("host", "localhost"))):
            return ApiError(
                403,
                "this server answers to this machine alone; start it with a key, or with --insecure",
                code="foreign_host",
            )
        if scope["path"].startswith("/v1/") and self._is_foreign(headers):
            text = "web pages of this origin may not call this server; allow it with --cors-origin"
            return ApiError(403, text, code="foreign_origin")
        protected = scope["path"].startswith("/v1/") or scope["path"] in ("/metrics", "/openapi.json")
        if self._keys and protected and scope["method"] != "OPTIONS":
            scheme, _, given = headers.get("authorization", "").partition(" ")
            token = given.strip().encode("latin-1") if scheme.lower() == "bearer" else b""
            names = [name for name, key in self._keys.items() if hmac.compare_digest(token, key)]  # all, always
            if not names:
                if seconds := self._wrong_keys.wait(client):
                    return _too_often("requests with a wrong key", seconds)
                return ApiError(401, "a valid API key is needed: Authorization: Bearer …", code="invalid_api_key")
            scope.setdefault("state", {})["key"] = names[0]
        if protected and (seconds := self._requests.wait(client)):
            return _too_often("requests", seconds)
        declared = headers.get("content-length", "0")
        if not (declared.isascii() and declared.isdigit()) or int(declared) > self.max_bytes:
            return _too_large(self.max_bytes)
        return None

    def _is_foreign(self, headers: Headers) -> bool:
        """Whether a web page of another origin, which is not allowed, has sent the request.

        A form with a file, or plain text, comes without a preflight, so CORS alone would let such a page make the
        server work. Behind a proxy that changes the host name, a browser's Sec-Fetch-Site names the server's own page.
        """
        origin = headers.get("origin")
        if origin is None or "*" in self._origins or origin in self._origins:
            return False
        own = origin.partition("://")[2].lower() == headers.get("host", "").lower()
        return not own and headers.get("sec-fetch-site") != "same-origin"


class LimitedBody:
    """One request's messages, counted and timed until the body is complete; `refusal` is set if it breaks a limit."""

    def __init__(self, receive: Receive, send: Send, max_bytes: int, seconds: float, max_commas: int) -> None:
        self._receive, self._send, self._max_bytes, self._seconds = receive, send, max_bytes, seconds
        self._commas_left = max_commas
        self.end = time.monotonic() + seconds
        self._received = 0
        self._complete = self._answered = False
        self.refusal: ApiError | None = None

    async def receive(self) -> Message:
        """The next message for the route; after a refusal, a message that the client has left."""
        if self._complete:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, self.end - time.monotonic()))
        except TimeoutError:
            self.refusal = ApiError(
                408, f"the request did not arrive within {self._seconds:g} s", code="request_timeout"
            )
            return {"type": "http.disconnect"}
        self._received += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        self._commas_left -= message.get("body", b"").count(b",")
        if self._received > self._max_bytes:
            self.refusal = _too_large(self._max_bytes)
        elif self._commas_left < 0:
            text = f"the body has more than {MAX_COMMAS:,} commas: too many entries"
            self.refusal = ApiError(400, text, code="too_many")
        return {"type": "http.disconnect"} if self.refusal else message

    async def send(self, message: Message) -> None:
        """Pass the route's answer on, with protective headers; drop its answer to an incomplete body."""
        if self.refusal and not self._answered:
            return
        if message["type"] == "http.response.start":
            self._answered = True
            MutableHeaders(scope=message).update(PROTECTIVE)
        await self._send(message)

    async def answer_refusal(self) -> None:
        """Send the refusal, if there is one and the route has not begun to answer."""
        if self.refusal is None or self._answered:
            return
        if self.refusal.status != 408 and not self._complete:
            await _discard(self._receive, self._max_bytes)
        await _refuse(self._send, self.refusal)


def _too_often(what: str, seconds: float) -> ApiError:
    wait = math.ceil(seconds)
    message = f"too many {what} from this address; try again in {wait} s"
    return ApiError(429, message, code="rate_limit_exceeded", retry_after=wait)


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"the request is larger than {max_bytes:,} bytes", code="too_large")


async def _discard(receive: Receive, max_bytes: int) -> None:
    """Read for a while and drop the bytes: closing a connection with unread bytes resets it, and the client would not
    get the refusal."""
    unread = DISCARDED * max_bytes
    try:
        async with asyncio.timeout(DISCARD_SECONDS):
            while unread > 0:
                message = await receive()
                unread -= len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return


async def _refuse(send: Send, error: ApiError) -> None:
    body = json.dumps(error.body()).encode()
    fields = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close", **PROTECTIVE}
    if error.retry_after:
        fields["retry-after"] = str(error.retry_after)
    headers = [(name.encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
