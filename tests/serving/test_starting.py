"""Settings that no server can use are refused before the model is loaded; the address is printed as a URL."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn

from blsp.serving.server import Server
from blsp.settings import ServeSettings, SettingsError


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"port": 70_000}, "--port 70000: must be 0 to 65535"),
        ({"port": -1}, "--port -1: must be 0 to 65535"),
        ({"deadline": math.inf}, "--deadline inf: must be a finite number"),
        ({"max_upload_mb": math.inf}, "--max-upload-mb inf: must be a finite number"),
    ],
)
def test_numbers_that_no_server_can_use_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        ServeSettings(**given)


@pytest.mark.parametrize(
    ("name", "url"), [(("::1", 34401, 0, 0), "http://[::1]:34401"), (("127.0.0.1", 8000), "http://127.0.0.1:8000")]
)
def test_the_address_is_printed_as_a_url(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: tuple[Any, ...], url: str
) -> None:
    async def listen(server: uvicorn.Server, sockets: object = None) -> None:
        listening = SimpleNamespace(getsockname=lambda: name)
        server.servers = [SimpleNamespace(sockets=[listening])]  # type: ignore[list-item]

    monkeypatch.setattr(uvicorn.Server, "startup", listen)
    asyncio.run(Server(uvicorn.Config("none")).startup())
    assert capsys.readouterr().out == f"listening on {url}\n"
