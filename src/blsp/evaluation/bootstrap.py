"""Confidence intervals: percentile bootstrap, also for corpus metrics and for ratios of two routes.

In:  statistics of each utterance (N, K), and a function that computes the figure from their sums: WER is errors divided
     by words, BLEU a function of n-gram counts. Out: the figure and its 95 % interval.
Try: `interval(Figure(np.array([[1., 4.], [0., 5.]]), lambda total: total[0] / total[1]), draws(2, 1000, seed=0))`
Flow: evaluation/ — used by scoring.py, alignment.py and results.py.

If the questions have `ENOUGH_SPEAKERS`, whole speakers are drawn, because utterances of one speaker are similar. These
intervals are widened (`widening`), because the percentile bootstrap of few units is too narrow.
Otherwise utterances are drawn, and the intervals say nothing about other speakers. The draws depend only on the seed
and the number of units. So two routes that answered the same questions are resampled together, and the interval of
their ratio is a paired one (Koehn 2004; Efron & Tibshirani 1993, ch. 13).

Shapes: N utterances, K sums that a figure needs, S bootstrap samples.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
CONFIDENCE = 0.95
ENOUGH_SPEAKERS = 5  # fewer are too few: of two speakers, half of all draws hold only one
NORMAL = 1.96  # as CONFIDENCE: the 97.5 % quantile of the normal distribution
# The same of Student's t with 4 degrees of freedom, 5, ..., 30 (Student 1908; NIST/SEMATECH e-Handbook, 1.3.6.7.2)
STUDENT = (
    2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110,
    2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
NEVER_NEGATIVE, SHARE = (0.0, math.inf), (0.0, 1.0)


@dataclass(frozen=True)
class Figure:
    """A corpus figure: `value` of the sums over utterances of `statistics` (N, K); nan where it is undefined.

    WER, for example: a row of `statistics` is (errors, words) of one utterance, and `value` divides the sums.
    limits: the least and the largest possible value, for an interval that is widened.
    """

    statistics: Array
    value: Callable[[Array], float]
    limits: tuple[float, float] = (-math.inf, math.inf)

    def point(self) -> float:
        return self.value(self.statistics.sum(axis=0))

    def resampled(self, draws: NDArray[np.int64]) -> Array:
        """(S,) the figure on each draw of utterances."""
        return np.array([self.value(self.statistics[rows].sum(axis=0)) for rows in draws])


def mean_figure(values: Array, limits: tuple[float, float] = (-math.inf, math.inf)) -> Figure:
    """The mean of one number per utterance, without those that are nan."""
    finite = np.isfinite(values)
    return Figure(np.stack([np.where(finite, values, 0.0), finite], axis=1).astype(float), ratio, limits)


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


def widening(speakers: Sequence[str | None]) -> float:
    """The factor by which an interval over whole speakers is widened; 1 where utterances are drawn.

    Over k units, the variance of the bootstrap samples is (k - 1) / k of the unbiased estimate; and with a variance
    that is estimated, errors have Student's t distribution, not the normal one (Efron & Tibshirani 1993, ch. 12).
    """
    count = known_speakers(speakers)
    if count < ENOUGH_SPEAKERS:
        return 1.0
    number = count - ENOUGH_SPEAKERS
    quantile = STUDENT[number] if number < len(STUDENT) else NORMAL
    return quantile / NORMAL * math.sqrt(count / (count - 1))


def grouped(figure: Figure, units: NDArray[np.int64]) -> Figure:
    """The same figure over units: the statistics of a unit's utterances are added up."""
    statistics = np.zeros((int(units.max(initial=-1)) + 1, *figure.statistics.shape[1:]))
    np.add.at(statistics, units, figure.statistics)
    return replace(figure, statistics=statistics)


def draws_of(units: NDArray[np.int64], samples: int, seed: int) -> NDArray[np.int64]:
    """(S, number of units) numbers of units, drawn with replacement."""
    return draws(int(units.max(initial=-1)) + 1, samples, seed)


def draws(count: int, samples: int, seed: int) -> NDArray[np.int64]:
    """(S, N) row numbers, drawn with replacement."""
    return np.random.default_rng((seed, count)).integers(0, count, (samples, count))


def interval(figure: Figure, rows: NDArray[np.int64], factor: float = 1.0) -> tuple[float, float]:
    """The middle 95 % of the figure over the draws, widened by `factor` around the figure."""
    return _widened(figure.point(), _middle(figure.resampled(rows)), factor, figure.limits)


def relative_gap(
    figure: Figure, other: Figure, rows: NDArray[np.int64], factor: float = 1.0
) -> tuple[float, tuple[float, float]]:
    """How much larger than `other` the figure is, in percent (negative: smaller), and the interval.

    Figures that are never negative are at most 100 % smaller.
    """
    # Both figures use the same draws, so that questions that are hard for both routes cancel out.
    pairs = zip(figure.resampled(rows), other.resampled(rows), strict=True)
    percents = np.array([_percent(*pair) for pair in pairs])
    percent = _percent(figure.point(), other.point())
    limits = (-100.0 if figure.limits[0] >= 0 else -math.inf, math.inf)
    return percent, _widened(percent, _middle(percents), factor, limits)


def _percent(value: float, other: float) -> float:
    return 100 * (value - other) / other if other else float("nan")


def _widened(
    point: float, bounds: tuple[float, float], factor: float, limits: tuple[float, float]
) -> tuple[float, float]:
    """The interval with `factor` times the distances from `point`, within `limits`; nan stays nan."""
    if factor == 1:
        return bounds
    low, high = np.clip([point + factor * (bound - point) for bound in bounds], *limits)
    return float(low), float(high)


def _middle(values: Array) -> tuple[float, float]:
    """The quantiles between which `CONFIDENCE` of the finite values lie."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return float("nan"), float("nan")
    low, high = np.quantile(finite, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
