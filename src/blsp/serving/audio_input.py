"""Audio of a request → 16 kHz samples, or a refusal with the reason.

In:  base64 of a file, a data-URI, an uploaded file's bytes, an https:// URL where that is allowed. Never a path.
Out: (N,) float32 samples, at most `--max-audio-seconds`.
Try: `decode(base64.b64decode(part.input_audio.data), longest=600)`
Flow: app.py → **audio_input.py** → exchange.py; in a thread of its own, never in the thread of the model
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import ipaddress
import socket
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from blsp.data.audio import AudioError, load_audio
from blsp.serving.api import AudioPart, AudioUrlPart
from blsp.serving.refusals import ApiError

if TYPE_CHECKING:
    from blsp.settings import ServeSettings

STANDARD_ALPHABET = bytes.maketrans(b"-_", b"+/")  # from base64's url-safe alphabet
FETCH_SECONDS = 20.0  # for a whole file
PUBLIC_IPV6 = ipaddress.ip_network("2000::/3")  # addresses with an IPv4 address inside are checked apart


def decode(data: bytes, longest: float) -> np.ndarray:
    """The samples (N,) of a file; decoding ends at `longest` seconds, whatever the header says."""
    try:
        return load_audio(data, longest=longest)
    except AudioError as error:
        raise ApiError(400, str(error), param="audio", code="invalid_audio") from error


def bytes_of(part: AudioPart | AudioUrlPart, settings: ServeSettings, end: float) -> bytes:
    """The file of a part. end: the monotonic time at which fetching must end."""
    if isinstance(part, AudioPart):
        return from_base64(part.input_audio.data)
    return from_url(
        part.audio_url.url,
        allow_remote=settings.allow_remote_audio,
        most_bytes=int(settings.max_upload_mb * 1e6),
        seconds=end - time.monotonic(),
    )


def from_base64(text: str) -> bytes:
    """The bytes of `input_audio.data`: base64 with or without line breaks and padding, in either alphabet; a
    data-URI is accepted too."""
    if text[:5].lower() == "data:":
        text = text.partition(",")[2]
    try:
        digits = text.encode("ascii").translate(STANDARD_ALPHABET, b" \t\r\n\f\v").rstrip(b"=")
        return base64.b64decode(digits + b"=" * (-len(digits) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        message = f"input_audio.data: is not base64 ({error})"
        raise ApiError(400, message, param="audio", code="invalid_base64") from error


def from_url(url: str, *, allow_remote: bool, most_bytes: int, seconds: float = FETCH_SECONDS) -> bytes:
    """The bytes of `audio_url.url`: a data-URI, or a public http(s) address where --allow-remote-audio is set.

    seconds: the time left until the request's deadline.
    """
    if url[:5].lower() == "data:":
        head, _, data = url.partition(",")
        if not head.rstrip().lower().endswith(";base64"):
            raise ApiError(400, "audio_url: a data-URI must be base64", param="audio_url", code="invalid_url")
        return from_base64(data)
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise ApiError(400, f"audio_url: {error}", param="audio_url", code="invalid_url") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ApiError(400, "audio_url: must be a data-URI or an http(s) URL", param="audio_url", code="invalid_url")
    if not allow_remote:
        raise ApiError(
            400,
            "audio_url: this server fetches nothing; send a data-URI (or start it with --allow-remote-audio)",
            param="audio_url",
            code="remote_audio_disabled",
        )
    if seconds <= 0:
        raise ApiError(504, "the request's deadline passed", code="deadline_exceeded")
    return _fetch(url, parts.hostname, port, most_bytes, min(seconds, FETCH_SECONDS))


def _fetch(url: str, host: str, port: int, most_bytes: int, seconds: float) -> bytes:
    """GET without redirects. The name is resolved once, and the connection goes to that public address."""
    import httpx

    address = public_address(host, port)
    headers = {"Host": host if port in (80, 443) else f"{host}:{port}"}
    try:
        pinned = httpx.URL(url).copy_with(host=address, userinfo=b"")
        return asyncio.run(asyncio.wait_for(_read(pinned, host, headers, most_bytes), seconds))
    except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
        raise ApiError(
            400, f"audio_url: {host} could not be read ({type(error).__name__})", param="audio_url", code="fetch_failed"
        ) from error


async def _read(url: Any, host: str, headers: dict[str, str], most_bytes: int) -> bytes:
    import httpx

    received = bytearray()
    async with (
        httpx.AsyncClient(timeout=FETCH_SECONDS, follow_redirects=False, trust_env=False) as client,
        client.stream("GET", url, headers=headers, extensions={"sni_hostname": host}) as answer,
    ):
        if answer.status_code != 200:
            raise ApiError(
                400,
                f"audio_url: {host} answered {answer.status_code}; redirects are not followed",
                param="audio_url",
                code="fetch_failed",
            )
        async for block in answer.aiter_bytes():
            received += block
            if len(received) > most_bytes:
                raise ApiError(413, "audio_url: the file is too large", param="audio_url", code="too_large")
    return bytes(received)


def public_address(host: str, port: int) -> str:
    """One address of `host`; refused if any of its addresses is not on the public internet."""
    try:
        resolved = {info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError) as error:
        raise ApiError(400, f"audio_url: {host} is not known", param="audio_url", code="fetch_failed") from error
    addresses = [ipaddress.ip_address(str(name).partition("%")[0]) for name in resolved]
    if not addresses or not all(map(_is_public, addresses)):
        raise ApiError(400, f"audio_url: {host} is not a public address", param="audio_url", code="private_address")
    return str(min(addresses, key=lambda address: address.version))


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """On the public internet, and not a private IPv4 address inside an IPv6 one (NAT64, 6to4, Teredo, mapped)."""
    if isinstance(address, ipaddress.IPv6Address):
        contains_ipv4 = address.ipv4_mapped or address.sixtofour or address.teredo
        if address not in PUBLIC_IPV6 or contains_ipv4:
            return False
    return address.is_global and not address.is_multicast
