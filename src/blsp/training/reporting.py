"""Reports of a run: lines of metrics.jsonl with the probes, the curves, a progress bar.

In:  the run and its state after a step.
Out: ``metrics.jsonl``, ``curves.png``, a progress bar on stderr.
Try: `report(Reporter(run, state, trackers), bar)`
Flow: training/loop.py after every step -> **reporting.py** -> the run folder
"""

import itertools
import json
import math
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

from blsp.data.files import naming_full_disk, read_rows, write_atomically, write_text
from blsp.data.manifest import Manifest, write_manifest
from blsp.distributed import Runtime
from blsp.settings import TrainSettings
from blsp.training import probes, step, tracking
from blsp.training.optimiser import State, learning_rate
from blsp.training.run import Run
from blsp.training.run_state import Progress, as_flags, dump_flags, empty_window
from blsp.training.verdict import Verdict

CURVES_SECONDS = 60  # at least this long between two drawings of curves.png


class Reporter:
    """The run, the trackers, and the progress that speed is counted from: after the last line, or of the checkpoint."""

    def __init__(self, run: Run, state: State, trackers: tracking.Trackers) -> None:
        self.run, self.state, self.trackers = run, state, trackers
        self.last = state.progress
        self.weights = tracking.layer_weights(run.model.model.language_model) if run.objective.runs_llm else 0
        self.device_flops = tracking.product_flops(run.runtime) if self.weights else 0.0


def report(reporter: Reporter, bar: tqdm) -> None:
    """Write a line of metrics.jsonl every `--log-every` steps; every `--probe-every` steps with the probes."""
    run, state = reporter.run, reporter.state
    progress, settings = state.progress, run.settings
    bar.update()
    is_last = progress.step == run.steps
    probing = progress.step == 1 or progress.step % settings.probe_every == 0 or is_last
    if not (probing or progress.step % settings.log_every == 0):
        return
    state.progress = empty_window(progress)
    before, reporter.last = reporter.last, state.progress
    row = {
        "step": progress.step,
        "loss": progress.window_loss / progress.window_steps,
        "lr": learning_rate(settings, progress.step, run.steps),
        "samples": progress.samples,
        "audio_seconds": round(progress.audio_seconds, 3),
        "seconds": round(progress.seconds, 3),
        "padding": round(progress.window_padding / max(1, progress.window_positions), 4),
        "grad_norm": progress.window_norm / progress.window_steps,
        **tracking.speed(reporter.weights, before, progress, reporter.device_flops),
    }
    bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
    if probing and (run.runtime.rank == 0 or settings.shard_llm):  # all ranks run a sharded LLM, or none
        with step.autocast(run.runtime):
            for probe in run.probes:
                row |= probes.measure(
                    probe, run.prefixes, run.processor.tokenizer, settings.batch_tokens, run.objective.filler
                )
    if run.runtime.rank != 0:
        return
    if probing:
        bar.write(", ".join(f"{name} {value:.4g}" for name, value in row.items()), file=sys.stderr)
    path = settings.out / "metrics.jsonl"
    with naming_full_disk(path), open(path, "a", encoding="utf-8") as out:
        out.write(json.dumps(row) + "\n")
    reporter.trackers.log(row)
    if probing and time.monotonic() - state.drawn > CURVES_SECONDS:
        state.drawn = time.monotonic()
        draw_curves(run)


def progress_bar(run: Run, progress: Progress) -> tqdm:
    """Steps done and to do, with an estimate of the time left."""
    return tqdm(
        total=run.steps,
        initial=progress.step,
        desc=run.settings.out.name,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,
        disable=run.runtime.rank != 0,
    )


def draw_curves(run: Run) -> None:
    """Draw curves.png from metrics.jsonl; only the first rank does."""
    if run.runtime.rank == 0:
        out = run.settings.out
        draw(out / "metrics.jsonl", out / "curves.png", str(Verdict.read(out) or ""))


def print_once(runtime: Runtime, text: str) -> None:
    """Print in the first rank only."""
    if runtime.rank == 0:
        print(text)


def finish_stages(settings: TrainSettings) -> None:
    """Write the last stage's adapter and held-out clips, all stages' metrics and one picture into the run folder."""
    last = settings.stages[-1].out
    with write_atomically(settings.out / "adapter") as partial:
        shutil.copytree(last / "adapter", partial)
    if (last / "heldout.jsonl").exists():  # an older version wrote none
        write_manifest(settings.out / "heldout.jsonl", Manifest(last / "heldout.jsonl"), relative_to=settings.out)
    lines, steps_before = [], 0
    for stage in settings.stages:
        rows = [row for _, row in read_rows(stage.out / "metrics.jsonl")]
        for row in rows:
            lines.append(json.dumps(row | {"step": row["step"] + steps_before, "stage": stage.out.name}) + "\n")
        steps_before += rows[-1]["step"]
    write_text(settings.out / "metrics.jsonl", "".join(lines), durable=True)
    found = Verdict.read(last)
    if found is not None:  # as above
        found.write(settings.out)
    draw(settings.out / "metrics.jsonl", settings.out / "curves.png", str(found or ""))
    stages = []
    for stage in settings.stages:
        flags = as_flags(stage)
        del flags["out"]
        stages.append({"name": stage.out.name} | flags)
    write_text(settings.out / "settings.yaml", dump_flags({"out": str(settings.out), "stages": stages}), durable=True)
    print(f"{settings.out}: all {len(stages)} stages are finished; the adapter is {settings.out / 'adapter'}")
    if found is not None:
        print(found)


# --- the picture ------------------------------------------------------------------------------------------

# Okabe and Ito's palette, for colour-blind readers; line styles for print
INK, BLUE, ORANGE, GREY = "#000000", "#0072B2", "#D55E00", "#999999"
PROBES = {
    "kl": ("divergence from the text route, nats per token", "lower is better"),
    "top1": ("top-1 agreement with the text route", "higher is better"),
    "wer": ("word error rate of the read-out or of the nearest tokens", "lower is better"),
    "tokens": ("spoken tokens found at their place", "higher is better"),
}
SMOOTHING = 0.9  # a running mean over about ten logged points
Row = dict[str, Any]  # a line of metrics.jsonl


def draw(metrics: Path, picture: Path, verdict: str = "") -> None:
    """Draw the loss and each probe, two panels in a row: held-out and training clips, with own and exchanged speech.

    verdict: the title.
    """
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    if not rows:
        return
    names = [name for name in PROBES if any(f"{part}_{name}" in row for row in rows for part in ("train", "held_out"))]
    lines = math.ceil((1 + len(names)) / 2)
    figure = Figure(figsize=(11, 0.9 + 3.7 * lines), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes: list[Any] = list(figure.subplots(lines, 2, squeeze=False, sharex=True).flat)
    figure.suptitle("\n".join(textwrap.wrap(verdict, 130)), fontsize=10)
    _loss(axes[0], rows)
    for axis, name in zip(axes[1:], names, strict=False):
        _probe(axis, rows, name)
    for axis in axes[: 1 + len(names)]:
        _stages(axis, rows)
    for axis in axes[1 + len(names) :]:
        axis.axis("off")
    with write_atomically(picture) as partial:
        figure.savefig(partial, format="png")


def by_stage(rows: list[Row]) -> list[list[Row]]:
    """The rows of each stage; a run without stages is one group."""
    return [list(group) for _, group in itertools.groupby(rows, key=lambda row: row.get("stage"))]


def smoothed(values: Sequence[float]) -> list[float]:
    """Running means; their weights add up to 1 from the first value on, so that the start is not biased."""
    means, level, weight = [], 0.0, 0.0
    for value in values:
        level = SMOOTHING * level + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        means.append(level / weight)
    return means


def _loss(axis: Axes, rows: list[Row]) -> None:
    for number, stage in enumerate(by_stage(rows)):
        steps, losses = [row["step"] for row in stage], [row["loss"] for row in stage]
        axis.plot(steps, losses, color=GREY, linewidth=0.8, label="logged" if not number else None)
        axis.plot(steps, smoothed(losses), color=INK, linewidth=1.8, label="smoothed" if not number else None)
    losses = [row["loss"] for row in rows]
    if min(losses) > 0 and max(losses) > 20 * min(losses):  # the losses of several stages have several scales
        axis.set_yscale("log")
    axis.set(title="training loss", ylabel="nats")
    rate = axis.twinx()
    rate.plot([row["step"] for row in rows], [row["lr"] for row in rows], color=BLUE, linewidth=0.8, linestyle=":")
    rate.set_ylabel("learning rate (dotted)", color=BLUE)
    _finish(axis)


def _probe(axis: Axes, rows: list[Row], name: str) -> None:
    title, remark = PROBES[name]
    styles = [
        (f"held_out_{name}", "held-out clips", ORANGE, "-"),
        (f"train_{name}", "training clips", BLUE, "-"),
        (f"held_out_{name}_shuffled", "held-out, clips exchanged", ORANGE, ":"),
        (f"train_{name}_shuffled", "training, clips exchanged", BLUE, ":"),
    ]
    for key, label, colour, line in styles:
        shown: str | None = label
        for stage in by_stage(rows):
            points = [(row["step"], row[key]) for row in stage if key in row]
            if points:
                axis.plot(*zip(*points, strict=True), color=colour, linestyle=line, marker="o", ms=3, label=shown)
                shown = None  # one entry of the legend for all stages
    axis.set(title=title, ylabel=remark)
    _finish(axis)


def _stages(axis: Axes, rows: list[Row]) -> None:
    """A vertical line at the start of each stage but the first, and the names of the stages at the top."""
    stages = by_stage(rows)
    if len(stages) < 2:
        return
    begin = 0
    for stage in stages:
        if begin:
            axis.axvline(begin, color=GREY, linewidth=0.8, linestyle="--")
        where = axis.get_xaxis_transform()  # x in steps, y from 0 to 1
        axis.text(begin, 0.98, f" {stage[0]['stage']}", transform=where, va="top", fontsize=8, color=INK)
        begin = stage[-1]["step"]


def _finish(axis: Axes) -> None:
    """Labels, grid and limits; a linear axis starts at 0 unless a value is negative."""
    axis.set_xlabel("step")
    axis.tick_params(labelbottom=True)
    axis.grid(alpha=0.25)
    low, high = axis.dataLim.intervaly
    if axis.get_yscale() == "linear":
        axis.set_ylim(min(0, 1.15 * low), 1.15 * high or 1)
    axis.legend(fontsize=8, frameon=False)
