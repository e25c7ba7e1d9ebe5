"""Pictures of the report: PNG files in colours that colour-blind readers can distinguish.

In:  scores and the alignment analysis. Out: PNG files in the results folder.
Try: `draw_positions(alignment, Path("results/tiny/divergence_by_position.png"))`
Flow: evaluation/ — scoring.py, alignment.py → **pictures** → report.py.

A route has the same colour and mark in every picture (Okabe & Ito's palette).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter

from blsp.data.files import write_atomically
from blsp.evaluation.alignment import Alignment, Comparison
from blsp.evaluation.layers import LayerAnalysis

INK, BLUE, ORANGE, GREEN = "#1a1a1a", "#0072B2", "#D55E00", "#009E73"
SKY, PURPLE, AMBER, GREY = "#56B4E9", "#CC79A7", "#E69F00", "#8c8c8c"
ROUTE_STYLE = {
    "text": (INK, "o"),
    "cascade": (BLUE, "s"),
    "speech": (ORANGE, "D"),
    "recogniser": (SKY, "v"),
    "readout": (AMBER, "^"),
    "transcript": (PURPLE, "X"),
}
PEER_COLOURS = (GREEN, PURPLE, GREY)
BEHAVIOUR_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, INK)
BASELINES = {
    "shuffled": ("another clip's speech", GREY),
    "cascade": ("the cascade's words", BLUE),
    "readout": ("the adapter's own transcript", AMBER),
    "deaf": ("copies of one vector", INK),
}
FEWEST = 5  # answers for a point by position
LOWEST_KL = 1e-4  # nats: the left end of a logarithmic axis, which has no zero
Style = dict[str, Any]  # arguments of a matplotlib function
GRID: Style = {"alpha": 0.3}


@dataclass(frozen=True)
class Point:
    """One figure in the overview: a task, a route, a value with its interval."""

    task: str
    route: str
    value: float
    low: float
    high: float


def draw_scores(panels: dict[str, Sequence[Point]], picture: Path) -> None:
    """One panel for each metric, one line for each task, one mark for each route with its 95 % interval."""
    tasks = {title: list(dict.fromkeys(point.task for point in points)) for title, points in panels.items()}
    heights = [len(names) + 0.9 for names in tasks.values()]
    figure = _figure(8.2, 0.62 * sum(heights) + 0.7)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (title, points) in zip(axes, panels.items(), strict=True):
        _score_panel(axis, title, points, tasks[title])
    routes = list(dict.fromkeys(point.route for points in panels.values() for point in points))
    marks = []
    for route in routes:
        colour, marker = _route_style(route, routes)
        style: Style = {"color": colour, "marker": marker, "linestyle": "none", "markersize": 7}
        marks.append(Line2D([], [], label=route, **style))
    figure.legend(handles=marks, loc="outside upper center", ncols=len(marks), frameon=False)
    _save(figure, picture)


def _score_panel(axis: Axes, title: str, points: Sequence[Point], tasks: list[str]) -> None:
    routes = list(dict.fromkeys(point.route for point in points))
    step = 0.72 / max(len(routes), 1)
    interval_style: Style = {"linewidth": 2.2, "alpha": 0.45, "solid_capstyle": "round"}
    mark_style: Style = {"markersize": 7, "markeredgecolor": "white", "markeredgewidth": 0.8}
    for point in points:
        colour, marker = _route_style(point.route, routes)
        # Tasks are drawn from top to bottom, one unit each; the routes of a task share its unit.
        line = len(tasks) - 1 - tasks.index(point.task)
        height = line + step * ((len(routes) - 1) / 2 - routes.index(point.route))
        axis.plot([point.low, point.high], [height, height], color=colour, **interval_style)
        axis.plot(point.value, height, color=colour, marker=marker, **mark_style)
    for line in range(1, len(tasks)):
        axis.axhline(line - 0.5, color="#e5e5e5", linewidth=0.8)
    axis.set(title=title, yticks=range(len(tasks)), yticklabels=tasks[::-1], ylim=(-0.6, len(tasks) - 0.4))
    axis.set_xlim(left=0)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", **GRID)


def draw_positions(alignment: Alignment, picture: Path) -> None:
    """Divergence along the answer under each instruction, and its distribution over clips."""
    figure = _figure(10, 4)
    left, right = figure.subplots(1, 2)
    for (behaviour, clips), colour in zip(alignment.comparisons.items(), BEHAVIOUR_COLOURS, strict=False):
        _along_the_answer(left, list(clips.values()), behaviour, colour)
    left.set(
        title="Divergence along the answer", xlabel="token of the text route's answer", ylabel="KL(text ‖ speech), nats"
    )
    left.set_ylim(bottom=0)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend(frameon=False, title="instruction")
    _over_clips(right, alignment.headline)
    _save(figure, picture)


def _along_the_answer(axis: Axes, clips: Sequence[Comparison], label: str, colour: str) -> None:
    """The mean and the quartiles at each position that enough answers reach."""
    longest = max(len(clip.kl) for clip in clips)
    columns = [[clip.kl[i] for clip in clips if len(clip.kl) > i] for i in range(longest)]
    columns = [column for column in columns if len(column) >= min(FEWEST, len(clips))]
    positions = np.arange(1, len(columns) + 1)
    lower, upper = ([float(np.quantile(column, share)) for column in columns] for share in (0.25, 0.75))
    axis.plot(positions, [np.mean(column) for column in columns], color=colour, linewidth=1.8, label=label)
    axis.fill_between(positions, lower, upper, color=colour, alpha=0.13, linewidth=0)


def _over_clips(axis: Axes, clips: Sequence[Comparison]) -> None:
    """The share of clips below a divergence: with their own speech, and with each baseline."""
    curves = {"its own speech": ([float(np.mean(clip.kl)) for clip in clips], ORANGE, 2.2, "-")}
    for name, (label, colour) in BASELINES.items():
        if name in clips[0].baselines:
            curves[label] = ([clip.baselines[name] / len(clip.kl) for clip in clips], colour, 1.8, "--")
    share = np.arange(1, len(clips) + 1) / len(clips)
    for label, (means, colour, width, line) in curves.items():
        values = np.maximum(np.sort(means), LOWEST_KL)
        axis.step(values, share, where="post", color=colour, linewidth=width, linestyle=line, label=label)
    axis.set(
        title="Divergence of each clip",
        xlabel="mean KL of a clip, nats a token (log)",
        ylabel="share of clips below",
        xscale="log",
    )
    axis.set_ylim(0, 1.02)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.legend(frameon=False, loc="upper left")
    axis.grid(**GRID)


def draw_layers(layers: LayerAnalysis, picture: Path) -> None:
    """Similarity and divergence of the two routes, layer by layer."""
    figure = _figure(10, 4)
    left, right = figure.subplots(1, 2)
    numbers = range(len(layers.cosine))
    curves = (
        (layers.cosine, BLUE, "-", "cosine, answer's tokens"),
        (layers.cka, ORANGE, "--", "linear CKA, answer's tokens"),
        (layers.cosine_question, GREEN, ":", "cosine, mean over the question"),
    )
    for values, colour, line, label in curves:
        left.plot(numbers, values, color=colour, linewidth=2, linestyle=line, label=label)
    # From the tenth below the lowest value to a little above 1: routes may differ in hundredths only
    bottom = min(np.floor(10 * min(*layers.cosine, *layers.cka, *layers.cosine_question)) / 10, 0.9)
    left.set(title="Similarity of the states", ylim=(bottom, 1 + 0.03 * (1 - bottom)))
    left.legend(frameon=False, loc="best")
    right.plot(numbers, layers.kl, color=INK, linewidth=2, marker="o", markersize=3.5)
    right.set(title="Divergence of the layer's predictions", ylabel="KL(text ‖ speech), nats")
    right.set_ylim(bottom=0)
    for axis in (left, right):
        axis.set_xlabel("layer (0: embeddings)")
        axis.grid(**GRID)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _save(figure, picture)


def draw_instructions(layers: LayerAnalysis, picture: Path) -> None:
    """The paper's picture: last-layer states under several instructions; a line joins a clip's two routes."""
    figure = _figure(7.4, 6.2)
    axis = figure.subplots()
    keys = zip(layers.behaviours, layers.routes, layers.clips, strict=True)
    index = {key: i for i, key in enumerate(keys)}
    clips = dict.fromkeys(layers.clips)
    for behaviour, colour in zip(dict.fromkeys(layers.behaviours), BEHAVIOUR_COLOURS, strict=False):
        text, speech = (
            layers.points[[index[behaviour, route, clip] for clip in clips]] for route in ("text", "speech")
        )  # (C, 2) each
        for pair in zip(text, speech, strict=True):
            axis.plot(*zip(*pair, strict=True), color=colour, linewidth=0.7, alpha=0.4, zorder=1)
        circles: Style = {"s": 34, "facecolors": "white", "edgecolors": colour, "linewidths": 1.4, "zorder": 2}
        diamonds: Style = {"s": 38, "color": colour, "marker": "D", "edgecolors": "white", "linewidths": 0.5}
        axis.scatter(*text.T, **circles)
        axis.scatter(*speech.T, zorder=3, **diamonds)
        axis.plot([], [], color=colour, linewidth=6, label=behaviour)  # for the legend
    axis.plot([], [], color=GREY, marker="o", markerfacecolor="white", linestyle="none", label="transcript")
    axis.plot([], [], color=GREY, marker="D", linestyle="none", label="speech")
    axis.set(title="States from which the LLM begins its answer", xticks=[], yticks=[])
    for side in axis.spines.values():
        side.set_visible(False)
    figure.legend(loc="outside lower center", ncols=6, frameon=False, handlelength=1.2)
    _save(figure, picture)


def draw_checkpoints(points: Sequence[dict[str, Any]], picture: Path) -> None:
    """Divergence against task scores over several results.

    points: `{"name", "kl", "scores": {task (metric): ratio to the text route}}`, in the order of training.
    """
    figure = _figure(7.4, 5)
    axis = figure.subplots()
    tasks = list(dict.fromkeys(task for point in points for task in point["scores"]))
    styles = zip(tasks, BEHAVIOUR_COLOURS * 4, "osD^v<>p*hX" * 4, strict=False)
    for task, colour, marker in styles:
        pairs = sorted((point["kl"], point["scores"][task]) for point in points if task in point["scores"])
        style: Style = {"color": colour, "marker": marker, "linewidth": 1.4, "markersize": 7}
        axis.plot(*zip(*pairs, strict=True), label=task, **style)
    top = axis.get_ylim()[1]
    for point in points:
        axis.axvline(point["kl"], color="#dddddd", linewidth=0.8, zorder=0)
        label_style: Style = {"rotation": 90, "fontsize": 8, "color": GREY, "va": "top", "ha": "right"}
        axis.annotate(point["name"], (point["kl"], top), **label_style)
    axis.set(
        title="Divergence and scores", xlabel="KL(text ‖ speech), nats a token", ylabel="speech route over text route"
    )
    axis.set_ylim(bottom=0)
    axis.set_xlim(left=0)
    axis.legend(frameon=False, fontsize=9)
    _save(figure, picture)


def _route_style(route: str, routes: Sequence[str]) -> tuple[str, str]:
    """Colour and mark of a route; peers get the other colours in order."""
    if route in ROUTE_STYLE:
        return ROUTE_STYLE[route]
    peers = [name for name in routes if name not in ROUTE_STYLE]
    return PEER_COLOURS[peers.index(route) % len(PEER_COLOURS)], "P"


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, picture: Path) -> None:
    """Write the picture atomically and without a date, so that equal results give equal files."""
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(axis.get_title(), loc="left", fontsize=11, fontweight="bold")
        axis.set_title("", loc="center")
    with write_atomically(picture) as partial:
        figure.savefig(partial, format="png", metadata={"Software": None})
