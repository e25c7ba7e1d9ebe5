"""Whether training keeps up where storage is slow to answer.

In:  the embedded default; the recordings of examples/speech, eight times, in a temporary folder.
Out: one JSON object on the last line: training samples a second from local files and from storage that takes 20 ms for
     each open and each read, their ratio; and rows a second that the readers alone reach, by their number.
Try: `python -m benchmarks.loading --rounds 3` (some minutes on two quiet cores)
Flow: benchmarks/ — `make bench` gathers it into results/bench.json.

The slow storage is a wrapper of what the loader calls: a row of the manifest is one read, a clip is an open and a read,
its features in a cache are a read. Local and slow steps take turns, over the same rows; medians are reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.support.serving import SPEECH
from blsp.data.manifest import Manifest
from blsp.distributed import find_runtime, keep_freed_memory
from blsp.features.cache import FeatureCache
from blsp.settings import TrainSettings
from blsp.training import examples, loop
from blsp.training.batches import read_ahead, step_examples
from blsp.training.optimiser import begin_or_resume
from blsp.training.run import Run, prepare

ENCODER, LLM = "embedded:whisper-tiny.en", "embedded:smollm2-135m-instruct"
COPIES = 8  # of the recordings, as rows
DELAY = 0.02  # seconds that an open or a read takes
BATCH = 16
READERS = (1, 8, 32)
ROWS = 256  # of a measurement of the readers alone


def write_rows(folder: Path) -> Path:
    """A continuations file over the example recordings."""
    lines = [json.loads(line) for line in (SPEECH / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    answer = {"behaviour": "continue", "instruction": "Continue the text.", "order": "instruction-first"}
    answer |= {"continuation": "And then we went home by the river, as we always did in those days.", "finish": "stop"}
    path = folder / "continued.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for copy in range(COPIES):
            for line in lines:
                row = line | answer | {"id": f"{line['id']}-{copy}", "audio": str(SPEECH / line["audio"])}
                file.write(json.dumps(row) + "\n")
    return path


@contextmanager
def slow_storage(seconds: float) -> Iterator[None]:
    """Every open and every read of the loader takes so many seconds longer."""

    def slowed(operations: int, call: Callable[..., Any]) -> Callable[..., Any]:
        def wait_and_call(*args: Any, **options: Any) -> Any:
            time.sleep(operations * seconds)
            return call(*args, **options)

        return wait_and_call

    with (
        patch.object(examples, "load_audio", slowed(2, examples.load_audio)),
        patch.object(FeatureCache, "get", slowed(1, FeatureCache.get)),
        patch.object(Manifest, "__getitem__", slowed(1, Manifest.__getitem__)),
    ):
        yield


def train(run: Run, steps: int) -> float:
    """Samples a second of so many steps, the wait for the first one included."""
    state, began = begin_or_resume(run), time.monotonic()
    with closing(step_examples(run, 0)) as read:
        for number, batches in islice(read, steps):
            loop.learn(run, state, number, batches)
    return state.progress.samples / (time.monotonic() - began)


def read_rows(run: Run, readers: int, count: int = ROWS) -> float:
    """Rows a second that so many readers reach while nothing is learnt."""
    rows = [run.dataset.rows[number % len(run.dataset.rows)] for number in range(count)]
    steps = (((), rows[begin : begin + BATCH]) for begin in range(0, count, BATCH))
    began = time.monotonic()
    for _ in read_ahead(steps, lambda row: run.reader.example(row, 0), readers):
        pass
    return count / (time.monotonic() - began)


def measure(run: Run, rounds: int, steps: int) -> dict[str, Any]:
    """Local and slow storage in turn."""
    train(run, 1)  # the warm-up
    speeds: dict[str, list[float]] = {"local": [], "slow": []}
    for _ in range(rounds):
        for name, delay in (("local", 0.0), ("slow", DELAY)):
            with slow_storage(delay):
                speeds[name].append(train(run, steps))
    local, slow = (statistics.median(each) for each in speeds.values())
    rows = {"local": read_rows(run, run.settings.readers)}
    with slow_storage(DELAY):
        rows |= {f"slow_{readers}_readers": read_rows(run, readers) for readers in READERS}
    return {
        "slow_over_local": round(slow / local, 3),
        "samples_per_second": {name: [round(speed, 2) for speed in each] for name, each in speeds.items()},
        "rows_per_second": {name: round(speed, 1) for name, speed in rows.items()},
        "readers": run.settings.readers,
    }


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help=f"of {BATCH} samples, a round")
    parser.add_argument("--audio-model", default=ENCODER)
    parser.add_argument("--llm", default=LLM)
    options = parser.parse_args()
    runtime = find_runtime("cpu", "float32")
    figures = {}
    with tempfile.TemporaryDirectory() as name:
        data = write_rows(Path(name))
        for source, cache in (("cached", Path(name, "features")), ("online", None)):
            settings = TrainSettings(
                data=(str(data),),
                out=Path(name, source),
                audio_model=options.audio_model,
                llm=options.llm,
                adapter="conv",
                loss="ce",
                cache=cache,
                batch_size=BATCH,
                held_out=0,
            )
            figures[source] = measure(prepare(settings, runtime), options.rounds, options.steps)
    print(json.dumps(figures | {"delay": DELAY, "rounds": options.rounds, "batch_size": BATCH}))


if __name__ == "__main__":
    main()
