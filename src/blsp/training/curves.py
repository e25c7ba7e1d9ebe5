"""Picture of a run's metrics: its loss and its probes over the steps.

In:  ``metrics.jsonl`` of a run (or of a stage). Out: ``curves.png`` beside it.
Try: ``draw(Path("runs/x/metrics.jsonl"), Path("runs/x/curves.png"))``
Flow: training/loop.py -> **curves.py** -> the run folder
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from blsp.data.files import write_atomically

# Okabe and Ito's palette, for colour-blind readers; line styles for print
INK, BLUE, ORANGE, GREY = "#000000", "#0072B2", "#D55E00", "#999999"
PROBES = {
    "kl": ("divergence from the text route (nats per token)", "lower is better"),
    "top1": ("top-1 agreement with the text route", "higher is better"),
    "wer": ("read-out word error rate", "lower is better"),
}


def draw(metrics: Path, picture: Path) -> None:
    """One panel for the loss and one for each probe: held-out and training clips, with their own and with exchanged
    speech.
    """
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
