"""Prompts per second of `blsp continue --engine-url`, by the number of open requests.

In:  a server double that answers each request after 0.3 s.
Out: one JSON object on the last line: for each number in flight prompts a second and prompts a CPU second.
Try: `python -m benchmarks.continue_url --in-flight 64 512 2048`
Flow: benchmarks/ — `make bench` gathers it into results/bench.json.

A server of 0.3 s allows in_flight / 0.3 prompts a second; the client's own processor time sets the other limit. The
opening of the connections counts too. `per_cpu_second` hardly depends on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

from benchmarks.support.slow_server import slow_server
from blsp.continuation.engines import Prompt
from blsp.continuation.openai_engine import OpenAIEngine
from blsp.llm.decoding import Decoding

ROUNDS = 4  # prompts for each place in flight


def measure(url: str, in_flight: int, seconds: float) -> dict[str, Any]:
    """Prompts a second, with `in_flight` of them at the server at a time."""
    count = max(ROUNDS * in_flight, 1024)
    prompts = ([Prompt(key, "Continue:", "instruction-first", f"clip {key}")] for key in range(count))
    engine = OpenAIEngine((url,), "double", Decoding(), in_flight=in_flight, timeout=60.0)
    began, cpu = time.monotonic(), time.process_time()
    answered = sum(len(answers) for answers in engine.write(prompts))
    wall, cpu = time.monotonic() - began, time.process_time() - cpu
    assert answered == count, f"{count - answered} prompts without an answer"
    return {
        "in_flight": in_flight,
        "prompts": count,
        "per_second": round(count / wall, 1),
        "per_cpu_second": round(count / cpu, 1),
        "server_allows": round(in_flight / seconds),
        "load": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--in-flight", type=int, nargs="+", default=[64, 512, 2048])
    parser.add_argument("--seconds", type=float, default=0.3, help="that the server takes for an answer")
    options = parser.parse_args()
    with slow_server(options.seconds) as url:
        runs = [measure(url, in_flight, options.seconds) for in_flight in options.in_flight]
    figures = {
        "seconds": options.seconds,
        "runs": runs,
        "last_over_first": round(runs[-1]["per_second"] / runs[0]["per_second"], 2),
        "cores": os.cpu_count(),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
