"""Confidence intervals: percentile bootstrap, also for corpus metrics and for ratios of two routes.

In:  statistics of each utterance (N, K), and a function that computes the figure from their sums: WER is errors divided
     by words, BLEU a function of n-gram counts. Out: the figure and its 95 % interval.
Try: `interval(Figure(np.array([[1., 4.], [0., 5.]]), lambda total: total[0] / total[1]), draws(2, 1000, seed=0))`
Flow: evaluation/ — used by scoring.py, alignment.py and results.py.

If the questions have `ENOUGH_SPEAKERS`, whole speakers are drawn, because utterances of one speaker are similar.
Otherwise utterances are drawn, and the intervals say nothing about other speakers. The draws depend only on the seed
and the number of units. So two routes that answered the same questions are resampled together, and the interval of
their ratio is a paired one (Koehn 2004; Efron & Tibshirani 1993, ch. 13).

Shapes: N utterances, K sums that a figure needs, S bootstrap samples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
CONFIDENCE = 0.95
ENOUGH_SPEAKERS = 5  # fewer are too few: of two speakers, half of all draws hold only one


@dataclass(frozen=True)
class Figure:
    """A corpus figure: `value` of the sums over utterances of `statistics` (N, K); nan where it is undefined.

    WER, for example: a row of `statistics` is (errors, words) of one utterance, and `value` divides the sums.
    """

    statistics: Array
    value: Callable[[Array], float]

    def point(self) -> float:
        return self.value(self.statistics.sum(axis=0))

    def resampled(self, draws: NDArray[np.int64]) -> Array:
        """(S,) the figure on each draw of utterances."""
        return np.array([self.value(self.statistics[rows].sum(axis=0)) for rows in draws])


def mean_figure(values: Array) -> Figure:
    """The mean of one number per utterance, without those that are nan."""
    finite = np.isfinite(values)
    return Figure(np.stack([np.where(finite, values, 0.0), finite], axis=1).astype(float), ratio)


def ratio(total: Array) -> float:
    """First sum over second sum."""
    return float(total[0] / total[1]) if total[1] else float("nan")


def known_speakers(speakers: Sequence[str | None]) -> int:
    """The number of speakers; 0 if the speaker of any utterance is not known."""
    return len(set(speakers)) if all(speakers) else 0


def drawn_units(speakers: Sequence[str | None]) -> NDArray[np.int64]:
    """(N,) the number of each utterance's unit, which is drawn as a whole: its speaker, or itself if they are few."""
    if known_speakers(speakers) < ENOUGH_SPEAKERS:
        return np.arange(len(speakers))
    return np.unique([str(name) for name in speakers], return_inverse=True)[1]


def grouped(figure: Figure, units: NDArray[np.int64]) -> Figure:
    """The same figure over units: the statistics of a unit's utterances are added up."""
    statistics = np.zeros((int(units.max(initial=-1)) + 1, *figure.statistics.shape[1:]))
    np.add.at(statistics, units, figure.statistics)
    return Figure(statistics, figure.value)


def draws_of(units: NDArray[np.int64], samples: int, seed: int) -> NDArray[np.int64]:
    """(S, number of units) numbers of units, drawn with replacement."""
    return draws(int(units.max(initial=-1)) + 1, samples, seed)


def draws(count: int, samples: int, seed: int) -> NDArray[np.int64]:
    """(S, N) row numbers, drawn with replacement."""
    return np.random.default_rng((seed, count)).integers(0, count, (samples, count))


def interval(figure: Figure, rows: NDArray[np.int64]) -> tuple[float, float]:
    """The middle 95 % of the figure over the draws."""
    return _middle(figure.resampled(rows))


def relative_gap(figure: Figure, other: Figure, rows: NDArray[np.int64]) -> tuple[float, tuple[float, float]]:
    """How much larger than `other` the figure is, in percent (negative: smaller), and the interval."""
    # Both figures use the same draws, so that questions that are hard for both routes cancel out.
    pairs = zip(figure.resampled(rows), other.resampled(rows), strict=True)
    percents = np.array([_percent(*pair) for pair in pairs])
    return _percent(figure.point(), other.point()), _middle(percents)


def _percent(value: float, other: float) -> float:
    return 100 * (value - other) / other if other else float("nan")


def _middle(values: Array) -> tuple[float, float]:
    """The quantiles between which `CONFIDENCE` of the finite values lie."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return float("nan"), float("nan")
    low, high = np.quantile(finite, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
