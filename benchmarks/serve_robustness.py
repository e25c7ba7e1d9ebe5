"""Benchmark of the server under bad requests: it must not fail, must answer the next good request, and no client may
hold up another one.

In:  an adapter folder (default: the shipped one). Out: one JSON object on the last line; exit code 1 on a defect, or
     where a figure is beyond its bound. Growth of memory and open files over all requests is for a person to judge.
Try: `python -m benchmarks.serve_robustness --share 0.05` (a twentieth); `make bench-serve` runs it whole.
Flow: support/attacks.py (cases), support/hostile.py (requests), support/serving.py (server) →
      **serve_robustness.py**; schemathesis makes more requests from the OpenAPI document.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, groupby
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from tqdm import tqdm

from benchmarks.support.attacks import CASES
from benchmarks.support.hostile import Attempt, attempts
from benchmarks.support.neighbours import Target
from benchmarks.support.serving import Server, recordings, serving, spoken_question
from blsp.settings import DEFAULT_MODEL

REQUESTS = "requests"  # beside the cases' names: the bad requests of hostile.py and of schemathesis
ATTEMPTS = 1000
BY_SCHEMATHESIS = 40  # examples per operation
EVERY = 25  # attempts between two good requests
LIMITS = ["--max-upload-mb", "2", "--max-audio-seconds", "120", "--max-new-tokens", "8", "--deadline", "60"]
LIMITS += ["--prefix-cache", "2"]  # a small cache, so that its growth does not hide a leak
BY_DESIGN = {503, 504}


def attack(url: str, wav: bytes, count: int, seed: int = 0) -> dict[str, Any]:
    """`count` bad requests; after every `EVERY` of them a good one, whose answer must not change."""
    statuses: Counter[int] = Counter()
    defects: list[str] = []
    good = {"messages": spoken_question(wav, "Please repeat the following words:"), "max_tokens": 8}
    answers = set()
    slowest = 0.0
    silent: list[socket.socket] = []  # clients that stay connected and send nothing more
    with httpx.Client(base_url=url, timeout=120) as client:
        for number, attempt in zip(tqdm(range(count), unit="request"), attempts(wav, seed), strict=False):
            if attempt.linger:
                silent.append(begin(url, attempt))
                status = 0
            else:
                began = time.monotonic()
                try:
                    status = send(client, url, attempt)
                except httpx.TimeoutException:
                    status = 599
                    defects.append(f"{number}: no answer to {attempt.path} {str(attempt.upload or attempt.body)[:200]}")
                slowest = max(slowest, time.monotonic() - began)
                statuses[status] += 1
            if 500 <= status < 599 and status not in BY_DESIGN:
                defects.append(f"{number}: {status} for {attempt.path} {attempt.body[:200]!r}")
            if number % EVERY == EVERY - 1 or number == count - 1:
                answer = client.post("/v1/chat/completions", json=good)
                choices = answer.json().get("choices") or [{"message": {"content": answer.text}}]
                answers.add((answer.status_code, choices[0]["message"]["content"]))
    for connection in silent:
        status = status_of(connection)
        statuses[status] += 1
        if 500 <= status < 599 and status not in BY_DESIGN:
            defects.append(f"a silent client got {status}")
    if len(answers) != 1 or next(iter(answers))[0] != 200:
        defects.append(f"the good request was answered in more than one way: {sorted(answers)}")
    by_status = {str(status): number for status, number in sorted(statuses.items())}
    return {
        "attempts": count,
        "by_status": by_status,
        "slowest_s": round(slowest, 1),
        "good_requests": count // EVERY,
        "defects": defects,
    }


def send(client: httpx.Client, url: str, attempt: Attempt) -> int:
    """The status; 0 where the client left on purpose."""
    if attempt.leave is not None:
        return vanish(url, attempt)
    if attempt.upload is not None:
        return client.post(attempt.path, files={"file": attempt.upload}, data=attempt.form).status_code
    return client.post(attempt.path, content=attempt.body, headers={"content-type": "application/json"}).status_code


def begin(url: str, attempt: Attempt) -> socket.socket:
    """A connection on which only the beginning of a request was sent."""
    server = urlsplit(url)
    head = f"POST {attempt.path} HTTP/1.1\r\nhost: {server.netloc}\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(attempt.body)}\r\n\r\n"
    connection = socket.create_connection((server.hostname, server.port), timeout=120)
    connection.sendall(head.encode() + attempt.body[: attempt.leave])
    return connection


def vanish(url: str, attempt: Attempt) -> int:
    """Send the beginning of a request and close the connection."""
    begin(url, attempt).close()
    return 0


def status_of(connection: socket.socket) -> int:
    """The status that a silent client gets in the end; 0: none, the connection was closed."""
    with connection:
        line = connection.makefile("rb").readline().split()
    return int(line[1]) if len(line) > 1 else 0


def by_schemathesis(url: str, examples: int) -> bool:
    """True if schemathesis found no server error in the routes of the OpenAPI document."""
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json", "--no-color"]
    command += ["--checks", "not_a_server_error", "--max-examples", str(examples), "--no-shrink", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-1000:])
    return done.returncode == 0


def open_files(server: Server) -> int:
    return len(list(Path(f"/proc/{server.process}/fd").iterdir()))


@contextmanager
def target_of(settings: Mapping[str, Any] | None, model: str, share: float) -> Iterator[Target]:
    """A server with these settings (None: no server) while the block runs."""
    if settings is None:
        yield Target("", lambda: 0.0, share=share)
        return
    flags = [
        [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
        for name, value in settings.items()
        if name != "api_key"
    ]
    with serving(["--model", model, *chain(*flags)], settings.get("api_key", ())) as server:
        yield Target(server.url, server.memory_mb, server.log.read_text, share)


def beside_neighbours(model: str, share: float, only: Sequence[str]) -> dict[str, Any]:
    """The figures of each case (attacks.py), those with equal settings on one server; and what is beyond its bound."""
    cases = [case for case in CASES if not only or case.name in only]
    figures: dict[str, Any] = {}
    beyond: list[str] = []
    for settings, group in groupby(cases, key=lambda case: case.settings):
        with target_of(settings, model, share) as target:
            for case in group:
                figures[case.name] = case.run(target)
                beyond += case.beyond(figures[case.name])
                print(case.name, json.dumps(figures[case.name]), flush=True)
    return {"cases": figures, "beyond": beyond}


def made_requests(model: str, share: float) -> dict[str, Any]:
    """The figures of the bad requests of hostile.py, then of schemathesis, on a server of their own."""
    wav = max(recordings(8), key=len)
    with serving(["--model", model, *LIMITS]) as server:
        attack(server.url, wav, 100, seed=1)  # memory is compared after one round of all kinds of requests
        before, files = server.memory_mb(), open_files(server)
        figures = attack(server.url, wav, round(ATTEMPTS * share))
        figures["memory_growth_mb"] = round(server.memory_mb() - before, 1)
        figures["open_files_growth"] = open_files(server) - files
        figures["schemathesis_ok"] = by_schemathesis(server.url, max(5, round(BY_SCHEMATHESIS * share)))
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--share", type=float, default=1.0, help="the part of the requests to send")
    names = [REQUESTS, *(case.name for case in CASES)]
    parser.add_argument("--only", nargs="*", default=[], choices=names, help="these cases alone")
    options = parser.parse_args()
    figures = beside_neighbours(options.model, options.share, options.only)
    if not options.only or REQUESTS in options.only:
        figures |= made_requests(options.model, options.share)
    print(json.dumps(figures))
    return bool(figures["beyond"] or figures.get("defects")) or not figures.get("schemathesis_ok", True)


if __name__ == "__main__":
    sys.exit(main())
