"""Hosts that `audio_url` may name, and a name server that is slow, for a server with --allow-remote-audio.

In:  names under `.example`. Out: this machine's address, after a while for `slow.example`; files that never end.
Try: `python -m benchmarks.support.odd_hosts serve --allow-remote-audio` (the command `blsp`, with these names)
Flow: serving.py starts **odd_hosts.py** → remote_audio.py; attacks.py

Addresses of this machine are refused by the server; here they count as public, so that it asks these hosts.
"""

from __future__ import annotations

import gzip
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from unittest.mock import patch

from blsp import cli

SLOW_NAME = 6.0  # seconds
KINDS = {"gzip": "gzip, gzip", "dripping": "identity", "endless": "identity"}


@contextmanager
def odd_names() -> Iterator[None]:
    """Names under `.example` are known while the block runs."""
    from blsp.serving import remote_audio

    known = socket.getaddrinfo

    def look_up(host: Any, *arguments: Any, **options: Any) -> Any:
        if host == "slow.example":
            time.sleep(SLOW_NAME)
        return known("127.0.0.1" if str(host).endswith(".example") else host, *arguments, **options)

    with patch.object(socket, "getaddrinfo", look_up), patch.object(remote_audio, "_is_public", lambda _: True):
        yield


@contextmanager
def odd_host() -> Iterator[int]:
    """The port of a host whose file is twice compressed (/gzip), comes a byte a second (/dripping), or never ends."""
    bomb = gzip.compress(gzip.compress(bytes(100_000_000)))

    def answer(caller: socket.socket) -> None:
        with caller, suppress(OSError):
            kind = caller.recv(4096).split()[1].decode().strip("/")
            caller.sendall(f"HTTP/1.1 200 OK\r\ncontent-encoding: {KINDS[kind]}\r\n\r\n".encode())
            while True:
                caller.sendall({"gzip": bomb, "dripping": b"R", "endless": bytes(100_000)}[kind])
                if kind == "gzip":
                    return
                time.sleep(1.0 if kind == "dripping" else 0.001)

    with socket.create_server(("127.0.0.1", 0)) as door:

        def listen() -> None:
            with suppress(OSError):
                while True:
                    threading.Thread(target=answer, args=(door.accept()[0],), daemon=True).start()

        threading.Thread(target=listen, daemon=True).start()
        yield door.getsockname()[1]
        door.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    with odd_names():
        sys.exit(cli.main(sys.argv[1:]))
