"""Reports of a run: lines of metrics.jsonl with the probes, the curves, a progress bar, the model card.

In:  the run and its state after a step.
Out: ``metrics.jsonl``, ``curves.png``, a progress bar on stderr; at the end the README of the adapter's folder.
Try: `report(run, state, bar)`
Flow: training/loop.py after every step -> **reporting.py** -> the run folder
"""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

from blsp.data.files import read_rows, write_atomically, write_text
from blsp.distributed import Runtime
from blsp.settings import TrainSettings
from blsp.training import probes, step
from blsp.training.optimiser import State, learning_rate
from blsp.training.run import Run
from blsp.training.run_state import Progress, as_flags, dump_flags, empty_window

CURVES_SECONDS = 60  # at least, between two drawings of curves.png


def report(run: Run, state: State, bar: tqdm) -> None:
    """Write a line of metrics.jsonl every `--log-every` steps; every `--probe-every` steps with the probes."""
    progress, settings = state.progress, run.settings
    bar.update()
    is_last = progress.step == run.steps
    probing = progress.step == 1 or progress.step % settings.probe_every == 0 or is_last
    if not (probing or progress.step % settings.log_every == 0):
        return
    state.progress = empty_window(progress)
    row = {
        "step": progress.step,
        "loss": progress.window_loss / progress.window_steps,
        "lr": learning_rate(settings, progress.step, run.steps),
        "samples": progress.samples,
        "audio_seconds": round(progress.audio_seconds, 3),
        "seconds": round(progress.seconds, 3),
        "padding": round(progress.window_padding / max(1, progress.window_positions), 4),
    }
    bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
    if probing and (run.runtime.rank == 0 or settings.shard_llm):  # all ranks run a sharded LLM, or none
        with step.autocast(run.runtime):
            for probe in run.probes:
                row |= probes.measure(probe, run.prefixes, run.processor.tokenizer, settings.batch_tokens)
    if run.runtime.rank != 0:
        return
    if probing:
        bar.write(", ".join(f"{name} {value:.4g}" for name, value in row.items()), file=sys.stderr)
    with open(settings.out / "metrics.jsonl", "a", encoding="utf-8") as out:
        out.write(json.dumps(row) + "\n")
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
        draw(run.settings.out / "metrics.jsonl", run.settings.out / "curves.png")


def print_once(runtime: Runtime, text: str) -> None:
    """Print in the first rank alone."""
    if runtime.rank == 0:
        print(text)


def finish_stages(settings: TrainSettings) -> None:
    """The last stage's adapter, all stages' metrics and one picture, in the folder of the whole recipe."""
    with write_atomically(settings.out / "adapter") as partial:
        shutil.copytree(settings.stages[-1].out / "adapter", partial)
    lines, steps_before = [], 0
    for stage in settings.stages:
        rows = [row for _, row in read_rows(stage.out / "metrics.jsonl")]
        for row in rows:
            lines.append(json.dumps(row | {"step": row["step"] + steps_before, "stage": stage.out.name}) + "\n")
        steps_before += rows[-1]["step"]
    write_text(settings.out / "metrics.jsonl", "".join(lines), durable=True)
    draw(settings.out / "metrics.jsonl", settings.out / "curves.png")
    stages = []
    for stage in settings.stages:
        flags = as_flags(stage)
        del flags["out"]
        stages.append({"name": stage.out.name} | flags)
    write_text(settings.out / "settings.yaml", dump_flags({"out": str(settings.out), "stages": stages}), durable=True)
    print(f"{settings.out}: all {len(stages)} stages are finished; the adapter is {settings.out / 'adapter'}")


PROBE_MEANINGS = {
    "kl": "next-token divergence from the text route, nats per token",
    "kl_shuffled": "the same with every clip exchanged for another one",
    "top1": "top-1 agreement with the text route",
    "wer": "word error rate of the read-out",
}


def model_card(settings: TrainSettings, metrics: Path) -> str:
    """The README of the adapter's folder: metadata, how to use it, how it was trained, and the last probes."""
    head = {
        "library_name": "transformers",
        "pipeline_tag": "audio-text-to-text",
        "base_model": [settings.llm, settings.audio_model],
        "tags": ["blsp", "speech", f"adapter-{settings.adapter}"],
    }
    last = json.loads(metrics.read_text(encoding="utf-8").splitlines()[-1])
    return f"""---
{yaml.safe_dump(head, sort_keys=False).strip()}
---

# BLSP adapter: {settings.audio_model} → {settings.llm}

A `{settings.adapter}` adapter that lets the frozen LLM `{settings.llm}` listen through the frozen encoder of
`{settings.audio_model}`. The folder holds the adapter alone; the frozen parts are loaded by name and checked
by digest.

    import blsp
    print(blsp.load("this/folder").answer("question.wav"))

## Training

{last["samples"]} samples, {last["audio_seconds"] / 3600:.2f} hours of speech, {last["step"]} steps,
{last["seconds"] / 60:.1f} minutes, final loss {last["loss"]:.4f}.

```yaml
{dump_flags(as_flags(settings)).strip()}
```

## Measured during training

{_probes(last)}
"""


def _probes(last: dict[str, float]) -> str:
    rows = [
        f"| {part.replace('_', '-')} | {meaning} | {last[f'{part}_{name}']:.4f} |"
        for part in ("held_out", "train")
        for name, meaning in PROBE_MEANINGS.items()
        if f"{part}_{name}" in last
    ]
    if not rows:
        return "No probes were taken."
    return "\n".join(["| clips | measure | value |", "|---|---|---|", *rows])


# --- the picture ------------------------------------------------------------------------------------------

# Okabe and Ito's palette, for colour-blind readers; line styles for print
INK, BLUE, ORANGE, GREY = "#000000", "#0072B2", "#D55E00", "#999999"
PROBES = {
    "kl": ("divergence from the text route (nats per token)", "lower is better"),
    "top1": ("top-1 agreement with the text route", "higher is better"),
    "wer": ("read-out word error rate", "lower is better"),
}


def draw(metrics: Path, picture: Path) -> None:
    """One panel for the loss and one a probe: held-out and training clips, with their own and exchanged speech."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    if not rows:
        return
    probes = [name for name in PROBES if any(f"{part}_{name}" in row for row in rows for part in ("train", "held_out"))]
    width = 5.4 * (1 + len(probes))
    figure = Figure(figsize=(width, 3.8), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 1 + len(probes), squeeze=False)[0]
    figure.subplots_adjust(left=0.7 / width, right=1 - 0.7 / width, bottom=0.14, top=0.86, wspace=0.34)
    _loss(axes[0], rows)
    for axis, name in zip(axes[1:], probes, strict=True):
        _probe(axis, rows, name)
    with write_atomically(picture) as partial:
        figure.savefig(partial, format="png")


def _loss(axis: Axes, rows: list[dict[str, Any]]) -> None:
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    axis.plot(steps, losses, color=GREY, linewidth=0.8, label="logged")
    smooth, level = [], losses[0]  # a running mean over about ten points
    for loss in losses:
        level += (loss - level) * 0.1
        smooth.append(level)
    axis.plot(steps, smooth, color=INK, linewidth=1.8, label="smoothed")
    axis.set(title="training loss", xlabel="step", ylabel="nats")
    rate = axis.twinx()
    rate.plot(steps, [row["lr"] for row in rows], color=BLUE, linewidth=0.8, linestyle=":")
    rate.set_ylabel("learning rate (dotted)", color=BLUE)
    _finish(axis)


def _probe(axis: Axes, rows: list[dict[str, Any]], name: str) -> None:
    title, remark = PROBES[name]
    styles = [
        (f"held_out_{name}", "held-out clips", ORANGE, "-"),
        (f"train_{name}", "training clips", BLUE, "-"),
        (f"held_out_{name}_shuffled", "held-out, clips exchanged", ORANGE, ":"),
        (f"train_{name}_shuffled", "training, clips exchanged", BLUE, ":"),
    ]
    for key, label, colour, line in styles:
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axis.plot(*zip(*points, strict=True), color=colour, linestyle=line, marker="o", markersize=3, label=label)
    axis.set(title=f"{title}\n{remark}", xlabel="step")
    _finish(axis)


def _finish(axis: Axes) -> None:
    axis.grid(alpha=0.25)
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8, frameon=False)
