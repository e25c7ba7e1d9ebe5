"""Attacks of one client: the cases of serve_robustness.py, each with its bound.

In:  a running server (`Target`). Out: figures of each case.
Try: `python -m benchmarks.serve_robustness --only text-1mb`
Flow: neighbours.py → **attacks.py** → serve_robustness.py; tests/serving/test_benchmarks.py runs them on a tiny model
"""

from __future__ import annotations

import io
import json
import socket
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import soundfile

from benchmarks.support.commands import COMMANDS
from benchmarks.support.hostile import CHAT, TRANSCRIBE, many_channels
from benchmarks.support.neighbours import (
    KEYED,
    KEYS,
    PATIENCE,
    SHORT,
    STORY,
    Case,
    Target,
    chat,
    clip,
    memory_watched,
    post,
    slowdown,
    text,
    watched,
)
from benchmarks.support.odd_hosts import odd_host
from benchmarks.support.serving import as_wav, recordings

REFUSED_S, SILENCE_S, WAIT_S, LATE_S = 0.05, 1.0, 3.0, 1.5  # bounds


def long_recording(seconds: float, kind: str = "WAV") -> bytes:
    """Recordings of people, one after another."""
    samples = np.concatenate([soundfile.read(io.BytesIO(wav), dtype="float32")[0] for wav in recordings(70)])
    samples = np.resize(samples, round(16_000 * seconds))
    if kind == "WAV":
        return as_wav(samples)
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", 16_000, 1, format="OGG", subtype="VORBIS") as sound:
        for second in np.split(samples, range(16_000, len(samples), 16_000)):  # libsndfile crashes on long blocks
            sound.write(second)
    return file.getvalue()


# --- what is refused at once --------------------------------------------------------------------------------------


def refused(*bodies: Any) -> Callable[[Target], dict[str, float]]:
    """Each body is refused with 400; the slowest body's median time."""

    def run(target: Target) -> dict[str, float]:
        contents = [json.dumps(body() if callable(body) else body).encode() for body in bodies]
        post(target, "attacker", {})
        with watched(target) as figures:
            answers = [[post(target, "attacker", content) for _ in range(target.times(5, 3))] for content in contents]
        figures["refused_s"] = round(max(statistics.median(seconds for _, seconds in each) for each in answers), 4)
        figures["not_refused"] = sum(status != 400 for each in answers for status, _ in each)
        return figures

    return run


MEGABYTE = "hello " * 170_000
BLIP, SAMPLE = as_wav(np.zeros(160, np.float32)), as_wav(np.zeros(1, np.float32))
CROWDS = (
    lambda: chat([text("hello")] * 5000),
    lambda: chat([clip(BLIP)] * 5000),
    lambda: chat([clip(SAMPLE)] * 20_000),
    lambda: chat([{"role": ("user", "assistant")[n % 2], "content": [clip(BLIP)]} for n in range(511)]),
    lambda: chat([{"role": ("user", "assistant")[n % 2], "content": "a"} for n in range(10_000)]),
)
ODDITIES = (  # fields and shapes that are refused before they cost anything
    lambda: chat("hi") | {"stop": ["a" * 100] * 100_000},
    lambda: chat("hi") | {"logit_bias": {str(number): 1 for number in range(100_000)}},
    lambda: chat("hi") | {"tools": [{"type": "function", "function": {"name": f"f{n}"}} for n in range(10_000)]},
    lambda: chat("hi") | {"response_format": {"type": "json_schema", "json_schema": nested(200)}},
    lambda: chat("hi") | {"messages": nested(400)},
    lambda: chat("hi") | {"prompt_cache_key": "k" * 1_000_000},
    lambda: chat("hi") | {"metadata": [0] * 2_000_000},
)


def nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return {"schema": value}


# --- long work for clients that leave -----------------------------------------------------------------------------


def beside(body: Callable[[Target], Any], seconds: float = 90.0) -> Callable[[Target], dict[str, float]]:
    """A request that the server works at; its client leaves after `seconds`. A neighbour asks a short question."""

    def run(target: Target) -> dict[str, float]:
        content = json.dumps(body(target)).encode()
        alone = sorted(post(target, "neighbour", chat(SHORT))[1] for _ in range(3))[1]
        with watched(target) as figures, ThreadPoolExecutor(1) as pool:
            wait = httpx.Timeout(PATIENCE, read=seconds * min(1.0, 0.2 + target.share))
            sent = pool.submit(post, target, "attacker", content, timeout=wait)
            time.sleep(1.0)
            asked = [post(target, "neighbour", chat(SHORT)) for _ in range(target.times(4, 2))]
            status, worked = sent.result()
        figures |= {"alone_s": round(alone, 2), "question_s": round(max(seconds for _, seconds in asked) - alone, 2)}
        figures |= {"unanswered": sum(each != 200 for each, _ in asked), "refused": int(status not in (0, 200))}
        figures["attack_s"] = round(worked, 1)
        return figures

    return run


def uploads(target: Target) -> dict[str, float]:
    """Files of many channels, whose clients leave at once."""
    file = many_channels(target.times(120, 20))
    request = httpx.Request("POST", f"{target.url}{TRANSCRIBE}", files={"file": ("a.ogg", file)})
    lines = [b"%s: %s\r\n" % (name, value) for name, value in request.headers.raw]
    head = f"POST {TRANSCRIBE} HTTP/1.1\r\nAuthorization: Bearer {KEYS['attacker']}\r\n".encode() + b"".join(lines)
    server = urlsplit(target.url)
    alone = sorted(post(target, "neighbour", chat(SHORT))[1] for _ in range(3))[1]
    with watched(target) as figures:
        for _ in range(target.times(44, 4)):
            with socket.create_connection((server.hostname, server.port), timeout=60) as connection:
                connection.sendall(head + b"\r\n" + request.read())
        asked = [post(target, "neighbour", chat(SHORT)) for _ in range(3)]
    figures |= {"alone_s": round(alone, 2), "question_s": round(max(seconds for _, seconds in asked) - alone, 2)}
    figures["unanswered"] = sum(status != 200 for status, _ in asked)
    return figures


# --- one deadline -------------------------------------------------------------------------------------------------

DEADLINE, REMOTE_DEADLINE = 6.0, 2.0


def deadline(target: Target) -> dict[str, float]:
    """Requests that would take longer than the deadline, first byte to last, and what the next one gets."""
    figures: dict[str, float] = {"slowdown": slowdown()}
    speech = json.dumps(chat([clip(long_recording(300))], tokens=512)).encode()
    figures["slow_body_s"] = dripped(target, json.dumps(chat(STORY, tokens=512)).encode(), DEADLINE - 1)
    figures["no_end_of_body_s"] = dripped(target, json.dumps(chat(STORY)).encode(), 10 * DEADLINE)
    figures["head_s"] = dripped(target, b"", 0.0)
    figures["speech_s"] = post(target, "attacker", speech)[1]
    began = time.monotonic()
    figures["next_refused"] = float(post(target, "neighbour", chat(SHORT))[0] != 200)
    figures["next_s"] = time.monotonic() - began
    files = {"file": ("a.ogg", long_recording(590, "OGG"))}
    with target.client("attacker") as client:
        began = time.monotonic()
        client.post(TRANSCRIBE, files=files)
        figures["compressed_s"] = time.monotonic() - began
    return {name: round(value, 2) for name, value in figures.items()}


def dripped(target: Target, body: bytes, seconds: float) -> float:
    """Seconds until the server ends a request whose body (or, without one, whose head) comes within `seconds`."""
    server = urlsplit(target.url)
    head = f"POST {CHAT} HTTP/1.1\r\nhost: {server.netloc}\r\nauthorization: Bearer {KEYS['attacker']}\r\n"
    began = time.monotonic()
    with socket.create_connection((server.hostname, server.port), timeout=PATIENCE) as connection, suppress(OSError):
        if not body:
            connection.sendall(head.encode())
            while not ended(connection):
                connection.sendall(b"x-more: 1\r\n")
        else:
            connection.sendall(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode())
            pieces = [body[at : at + 1 + len(body) // 20] for at in range(0, len(body), 1 + len(body) // 20)]
            for piece in pieces:
                connection.sendall(piece)
                if ended(connection, seconds / len(pieces)):
                    return time.monotonic() - began
            while connection.recv(65536):
                pass
    return time.monotonic() - began


def ended(connection: socket.socket, seconds: float = 0.2) -> bool:
    """Whether the server answers, or closes the connection, within these seconds."""
    connection.settimeout(seconds)
    try:
        connection.recv(65536)
        return True
    except TimeoutError:
        return False
    finally:
        connection.settimeout(PATIENCE)


def remote_audio(target: Target) -> dict[str, float]:
    """`audio_url` of a host that sends a compressed body, drips, or never ends, and of a name that is slow to find."""
    figures: dict[str, float] = {"slowdown": slowdown(), "not_refused": 0}
    with odd_host() as port, memory_watched(target, figures):
        for name in ("gzip", "endless", "dripping", "slow"):
            url = f"http://{name}.example:{port}/{name}"
            body = chat([{"type": "audio_url", "audio_url": {"url": url}}])
            status, figures[f"{name}_s"] = post(target, "attacker", body)
            figures["not_refused"] += status not in (400, 413, 504)  # on a busy machine all of them may be too late
    return {name: round(value, 2) for name, value in figures.items()}


# --- other clients' prompts, turns in the queue, floods -----------------------------------------------------------


def guess(target: Target) -> dict[str, float]:
    """The first token after a right guess of another key's prompt, against that after a wrong one.

    The fastest of several each: what else runs on the machine only adds to a time.
    """
    prompt = "The secret word of our house is number {}. " + "Nobody else knows what I am going to say. " * 30

    def asked(name: str, number: int) -> tuple[float, int]:
        with target.client(name) as client:
            began = time.monotonic()
            answer = client.post(CHAT, json=chat(prompt.format(number), tokens=1)).json()
            return time.monotonic() - began, answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    asked("attacker", 999)  # its own first one; the later ones begin with the same words
    right, wrong, own = [], [], []
    for number in range(target.times(6, 6)):
        asked("neighbour", number)
        right.append(asked("attacker", number))
        wrong.append(asked("attacker", 500 + number))
        own.append(asked("neighbour", number))
    reused = [[cached for _, cached in each] for each in (right, wrong)]
    right_s, wrong_s = (min(seconds for seconds, _ in each) for each in (right, wrong))
    return {
        "reused_by_right": max(reused[0]) - max(reused[1]),
        "own_not_reused": sum(not cached for _, cached in own),
        "right_s": round(right_s, 3),
        "wrong_s": round(wrong_s, 3),
        "wrong_over_right": round(wrong_s / right_s, 2),
        "own_again_s": round(min(seconds for seconds, _ in own), 3),
    }


def queue(target: Target) -> dict[str, float]:
    """One client's 60 requests, and another one's short one: how many of the 60 end before its first token."""
    ended_at: list[float] = []

    def ask(number: int) -> None:
        status, _ = post(target, "attacker", chat(STORY, tokens=16 + 3 * number) | {"temperature": 1.0})
        if status == 200:
            ended_at.append(time.monotonic())

    figures: dict[str, float] = {"slowdown": slowdown(), "alone_s": post(target, "neighbour", chat(SHORT, 1))[1]}
    with ThreadPoolExecutor(60) as pool:
        sent = [pool.submit(ask, number) for number in range(target.times(60, 20))]
        time.sleep(3.0)
        began = time.monotonic()
        status, seconds = post(target, "neighbour", chat(SHORT, tokens=1))
        others = sum(began < at < began + seconds for at in ended_at)
        [each.result() for each in sent]
    figures |= {"short_s": round(seconds, 2), "unanswered": float(status != 200), "waited_for": others}
    return {name: round(value, 2) for name, value in figures.items()}


def wrong_keys(target: Target) -> dict[str, float]:
    """Wrong keys by the thousand: their statuses, their lines in the log; the right key from the same address."""
    lines, began = len(target.log().splitlines()), time.monotonic()
    statuses = [post(target, f"wrong-{number}", chat(SHORT))[0] for number in range(target.times(1000, 40))]
    written = target.log().splitlines()[lines:]
    minutes = 1 + (time.monotonic() - began) / 60
    return {
        "taken_a_minute": round(sum(status == 401 for status in statuses) / minutes, 1),
        "other": sum(status not in (401, 429) for status in statuses),
        "right_refused": float(post(target, "neighbour", chat(SHORT))[0] != 200),
        "lines_a_minute": round(len([line for line in written if " 401" in line or " 429" in line]) / minutes, 1),
        "uncounted": len(statuses) - target.counted("chat", 401) - target.counted("chat", 429),
    }


def flood(target: Target) -> dict[str, float]:
    """More requests than --rate-limit allows from one address, and refusals: each is counted, none with its content."""
    secret = "a secret that nobody may read"
    refusal = post(target, "", chat(secret) | {"n": 5})[0]
    foreign = post(target, "", chat(secret), headers={"host": "evil.example"})[0]
    uncounted = {f"uncounted_{status}": 1 - target.counted("chat", status) for status in (refusal, foreign)}
    began = time.monotonic()
    statuses = [post(target, "", chat(SHORT, 1))[0] for _ in range(FLOOD)]
    minutes, log = 1 + (time.monotonic() - began) / 60, target.log()
    return {
        "refused": statuses.count(429),
        "taken_a_minute": round(statuses.count(200) / minutes, 1),
        **uncounted,
        "content_in_log": log.count(secret),
        "unlogged": float(bool(log)) * sum(f" {status}" not in log for status in (refusal, foreign)),
    }


RATE, FLOOD = 20, 40
NEIGHBOUR = {"silence_s": SILENCE_S, "neighbour_failed": 0}
WAITING = NEIGHBOUR | {"question_s": WAIT_S, "unanswered": 0}
WORKED = WAITING | {"refused": 0}
CASES = (
    Case("text-1mb", refused(chat(MEGABYTE), chat(MEGABYTE * 3)),
         NEIGHBOUR | {"refused_s": REFUSED_S, "not_refused": 0, "memory_mb": 64}),
    Case("crowds", refused(*CROWDS), NEIGHBOUR | {"refused_s": 10 * REFUSED_S, "not_refused": 0, "memory_mb": 256}),
    Case("oddities", refused(*ODDITIES), NEIGHBOUR | {"refused_s": 10 * REFUSED_S, "not_refused": 0, "memory_mb": 256}),
    Case("speech-300s", beside(lambda _: chat([clip(long_recording(300))])), WORKED | {"memory_mb": 2048}),
    Case("speech-590s", beside(lambda _: chat([clip(long_recording(590, "OGG"))])), WORKED | {"memory_mb": 4096}),
    Case("long-prompt", beside(lambda target: chat("word " * target.times(7800))), WORKED | {"memory_mb": 2048}),
    Case("uploads", uploads, WAITING | {"memory_mb": 512}),
    Case("guess", guess, {"reused_by_right": 0, "own_not_reused": 0, "wrong_over_right": 1.5}),
    Case("queue-60", queue, {"waited_for": 2, "unanswered": 0}),
    Case("wrong-keys", wrong_keys,
         {"taken_a_minute": 21, "lines_a_minute": 2} | dict.fromkeys(("other", "right_refused", "uncounted"), 0)),
    Case("deadline", deadline,
         {f"{name}_s": DEADLINE + LATE_S for name in ("slow_body", "no_end_of_body", "head", "speech", "compressed")}
         | {"next_refused": 0}, KEYED | {"deadline": DEADLINE, "max_audio_seconds": 600.0}),
    Case("remote-audio", remote_audio,
         {"not_refused": 0, "memory_mb": 256}
         | dict.fromkeys(("gzip_s", "endless_s", "dripping_s", "slow_s"), REMOTE_DEADLINE + LATE_S),
         KEYED | {"deadline": REMOTE_DEADLINE, "allow_remote_audio": True}),
    Case("flood", flood,
         {"taken_a_minute": RATE}
         | dict.fromkeys(("uncounted_400", "uncounted_403", "content_in_log", "unlogged"), 0), {"rate_limit": RATE}),
    *COMMANDS,
)  # fmt: skip
