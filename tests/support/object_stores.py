"""Servers that tests start: one over HTTP, and one that speaks S3 (moto).

In:  files by name. Out: the URL under which they are.
Try: `with http_files({"a.wav": data}) as base: load_audio(f"{base}/a.wav")`
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest
from fsspec.registry import _registry


@contextmanager
def http_files(files: Mapping[str, bytes]) -> Iterator[str]:
    """The URL of a server of these files, which answers requests of a range."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            data = files.get(self.path.lstrip("/"))
            first, last = 0, len(data or b"") - 1
            asked = self.headers.get("Range", "").removeprefix("bytes=").split("-")
            if data is not None and len(asked) == 2:
                first, last = int(asked[0]), min(last, int(asked[1] or last))
            body = (data or b"")[first : last + 1]
            self.send_response(404 if data is None else 206 if len(asked) == 2 else 200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(body)))
            if len(asked) == 2 and data is not None:
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def s3_bucket() -> Iterator[str]:
    """The URL of a bucket behind an S3 server; fsspec's configuration names the server and its keys."""
    moto_server = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    fsspec.config.conf["s3"] = {"endpoint_url": f"http://{host}:{port}", "key": "test", "secret": "test"}
    try:
        fsspec.filesystem("s3").makedirs("speech", exist_ok=True)
        yield "s3://speech"
    finally:
        del fsspec.config.conf["s3"]
        server.stop()


class BackendError(Exception):
    """What a protocol's own package raises: no OSError, more than one line."""


@contextmanager
def registered_store(protocol: str, files: Mapping[str, bytes], fails_from: int | None = None) -> Iterator[str]:
    """The URL of a bucket under any protocol, which fsspec opens as it would with that protocol's package.

    fails_from: the byte of every file from which on the connection breaks.
    """

    class File(fsspec.spec.AbstractBufferedFile):
        def _fetch_range(self, start: int, end: int) -> bytes:
            if fails_from is not None and end > fails_from:
                raise BackendError("the connection was reset\nby the store")
            return files[self.path.partition("/")[2]][start:end]

    class Store(fsspec.AbstractFileSystem):
        def info(self, path: str, **_: object) -> dict[str, object]:
            name = self._strip_protocol(path).partition("/")[2]
            if name not in files:
                raise FileNotFoundError(path)
            return {"name": f"bucket/{name}", "size": len(files[name]), "type": "file", "etag": str(hash(files[name]))}

        def _open(self, path: str, mode: str = "rb", block_size: int = 1 << 16, **options: object) -> File:
            return File(self, path, mode, block_size, **options)

    Store.protocol, Store.cachable = protocol, False
    known = _registry.get(protocol)
    fsspec.register_implementation(protocol, Store, clobber=True)
    try:
        yield f"{protocol}://bucket"
    finally:
        _registry.pop(protocol)
        if known is not None:
            fsspec.register_implementation(protocol, known)
