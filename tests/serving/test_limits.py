"""Limits for each client: decoding, the deadline, remote audio, wrong keys, many requests."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from serving.conftest import Running, audio_part, spoken, user, wav

from blsp.serving import audio_input, connection, remote_audio, transcription
from blsp.serving.audio_input import _take_lowest_priority
from blsp.serving.errors import ApiError
from blsp.serving.exchange import Exchange
from blsp.serving.rate_limit import Quiet, RateLimit
from blsp.serving.server import JsonLines


def ask(server: Running, clip: bytes, **options: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": [audio_part(clip)]}], "max_tokens": 1}
    return server.http(**options).post("/v1/chat/completions", json=body)


# --- connections ----------------------------------------------------------------------------------------------


def raw(server: Running, data: bytes, buffer: int | None = None) -> socket.socket:
    """A connection on which `data` has been sent. buffer: bytes that may lie unread on this side."""
    connection = socket.socket()
    connection.settimeout(30)
    if buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    address = urlsplit(server.url)
    connection.connect((address.hostname, address.port))
    connection.sendall(data)
    return connection


@pytest.mark.parametrize("first", [b"", b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"])
def test_a_head_that_trickles_in_is_given_up(
    server_with: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, first: bytes
) -> None:
    """The first one of a connection, and a later one."""
    monkeypatch.setattr(connection, "HEAD_SECONDS", 1.0)
    caplog.set_level("INFO", logger="blsp.serving")
    with server_with() as server, raw(server, first) as client:
        began, answer = time.monotonic(), b""
        client.settimeout(0.1)
        while time.monotonic() < began + 20:
            try:
                client.sendall(b"G" if time.monotonic() < began + 0.2 else b"")
                client.sendall(b"E")
                if not (received := client.recv(1000)):
                    break
                answer += received
            except TimeoutError:
                continue
            except OSError:
                break
        assert b" 408 " in answer and 0.8 < time.monotonic() - began < 5
        assert "408, request_timeout" in caplog.text
        assert ask(server, spoken()).status_code == 200


def test_a_connection_on_which_nothing_comes_is_closed_without_a_line(
    server_with: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
    caplog.set_level("INFO", logger="blsp.serving")
    with server_with() as server, raw(server, b"") as client:
        assert client.recv(1000) == b"" and "408" not in caplog.text


def test_who_does_not_fetch_the_answer_is_cut_off(server_with: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "FETCH_SECONDS", 0.5)
    monkeypatch.setattr(Exchange, "pieces", _much)
    body = json.dumps({"messages": [user("hi")], "stream": True}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body)
    with server_with(deadline=1.0) as server, raw(server, head + body, buffer=4096) as client:
        time.sleep(4)
        received = 0
        with suppress(ConnectionResetError):
            while block := client.recv(1 << 20):
                received += len(block)
        assert 0 < received < 40_000_000, "it got what lay in the buffers"


async def _much(exchange: Exchange) -> Any:
    for _ in range(1000):
        yield "x" * 100_000


# --- decoding -------------------------------------------------------------------------------------------------


class Endless:
    """In the place of load_audio: a recording that never ends, in blocks of 10 ms."""

    def __init__(self) -> None:
        self.begun, self.ended = threading.Event(), threading.Event()

    def __call__(self, data: bytes, longest: float, check: Callable[[int], object]) -> np.ndarray:
        self.begun.set()
        try:
            while True:
                time.sleep(0.01)
                check(160)
        finally:
            self.ended.set()


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> Endless:
    decoder = Endless()
    monkeypatch.setattr(audio_input, "load_audio", decoder)
    return decoder


def test_samples_are_bounded_over_all_channels(server_with: Any) -> None:
    many = wav(np.zeros((48_000 * 12, 8), dtype=np.float32), rate=48_000, kind="FLAC")  # 12 s x 8 channels
    with server_with(max_audio_seconds=20) as server:
        error = ask(server, many).json()["error"]
        assert (error["param"], error["code"]) == ("audio", "invalid_audio") and "over all channels" in error["message"]
        upload = server.http().post("/v1/audio/transcriptions", files={"file": ("a.flac", many)})
        assert upload.status_code == 400 and "over all channels" in upload.text
        assert ask(server, wav(np.zeros((48_000 * 12, 2), dtype=np.float32), rate=48_000)).status_code == 200


def test_decoding_is_given_up_when_the_client_has_left(server: Running, endless: Endless) -> None:
    with pytest.raises(httpx.ReadTimeout):
        ask(server, spoken(), timeout=0.5)
    assert endless.begun.is_set() and endless.ended.wait(5)


def test_who_leaves_before_the_decoding_begins_is_not_decoded(server: Running, endless: Endless) -> None:
    with ThreadPoolExecutor(20) as crowd:
        for answer in [crowd.submit(ask, server, spoken(), timeout=0.5) for _ in range(20)]:
            assert isinstance(answer.exception(), httpx.TimeoutException)
    end = time.monotonic() + 10
    while server.app.state.audio._pending and time.monotonic() < end:
        time.sleep(0.02)
    assert not server.app.state.audio._pending
    endless.begun.clear()
    time.sleep(0.1)
    assert not endless.begun.is_set()


def test_one_deadline_holds_from_the_first_byte_to_the_end_of_the_decoding(server_with: Any, endless: Endless) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": [audio_part(spoken())]}]}).encode()

    def slowly() -> Iterator[bytes]:
        for start in range(0, len(body), len(body) // 4 + 1):
            time.sleep(0.3)
            yield body[start : start + len(body) // 4 + 1]

    with server_with(deadline=2) as server:
        began = time.monotonic()
        answer = server.http().post("/v1/chat/completions", content=slowly())
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "deadline_exceeded"
        assert time.monotonic() - began < 3.1, "the time of the body counts"
        assert endless.ended.wait(5)


def test_the_deadline_holds_while_a_recording_is_cut(server_with: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transcription, "pieces_of", lambda clip: time.sleep(4) or [])  # type: ignore[func-returns-value]
    with server_with(deadline=1.0) as server:
        began = time.monotonic()
        answer = server.http().post("/v1/audio/transcriptions", files={"file": ("a.wav", spoken())})
        assert answer.status_code == 504 and time.monotonic() - began < 3


def test_only_so_many_wait_for_the_decoders(server_with: Any, endless: Endless) -> None:
    with server_with(queue=2) as server, ThreadPoolExecutor(6) as crowd:
        answers = [crowd.submit(ask, server, spoken(), timeout=3) for _ in range(6)]
        statuses = [answer.result().status_code for answer in answers if answer.exception() is None]
    assert statuses == [429] * 4


@pytest.mark.skipif(not hasattr(os, "setpriority"), reason="no priorities on this system")
def test_the_model_comes_before_the_decoders() -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    with ThreadPoolExecutor(1, initializer=_take_lowest_priority) as decoders:
        assert decoders.submit(niceness).result() == 19
    assert niceness() < 19


# --- remote audio ---------------------------------------------------------------------------------------------


def fetch(url: str, seconds: float = 5.0, most_bytes: int = 10_000) -> tuple[bytes | ApiError, float]:
    """What comes back, and after how many seconds."""

    async def timed() -> tuple[bytes | ApiError, float]:
        began = time.monotonic()
        try:
            result: bytes | ApiError = await remote_audio.fetch(url, most_bytes=most_bytes, end=began + seconds)
        except ApiError as error:
            result = error
        return result, time.monotonic() - began

    return asyncio.run(timed())


@pytest.mark.parametrize("encoding", ["gzip", "gzip, gzip", "br", "identity"])
def test_compressed_bodies_are_refused_unread(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    async def here(host: str, port: int) -> str:
        return "127.0.0.1"

    monkeypatch.setattr(remote_audio, "public_address", here)
    asked: list[bytes] = []
    body = b"sound" if encoding == "identity" else gzip.compress(gzip.compress(bytes(10_000_000)))
    with socket.create_server(("127.0.0.1", 0)) as door:

        def answer() -> None:
            caller, _ = door.accept()
            with caller:
                asked.append(caller.recv(4096))
                head = f"HTTP/1.1 200 OK\r\ncontent-encoding: {encoding}\r\ncontent-length: {len(body)}\r\n\r\n"
                caller.sendall(head.encode() + body)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        got, _ = fetch(f"http://bomb.example:{door.getsockname()[1]}/a.wav")
        thread.join(5)
    assert b"accept-encoding: identity\r\n" in asked[0].lower()
    if encoding == "identity":
        assert got == b"sound"
    else:
        assert isinstance(got, ApiError) and got.status == 400 and "compressed" in got.message


def test_a_slow_name_server_is_given_up_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **named: time.sleep(3) or [])
    got, seconds = fetch("http://slow.example/a.wav", seconds=0.5)
    assert isinstance(got, ApiError) and got.status == 504 and seconds < 1.5


# --- floods: the log and the metrics stay small -----------------------------------------------------------------


def counts(server: Running, status: int, **options: Any) -> float:
    text = server.http(**options).get("/metrics").text
    lines = [line for line in text.splitlines() if line.startswith("blsp_requests_total") and f'"{status}"' in line]
    return sum(float(line.split()[-1]) for line in lines)


def test_wrong_keys_by_the_thousand_get_429_and_one_line(server_with: Any, caplog: pytest.LogCaptureFixture) -> None:
    right = {"headers": {"authorization": "Bearer secret"}}
    with server_with(api_key=("secret",)) as server, caplog.at_level(logging.INFO, "blsp.serving"):
        with server.http(headers={"authorization": "Bearer guess"}) as http:
            statuses = [http.get("/v1/models").status_code for _ in range(60)]
        assert statuses[:20] == [401] * 20 and statuses[30:] == [429] * 30
        assert server.http(**right).get("/v1/models").status_code == 200
        assert counts(server, 401, **right) + counts(server, 429, **right) == 60
        lines = [line for line in caplog.messages if " 401, " in line]
        assert len(lines) == 1 and "models 401, invalid_api_key, 127.0.0.1" in lines[0] and "guess" not in caplog.text


def test_the_rate_limit_is_each_address_own(server_with: Any) -> None:
    with server_with(rate_limit=3) as server:
        answers = [server.http().get("/v1/models") for _ in range(5)]
        assert [answer.status_code for answer in answers] == [200] * 3 + [429] * 2
        assert answers[-1].json()["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 21
        assert server.http().get("/health").status_code == 200


def test_the_rate_comes_back_with_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    limit = RateLimit(60)
    assert [limit.wait("a") for _ in range(60)] == [0.0] * 60 and limit.wait("a") == 1.0 and limit.wait("b") == 0.0
    now[0] = 1.0
    assert limit.wait("a") == 0.0 and limit.wait("a") > 0
    assert RateLimit(0).wait("a") == 0.0


def test_a_flood_is_written_once_a_minute_with_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    quiet = Quiet()
    assert [quiet.count("401") for _ in range(1000)] == [1] + [0] * 999 and quiet.count("403") == 1
    now[0] = 161.0
    assert quiet.count("401") == 1000


def logged(caplog: pytest.LogCaptureFixture, beginning: str) -> bool:
    """Whether such a line is written within five seconds: the server's thread may be a step behind its answer."""
    end = time.monotonic() + 5
    while not (found := any(line.startswith(beginning) for line in caplog.messages)) and time.monotonic() < end:
        time.sleep(0.01)
    return found


def test_refusals_are_counted_and_logged_without_content(server_with: Any, caplog: pytest.LogCaptureFixture) -> None:
    # a server of its own: a 403 of another test within the last minute would keep this one out of the log
    with server_with() as server, caplog.at_level(logging.INFO, "blsp.serving"):
        before = {status: counts(server, status) for status in (400, 403)}
        server.http().post("/v1/chat/completions", json={"messages": [user("my secret")], "n": 2})
        assert counts(server, 400) == before[400] + 1
        server.http().get("/v1/models", headers={"host": "evil.example"})
        assert counts(server, 403) == before[403] + 1
        assert logged(caplog, "chat 400, unsupported_parameter, 127.0.0.1")
        assert logged(caplog, "models 403, foreign_host, 127.0.0.1")
    assert "secret" not in caplog.text


@pytest.mark.parametrize("route", ["transcriptions", "chat"])
def test_a_stream_that_breaks_off_is_counted_and_logged(
    server: Running, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    async def late(exchange: Exchange) -> Any:
        raise ApiError(504, "the request's deadline passed")
        yield

    def count() -> float:
        return (
            server.app.state.scheduler.metrics.registry.get_sample_value(
                "blsp_requests_total", {"route": route, "status": "504"}
            )
            or 0.0
        )

    monkeypatch.setattr(Exchange, "pieces", late)
    caplog.set_level("INFO", logger="blsp.serving")
    before = count()
    if route == "chat":
        answer = server.http().post("/v1/chat/completions", json={"messages": [user("hi")], "stream": True})
    else:
        answer = server.http().post(
            "/v1/audio/transcriptions", files={"file": ("a.wav", spoken())}, data={"stream": "true"}
        )
    assert answer.status_code == 200 and "deadline passed" in answer.text
    assert count() == before + 1
    assert logged(caplog, f"{route} 504")


def test_json_lines_hold_the_fields_of_a_request(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "blsp.serving"):
        assert ask(server, spoken()).status_code == 200
        server.http().post("/v1/chat/completions", json={"messages": []})
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records]
    answered = next(line for line in lines if line.get("status") == 200)
    assert answered["route"] == "chat" and answered["completion_tokens"] >= 1 and answered["seconds"] > 0
    assert answered["time"].endswith("+00:00") and answered["level"] == "info"
    assert any(line.get("status") == 400 and line["code"] == "invalid_value" for line in lines)


def test_questions_and_answers_are_logged_only_when_wanted(server_with: Any, caplog: pytest.LogCaptureFixture) -> None:
    messages = [{"role": "system", "content": "Be short."}, user("my secret", spoken())]
    for wanted in (False, True):
        caplog.clear()
        with server_with(log_content=wanted) as server, caplog.at_level(logging.INFO, "blsp.serving"):
            answer = server.http().post("/v1/chat/completions", json={"messages": messages, "max_tokens": 4}).json()
            server.http().post("/v1/audio/transcriptions", files={"file": ("a.wav", spoken())})
            assert logged(caplog, "chat 200") and logged(caplog, "transcriptions 200")
        lines = [json.loads(JsonLines().format(record)) for record in caplog.records]
        chat, transcript = (next(line for line in lines if line.get("route") == route)
                            for route in ("chat", "transcriptions"))  # fmt: skip
        assert ("my secret" in caplog.text) == wanted
        if wanted:
            assert chat["question"] == ["system: Be short.", "user: my secret [audio]"]
            assert chat["content"] == answer["choices"][0]["message"]["content"]
            assert transcript["question"] == ["user: [audio]"]
        else:
            assert not {"question", "content"} & {*chat, *transcript}
