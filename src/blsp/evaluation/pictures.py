"""The report's pictures: PNG files that say one thing each, in colours that colour-blind eyes tell apart.

In:  scores and the alignment analysis. Out: PNG files in the results folder, by name.
Try: `draw_positions(alignment, Path("results/tiny/divergence_by_position.png"))`
Flow: evaluation/ — scoring.py, alignment.py → **pictures** → report.py.

Routes keep their colour and mark in every picture: text black circles, cascade blue squares, speech orange
diamonds (Okabe & Ito's palette).
"""

from __future__ import annotations

import os
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

from blsp.evaluation.alignment import Alignment, Compared
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
FEWEST = 5  # answers behind a point by position


@dataclass(frozen=True)
class Point:
    """One figure in the overview: a task, a route, a value with its interval."""

    task: str
    route: str
    value: float
    low: float
    high: float


def draw_scores(panels: dict[str, Sequence[Point]], picture: Path) -> None:
    """One panel a metric, one line a task, one mark a route with its 95 % interval."""
    tasks = {title: list(dict.fromkeys(point.task for point in points)) for title, points in panels.items()}
    heights = [len(each) + 0.9 for each in tasks.values()]
    figure = _figure(8.2, 0.62 * sum(heights) + 0.7)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (title, points) in zip(axes, panels.items(), strict=True):
        _score_panel(axis, title, points, tasks[title])
    routes = list(dict.fromkeys(point.route for points in panels.values() for point in points))
    marks = [
        Line2D([], [], color=style[0], marker=style[1], linestyle="none", markersize=7, label=route)
        for route, style in zip(routes, map(_route_style, routes, [routes] * len(routes)), strict=True)
    ]
    figure.legend(handles=marks, loc="outside upper center", ncols=len(marks), frameon=False)
    _save(figure, picture)


def _score_panel(axis: Axes, title: str, points: Sequence[Point], tasks: list[str]) -> None:
    routes = list(dict.fromkeys(point.route for point in points))
    step = 0.72 / max(len(routes), 1)
    for point in points:
        colour, mark = _route_style(point.route, routes)
        height = (
            len(tasks)
            - 1
            - tasks.index(point.task)
            + step * ((len(routes) - 1) / 2 - routes.index(point.route))
        )
        axis.plot(
            [point.low, point.high],
            [height, height],
            color=colour,
            linewidth=2.2,
            alpha=0.45,
            solid_capstyle="round",
        )
        axis.plot(
            point.value,
            height,
            color=colour,
            marker=mark,
            markersize=7,
            markeredgecolor="white",
            markeredgewidth=0.8,
        )
    for height in range(1, len(tasks)):
        axis.axhline(height - 0.5, color="#e5e5e5", linewidth=0.8)
    axis.set(title=title, yticks=range(len(tasks)), yticklabels=tasks[::-1], ylim=(-0.6, len(tasks) - 0.4))
    axis.set_xlim(left=0)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", alpha=0.3)


def draw_positions(alignment: Alignment, picture: Path) -> None:
    """Divergence along the answer under each instruction, and how clips differ."""
    figure = _figure(10, 4)
    left, right = figure.subplots(1, 2)
    for (behaviour, compared), colour in zip(alignment.compared.items(), BEHAVIOUR_COLOURS, strict=False):
        _positions(left, list(compared.values()), behaviour, colour)
    left.set(title="Where in the answer the routes part", xlabel="token of the text route's answer")
    left.set_ylabel("KL(text ‖ speech), nats")
    left.set_ylim(bottom=0)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend(frameon=False, title="instruction")
    headline = next(iter(alignment.compared.values()))
    _spread(right, list(headline.values()))
    _save(figure, picture)


def _positions(axis: Axes, compared: Sequence[Compared], label: str, colour: str) -> None:
    longest = max(len(each.kl) for each in compared)
    columns = [[each.kl[i] for each in compared if len(each.kl) > i] for i in range(longest)]
    columns = [column for column in columns if len(column) >= min(FEWEST, len(compared))]
    places = np.arange(1, len(columns) + 1)
    axis.plot(places, [np.mean(column) for column in columns], color=colour, linewidth=1.8, label=label)
    axis.fill_between(places, *_quartiles(columns), color=colour, alpha=0.13, linewidth=0)


def _quartiles(columns: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    return [float(np.quantile(c, 0.25)) for c in columns], [float(np.quantile(c, 0.75)) for c in columns]


def _spread(axis: Axes, compared: Sequence[Compared]) -> None:
    """How many clips lie below a divergence: what is heard, and for comparison another clip's speech."""
    heard = np.sort([float(np.mean(each.kl)) for each in compared])
    exchanged = np.sort([each.shuffled / len(each.kl) for each in compared])
    share = np.arange(1, len(heard) + 1) / len(heard)
    axis.step(
        np.maximum(heard, 1e-4), share, where="post", color=ORANGE, linewidth=2.2, label="its own speech"
    )
    axis.step(
        np.maximum(exchanged, 1e-4),
        share,
        where="post",
        color=GREY,
        linewidth=1.8,
        linestyle="--",
        label="another clip's speech",
    )
    axis.set(
        title="How clips differ",
        xlabel="mean KL of a clip, nats a token (log)",
        ylabel="share of clips below",
        xscale="log",
    )
    axis.set_ylim(0, 1.02)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.legend(frameon=False, loc="upper left")
    axis.grid(alpha=0.3)


def draw_layers(layers: LayerAnalysis, picture: Path) -> None:
    """Similarity and divergence of the two routes, layer by layer."""
    figure = _figure(10, 4)
    left, right = figure.subplots(1, 2)
    places = range(len(layers.cosine))
    left.plot(places, layers.cosine, color=BLUE, linewidth=2, label="cosine, answer's tokens")
    left.plot(
        places, layers.cka, color=ORANGE, linewidth=2, linestyle="--", label="linear CKA, answer's tokens"
    )
    left.plot(
        places,
        layers.cosine_question,
        color=GREEN,
        linewidth=2,
        linestyle=":",
        label="cosine, mean over the question",
    )
    left.set(
        title="How alike the states are",
        xlabel="layer (0: embeddings)",
        ylim=_similarity_range(layers),
    )
    left.legend(frameon=False, loc="best")
    right.plot(places, layers.kl, color=INK, linewidth=2, marker="o", markersize=3.5)
    right.set(
        title="Divergence of what each layer would say",
        xlabel="layer (0: embeddings)",
        ylabel="KL(text ‖ speech), nats",
    )
    right.set_ylim(bottom=0)
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _save(figure, picture)


def _similarity_range(layers: LayerAnalysis) -> tuple[float, float]:
    """From the tenth below the lowest value to 1, with a little room: routes that are alike differ in hundredths."""
    lowest = min(*layers.cosine, *layers.cka, *layers.cosine_question)
    bottom = min(np.floor(10 * lowest) / 10, 0.9)
    return bottom, 1 + 0.03 * (1 - bottom)


def draw_instructions(layers: LayerAnalysis, picture: Path) -> None:
    """The paper's picture: last-layer states under several instructions; a line joins a clip's two routes."""
    figure = _figure(7.4, 6.2)
    axis = figure.subplots()
    where = {
        key: at for at, key in enumerate(zip(layers.behaviours, layers.routes, layers.clips, strict=True))
    }
    for behaviour, colour in zip(dict.fromkeys(layers.behaviours), BEHAVIOUR_COLOURS, strict=False):
        clips = dict.fromkeys(layers.clips)
        text = layers.points[[where[behaviour, "text", clip] for clip in clips]]
        speech = layers.points[[where[behaviour, "speech", clip] for clip in clips]]
        for start, end in zip(text, speech, strict=True):
            axis.plot(*zip(start, end, strict=True), color=colour, linewidth=0.7, alpha=0.4, zorder=1)
        axis.scatter(
            text[:, 0], text[:, 1], s=34, facecolors="white", edgecolors=colour, linewidths=1.4, zorder=2
        )
        axis.scatter(
            speech[:, 0],
            speech[:, 1],
            s=38,
            color=colour,
            marker="D",
            edgecolors="white",
            linewidths=0.5,
            zorder=3,
        )
        axis.plot([], [], color=colour, linewidth=6, label=behaviour)
    axis.plot([], [], color=GREY, marker="o", markerfacecolor="white", linestyle="none", label="transcript")
    axis.plot([], [], color=GREY, marker="D", linestyle="none", label="speech")
    axis.set(
        title="What the LLM is about to do when it reads and when it hears",
        xticks=[],
        yticks=[],
    )
    for side in axis.spines.values():
        side.set_visible(False)
    figure.legend(loc="outside lower center", ncols=6, frameon=False, handlelength=1.2)
    _save(figure, picture)


def draw_checkpoints(points: Sequence[dict[str, Any]], picture: Path) -> None:
    """Divergence against task scores over several results: does what is aligned predict what works?

    points: `{"name", "kl", "scores": {task (metric): ratio to the text route}}`, in the order of training.
    """
    figure = _figure(7.4, 5)
    axis = figure.subplots()
    tasks = list(dict.fromkeys(task for point in points for task in point["scores"]))
    styles = zip(tasks, BEHAVIOUR_COLOURS * 4, "osD^v<>p*hX" * 4, strict=False)
    for task, colour, mark in styles:
        pairs = sorted((point["kl"], point["scores"][task]) for point in points if task in point["scores"])
        axis.plot(
            *zip(*pairs, strict=True), color=colour, marker=mark, linewidth=1.4, markersize=7, label=task
        )
    top = axis.get_ylim()[1]
    for point in points:
        axis.axvline(point["kl"], color="#dddddd", linewidth=0.8, zorder=0)
        axis.annotate(
            point["name"], (point["kl"], top), rotation=90, fontsize=8, color=GREY, va="top", ha="right"
        )
    axis.set(
        title="Divergence and scores",
        xlabel="KL(text ‖ speech), nats a token",
        ylabel="speech route over text route",
    )
    axis.set_ylim(bottom=0)
    axis.set_xlim(left=0)
    axis.legend(frameon=False, fontsize=9)
    _save(figure, picture)


def _route_style(route: str, routes: Sequence[str]) -> tuple[str, str]:
    if route in ROUTE_STYLE:
        return ROUTE_STYLE[route]
    peers = [each for each in routes if each not in ROUTE_STYLE]
    return PEER_COLOURS[peers.index(route) % len(PEER_COLOURS)], "P"


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, picture: Path) -> None:
    """Written under a temporary name first; without a date inside, so that equal results are equal files."""
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(axis.get_title(), loc="left", fontsize=11, fontweight="bold")
        axis.set_title("", loc="center")
    partial = picture.with_name(f".{picture.name}.{os.getpid()}.partial")
    figure.savefig(partial, format="png", metadata={"Software": None})
    os.replace(partial, picture)
