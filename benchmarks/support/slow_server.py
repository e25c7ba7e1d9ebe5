"""Server double for benchmarks: answers every chat completion after a fixed time, on next to no processor time.

In:  seconds an answer takes. Out: a process that listens on localhost; its URL.
Try: `with slow_server(0.3) as url: httpx.post(url + "/chat/completions", json={})`
Flow: continue_url.py → **slow_server.py**

It speaks just enough HTTP/1.1 for a client that sends `Content-Length` and keeps its connections. A real framework
would need more of the two cores than the client that is measured.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

CHOICE = {"index": 0, "message": {"role": "assistant", "content": "and so on"}, "finish_reason": "stop"}
BODY = json.dumps({"object": "chat.completion", "model": "double", "choices": [CHOICE]}).encode()
REPLY = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)


class Answering(asyncio.Protocol):
    """One connection: each whole request is answered after `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._received = seconds, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, blank, body = self._received.partition(b"\r\n\r\n")
        if blank and len(body) >= int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]):
            self._received = b""
            asyncio.get_running_loop().call_later(self._seconds, self._answer)

    def _answer(self) -> None:
        assert isinstance(self._transport, asyncio.Transport)
        self._transport.write(REPLY)


def _serve(seconds: float, port: Connection) -> None:
    async def listen() -> None:
        server = await asyncio.get_running_loop().create_server(
            lambda: Answering(seconds), "127.0.0.1", 0, backlog=4096
        )
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(listen())


@contextmanager
def slow_server(seconds: float) -> Iterator[str]:
    """The URL of a server in a process of its own."""
    mine, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(seconds, theirs), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{mine.recv()}/v1"
    finally:
        process.terminate()
        process.join()
