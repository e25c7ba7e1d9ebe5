"""Web pages of other origins cannot make the server work; its own page and named origins can."""

from __future__ import annotations

from typing import Any

import pytest
from serving.conftest import Running, spoken

APP = "https://app.example"


def send(server: Running, **headers: str) -> Any:
    """A form with a file, which a browser sends to any host without asking first."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return server.http().post("/v1/audio/transcriptions", files={"file": ("a.wav", spoken())}, headers=names)


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:1", "http://127.0.0.1"])
def test_a_page_of_another_origin_is_refused(server: Running, monkeypatch: pytest.MonkeyPatch, origin: str) -> None:
    with monkeypatch.context() as untouched:
        untouched.setattr(server.app.state.scheduler, "submit", lambda job: pytest.fail("it was submitted"))
        answer = send(server, origin=origin, sec_fetch_site="cross-site")
    assert answer.status_code == 403 and answer.json()["error"]["code"] == "foreign_origin"
    assert server.http().get("/health", headers={"origin": origin}).status_code == 200


def test_the_servers_own_page_and_other_programs_are_answered(server: Running) -> None:
    port = server.url.rpartition(":")[2]
    assert send(server).status_code == 200
    assert send(server, origin=server.url).status_code == 200
    assert send(server, origin=f"http://LOCALHOST:{port}", host=f"localhost:{port}").status_code == 200
    # behind a proxy that changes the host name
    assert send(server, origin="https://speech.example", sec_fetch_site="same-origin").status_code == 200


def test_a_named_origin_is_answered(server_with: Any) -> None:
    with server_with(cors_origin=(APP,)) as server:
        answer = send(server, origin=APP)
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == APP
        assert send(server, origin="https://evil.example").status_code == 403
    with server_with(cors_origin=("*",)) as server:
        assert send(server, origin=APP).status_code == 200
