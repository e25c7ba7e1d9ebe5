"""Audio behind a URL in a request (--allow-remote-audio).

In:  a public http(s) URL. Out: the file's bytes, or a refusal with the reason.
Try: `await fetch("https://example.org/question.wav", most_bytes=25_000_000, end=time.monotonic() + 10)`
Flow: audio_input.py → **remote_audio.py**, in the event loop, so that a slow host does not block a decoder

No redirects, no private addresses, no compression: the counted bytes are the bytes in memory. The host's name is
resolved once, within the same deadline, and the connection is made to that address.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
from typing import Any
from urllib.parse import urlsplit

from blsp.serving.errors import ApiError, late, refusal

FETCH_SECONDS = 20.0  # for a whole file
PUBLIC_IPV6 = ipaddress.ip_network("2000::/3")  # addresses that contain an IPv4 address are checked separately


async def fetch(url: str, *, most_bytes: int, end: float) -> bytes:
    """GET. end: the monotonic time at which the request's deadline passes."""
    import httpx

    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise refusal("audio_url", str(error), "invalid_url") from error
    if parts.scheme not in ("http", "https") or not host:
        raise refusal("audio_url", "must be a data-URI or an http(s) URL", "invalid_url")
    if end <= time.monotonic():
        raise late()
    headers = {"Host": host if port in (80, 443) else f"{host}:{port}", "Accept-Encoding": "identity"}
    try:
        async with asyncio.timeout(min(end - time.monotonic(), FETCH_SECONDS)):
            pinned = httpx.URL(url).copy_with(host=await public_address(host, port), userinfo=b"")
            return await _read(pinned, host, headers, most_bytes)
    except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
        if end <= time.monotonic():
            raise late() from error
        raise refusal("audio_url", f"{host} could not be read ({type(error).__name__})", "fetch_failed") from error


async def _read(url: Any, host: str, headers: dict[str, str], most_bytes: int) -> bytes:
    import httpx

    received = bytearray()
    async with (
        httpx.AsyncClient(timeout=FETCH_SECONDS, follow_redirects=False, trust_env=False) as client,
        client.stream("GET", url, headers=headers, extensions={"sni_hostname": host}) as answer,
    ):
        if answer.status_code != 200:
            raise refusal(
                "audio_url", f"{host} answered {answer.status_code}; redirects are not followed", "fetch_failed"
            )
        if answer.headers.get("content-encoding", "identity").lower() != "identity":
            raise refusal("audio_url", f"{host} sent a compressed body, which was not asked for", "fetch_failed")
        async for block in answer.aiter_raw():
            received += block
            if len(received) > most_bytes:
                raise ApiError(413, "audio_url: the file is too large", param="audio_url", code="too_large")
    return bytes(received)


async def public_address(host: str, port: int) -> str:
    """One address of `host`; refused if any of its addresses is not on the public internet."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise refusal("audio_url", f"{host} is not known", "fetch_failed") from error
    names = {str(entry[4][0]).partition("%")[0] for entry in found}
    addresses = [ipaddress.ip_address(name) for name in names]
    if not addresses or not all(map(_is_public, addresses)):
        raise refusal("audio_url", f"{host} is not a public address", "private_address")
    return str(min(addresses, key=lambda address: address.version))


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """On the public internet, and not a private IPv4 address inside an IPv6 one (NAT64, 6to4, Teredo, mapped)."""
    if isinstance(address, ipaddress.IPv6Address):
        contains_ipv4 = address.ipv4_mapped or address.sixtofour or address.teredo
        if address not in PUBLIC_IPV6 or contains_ipv4:
            return False
    return address.is_global and not address.is_multicast
