"""The end of the server: SIGTERM, also under load."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from serving.conftest import spoken, user

SERVE = """
import sys
from pathlib import Path
from support.tiny_models import tiny_blsp
from blsp.inference.listener import Listener
from blsp.serving import server as process
from blsp.settings import ServeSettings
process.load = lambda *args, **named: Listener(*tiny_blsp(Path(sys.argv[1]), family="llama", adapter="grounded"))
process.serve(ServeSettings(port=0))
"""


def test_sigterm_finishes_what_was_begun_and_leaves_with_0(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", SERVE, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    url = process.stdout.readline().split()[-1]
    while httpx.get(f"{url}/health").status_code != 200:
        time.sleep(0.05)
    with httpx.stream(
        "POST", f"{url}/v1/chat/completions", json={"messages": [user("hello")], "stream": True}, timeout=60
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"]
    assert process.wait(30) == 0


def test_a_server_under_load_answers_all_that_it_accepted_and_takes_nothing_more(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    url = process.stdout.readline().split()[-1]
    while httpx.get(f"{url}/health").status_code != 200:
        time.sleep(0.05)

    def ask(number: int) -> str:
        """The finish reason: of every third a stream, else a whole answer."""
        body = {"messages": [user(spoken(number))], "max_tokens": 64, "stream": number % 3 == 0}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        if not body["stream"]:
            return str(answer.json()["choices"][0]["finish_reason"])
        *_, last, done = [line for line in answer.text.splitlines() if line]
        assert done == "data: [DONE]"
        return str(json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"])

    with ThreadPoolExecutor(24) as crowd:
        answers = [crowd.submit(ask, number) for number in range(24)]
        accepted = 0.0
        while accepted < 24:  # running or waiting, or answered
            time.sleep(0.02)
            text = httpx.get(f"{url}/metrics").text
            rows = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
            names = ("blsp_requests_waiting", "blsp_requests_running", "blsp_answer_seconds_count")
            accepted = sum(float(rows[name]) for name in names) - 2  # the two of the warm-up
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/health")
        assert {answer.result() for answer in answers} <= {"stop", "length"}
    assert process.wait(30) == 0
