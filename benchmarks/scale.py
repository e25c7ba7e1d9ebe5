"""Time and memory for opening and reading a manifest of ten million rows, and a feature cache of any size.

In:  synthetic manifests and cache entries, written under a temporary folder (`--folder`: which disk).
Out: one JSON object on the last line: seconds, rows a second and anonymous memory by number of rows.
Try: `python -m benchmarks.scale --most 1000000` (the default, ten million, takes some minutes and 2 GB of disk)
Flow: benchmarks/ — `make bench` gathers it into results/bench.json.

Every size runs in a process of its own, which checks that the ids are unique, reads rows in order and at random, and
reports its anonymous memory (RssAnon: what the system cannot take back; file pages it can). `plan` is step 1's:
prompts sorted by length, equal ones found. Linear cost shows as equal rows a second, flat memory as equal megabytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from blsp.continuation.prompt_plan import write_plan
from blsp.continuation.requests import PlannedPrompt, PromptSpec, prompt_digest
from blsp.data.manifest import Manifest
from blsp.features.cache import FeatureCache

SIZES = (10**3, 10**4, 10**5, 10**6, 10**7)
IN_ORDER = 10**6  # rows read in order at most; the plan reads them all
SAMPLED = 20_000  # rows read at random
FRAMES, WIDTH = 100, 64  # of a cache entry: 12.8 kB, a tenth of a real one
SPEC = PromptSpec("continue", "Continue the text.", "instruction-first")
ENTRIES = (10**3, 10**4, 10**5)


def memory_mb() -> float:
    """Anonymous resident memory of this process (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def write_rows(path: Path, count: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            text = f"This is what was said in clip {number // 2}."  # every text twice
            file.write(f'{{"id": "clip-{number:09d}", "audio": "a/{number}.flac", "text": "{text}"}}\n')


def manifest_costs(folder: str, count: int) -> dict[str, Any]:
    """Index, check, read and plan `count` rows; run in a fresh process."""
    path = Path(folder) / f"rows-{count}.jsonl"
    write_rows(path, count)
    index, rows = timed(lambda: Manifest(path))
    reopen, rows = timed(lambda: Manifest(path))
    in_order, read = timed(lambda: sum(1 for _ in islice(rows, IN_ORDER)))
    draw = np.random.default_rng(0).integers(0, count, min(count, SAMPLED))
    at_random, _ = timed(lambda: [rows[int(place)].text for place in draw])
    planning, plan = timed(lambda: write_plan(Path(folder) / f"plan-{count}.sqlite", planned_prompts(rows), 64))
    assert plan.prompts == (count + 1) // 2, "every text stands twice and is asked once"
    path.unlink()
    return {
        "rows": count,
        "index_s": round(index, 2),
        "reopen_s": round(reopen, 3),
        "rows_per_second": round(read / in_order),
        "rows_per_second_at_random": round(len(draw) / at_random),
        "plan_rows_per_second": round(count / planning),
        "rss_anon_mb": round(memory_mb(), 1),
    }


def planned_prompts(rows: Manifest) -> Iterator[PlannedPrompt]:
    for number, row in enumerate(rows):
        yield PlannedPrompt(number, SPEC, tokens=1 + len(row.text) // 4, digest=prompt_digest(row.text))


def cache_costs(folder: str, count: int) -> dict[str, Any]:
    """Write and read `count` features; run in a fresh process."""
    root = Path(folder) / f"features-{count}"
    keys = [hashlib.blake2b(number.to_bytes(8), digest_size=16).digest() for number in range(count)]
    states = np.ones((FRAMES, WIDTH), dtype=np.float16)

    def fill() -> None:
        with FeatureCache(root, "scale").writer(width=WIDTH) as writer:
            for key in keys:
                writer.add(key, states)

    writing, _ = timed(fill)
    opening, cache = timed(lambda: FeatureCache(root, "scale"))
    reading, _ = timed(lambda: sum(cache.get(key).shape[0] for key in keys))
    size = sum(each.stat().st_size for each in root.rglob("*") if each.is_file())
    return {
        "clips": count,
        "written_mb": round(size / 1e6),
        "writes_per_second": round(count / writing),
        "open_s": round(opening, 3),
        "reads_per_second": round(count / reading),
        "rss_anon_mb": round(memory_mb(), 1),
    }


def timed(task: Callable[[], Any]) -> tuple[float, Any]:
    began = time.monotonic()
    result = task()
    return time.monotonic() - began, result


def alone(task: Callable[[str, int], dict[str, Any]], folder: str, count: int) -> dict[str, Any]:
    """`task` in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        figures = pool.apply(task, (folder, count))
    print(json.dumps(figures), flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=SIZES[-1], help="rows of the largest manifest")
    parser.add_argument("--folder", type=Path, default=None, help="where to write (left out: the temporary folder)")
    options = parser.parse_args()
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        manifests = [alone(manifest_costs, folder, count) for count in SIZES if count <= options.most]
        caches = [alone(cache_costs, folder, count) for count in ENTRIES if count <= options.most]
    figures = {
        "rss_growth_mb": round(manifests[-1]["rss_anon_mb"] - manifests[0]["rss_anon_mb"], 1),
        "rows_per_second": manifests[-1]["rows_per_second"],
        "manifests": manifests,
        "caches": caches,
        "cores": os.cpu_count(),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
