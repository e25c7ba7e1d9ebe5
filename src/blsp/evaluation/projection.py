"""Many dimensions on a page: t-SNE, exact and deterministic, for the few hundred points of one picture.

In:  states (M, D). Out: points (M, 2); the same states always give the same picture.
Try: `project(np.random.default_rng(0).normal(size=(60, 8)))`
Flow: evaluation/ — called by layers.py; drawn by pictures.py.

van der Maaten & Hinton 2008, started from the first two principal components as Kobak & Berens 2019 advise,
with their early exaggeration; O(M²), written out because nothing else here needs a learning library.

Letters: M points, D their width.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
PERPLEXITY = 20.0
STEPS, EXAGGERATED_STEPS, EXAGGERATION = 750, 250, 12.0
COMPONENTS = 50  # principal components kept before distances are taken


def project(states: Array) -> Array:
    """(M, D) -> (M, 2), centred, of unit spread."""
    reduced = principal_components(states, COMPONENTS)
    if len(states) < 4:
        points = np.zeros((len(states), 2))
        points[:, : reduced.shape[1]] = reduced[:, :2]
        return points
    affinity = _affinities(_distances(reduced), min(PERPLEXITY, (len(states) - 1) / 6))
    start = reduced[:, :2] if reduced.shape[1] > 1 else np.pad(reduced, ((0, 0), (0, 1)))
    points = _descend(affinity, 1e-4 * start / max(float(start.std()), 1e-12))
    return points / max(float(points.std()), 1e-12)


def principal_components(states: Array, count: int) -> Array:
    """(M, D) -> (M, at most count): coordinates along the directions of most variance, signs fixed."""
    centred = states - states.mean(axis=0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    components = (left * sizes)[:, :count]
    signs = np.sign(components[np.abs(components).argmax(axis=0), np.arange(components.shape[1])])
    return components * np.where(signs == 0, 1.0, signs)


def _distances(points: Array) -> Array:
    """(M, M) squared distances."""
    squares = (points**2).sum(axis=1)
    return np.maximum(squares[:, None] + squares[None, :] - 2 * points @ points.T, 0.0)


def _affinities(distances: Array, perplexity: float) -> Array:
    """(M, M) symmetric probabilities whose rows, before symmetrising, have the wanted perplexity."""
    count = len(distances)
    low, high = np.zeros(count), np.full(count, np.inf)
    precision = np.full(count, 1.0 / max(float(np.median(distances)), 1e-12))
    for _ in range(64):
        weights = np.exp(-distances * precision[:, None])
        np.fill_diagonal(weights, 0.0)
        shares = weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-300)
        entropy = -(shares * np.log(np.maximum(shares, 1e-300))).sum(axis=1)
        wide = entropy > np.log(perplexity)
        low, high = np.where(wide, precision, low), np.where(wide, high, precision)
        precision = np.where(np.isinf(high), precision * 2, (low + high) / 2)
    return np.maximum((shares + shares.T) / (2 * count), 1e-12)


def _descend(affinity: Array, points: Array) -> Array:
    """Gradient descent with momentum and per-coordinate gains, as in the authors' own program."""
    step = max(len(points) / EXAGGERATION / 4, 50.0)
    velocity, gains = np.zeros_like(points), np.ones_like(points)
    for number in range(STEPS):
        early = number < EXAGGERATED_STEPS
        gradient = _gradient(affinity * (EXAGGERATION if early else 1.0), points)
        same = np.sign(gradient) == np.sign(velocity)
        gains = np.maximum(np.where(same, gains * 0.8, gains + 0.2), 0.01)
        velocity = (0.5 if early else 0.8) * velocity - step * gains * gradient
        points = points + velocity
        points -= points.mean(axis=0)
    return points


def _gradient(affinity: Array, points: Array) -> Array:
    closeness = 1.0 / (1.0 + _distances(points))
    np.fill_diagonal(closeness, 0.0)
    pull = (affinity - closeness / closeness.sum()) * closeness  # (M, M)
    return 4 * (pull.sum(axis=1)[:, None] * points - pull @ points)
