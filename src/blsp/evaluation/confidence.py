"""How sure a figure is: percentile bootstrap over utterances, also for corpus metrics and for ratios of two routes.

In:  statistics of each utterance (N, K) and the figure they make once summed: WER is errors over words, BLEU a
     function of n-gram counts. Out: the figure and its 95 % interval.
Try: `interval(Figure(np.array([[1., 4.], [0., 5.]]), lambda total: total[0] / total[1]), draws(2, 1000, seed=0))`
Flow: evaluation/ — under scoring.py.

The draws depend on N and the seed alone, so two routes that answered the same questions are resampled
together and the interval of their ratio is a paired one (Koehn 2004; Efron & Tibshirani 1993, ch. 13).

Letters: N utterances, K sums a figure needs, S bootstrap samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Figure:
    """A corpus figure: `value` of the sums over utterances of `statistics` (N, K); nan where it is undefined."""

    statistics: Array
    value: Callable[[Array], float]

    def point(self) -> float:
        return self.value(self.statistics.sum(axis=0))

    def resampled(self, draws: NDArray[np.int64]) -> Array:
        """(S,) the figure on each draw of utterances."""
        return np.array([self.value(self.statistics[rows].sum(axis=0)) for rows in draws])


def mean_figure(values: Array) -> Figure:
    """The mean of one number an utterance; those that are nan are left out."""
    known = np.isfinite(values)
    return Figure(np.stack([np.where(known, values, 0.0), known], axis=1).astype(float), ratio)


def ratio(total: Array) -> float:
    """First sum over second sum."""
    return float(total[0] / total[1]) if total[1] else float("nan")


def draws(count: int, samples: int, seed: int) -> NDArray[np.int64]:
    """(S, N) row numbers, drawn with replacement."""
    return np.random.default_rng((seed, count)).integers(0, count, (samples, count))


def interval(figure: Figure, rows: NDArray[np.int64]) -> tuple[float, float]:
    """The middle 95 % of the figure over the draws."""
    return _middle(figure.resampled(rows))


def relative_gap(figure: Figure, other: Figure, rows: NDArray[np.int64]) -> tuple[float, tuple[float, float]]:
    """How much larger than `other` the figure is, in percent (negative: smaller), and the interval."""
    return _percent(figure.point(), other.point()), _middle(
        np.array(
            [_percent(*pair) for pair in zip(figure.resampled(rows), other.resampled(rows), strict=True)]
        )
    )


def _percent(value: float, other: float) -> float:
    return 100 * (value - other) / other if other else float("nan")


def _middle(values: Array) -> tuple[float, float]:
    known = values[np.isfinite(values)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.quantile(known, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
