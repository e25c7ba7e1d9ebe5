"""What a run shows of itself: a bar, lines of metrics.jsonl with the probes, the picture of its curves.

In:  the run and its state after a step. Out: ``metrics.jsonl``, ``curves.png``, a progress bar on stderr.
Try: `report(run, state, bar)`
Flow: training/loop.py after every step -> **reporting.py** -> the run folder
"""

from __future__ import annotations

import json
import sys
import time

from tqdm import tqdm

from blsp.model.distributed import Place
from blsp.training import probes, step
from blsp.training.curves import draw
from blsp.training.optimisation import State, learning_rate
from blsp.training.preparation import Run
from blsp.training.run_state import Progress, empty_window

PICTURE_SECONDS = 60  # at least, between two drawings of curves.png


def report(run: Run, state: State, bar: tqdm) -> None:
    """One line of metrics.jsonl every so many steps, with the probes every so many more."""
    now, settings = state.progress, run.settings
    last = now.step == run.steps
    bar.update()
    probing = now.step == 1 or now.step % settings.probe_every == 0 or last
    if not (probing or now.step % settings.log_every == 0):
        return
    state.progress = empty_window(now)
    row = {
        "step": now.step,
        "loss": now.window_loss / now.window_steps,
        "lr": learning_rate(settings, now.step, run.steps),
        "samples": now.samples,
        "audio_seconds": round(now.audio_seconds, 3),
        "seconds": round(now.seconds, 3),
        "padding": round(now.window_padding / max(1, now.window_positions), 4),
    }
    bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
    if probing and (run.place.rank == 0 or settings.shard_llm):  # a sharded LLM is run by all or by none
        row |= measure(run)
    if run.place.rank != 0:
        return
    if probing:
        bar.write(", ".join(f"{name} {value:.4g}" for name, value in row.items()), file=sys.stderr)
    with open(settings.out / "metrics.jsonl", "a", encoding="utf-8") as out:
        out.write(json.dumps(row) + "\n")
    if probing and time.monotonic() - state.drawn > PICTURE_SECONDS:
        state.drawn = time.monotonic()
        picture(run)


def measure(run: Run) -> dict[str, float]:
    """The probes on held-out and training clips."""
    found: dict[str, float] = {}
    with step.autocast(run.place):
        for probe in run.probes:
            found |= probes.measure(probe, run.llm, run.processor.tokenizer, run.settings.batch_tokens)
    return found


def progress_bar(run: Run, progress: Progress) -> tqdm:
    """Steps done and to do, with an estimate of the time left."""
    return tqdm(
        total=run.steps,
        initial=progress.step,
        desc=run.settings.out.name,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,
        disable=run.place.rank != 0,
    )


def picture(run: Run) -> None:
    """Draw curves.png from what metrics.jsonl holds."""
    if run.place.rank == 0:
        draw(run.settings.out / "metrics.jsonl", run.settings.out / "curves.png")


def say(place: Place, text: str) -> None:
    """Print once, however many processes there are."""
    if place.rank == 0:
        print(text)
