"""Where inside the LLM the two routes part or meet: similarity layer by layer, and a picture of instructions.

In:  the text route's answers under each instruction, and the clips.
Out: `LayerAnalysis`: cosine, linear CKA and divergence by layer; points for the 2-D picture.
Try: results.json, "alignment", "layers"
Flow: evaluation/ — called by alignment.py; drawn by pictures.py.

Layer by layer, at the places of the answer's tokens, where both routes hold the same words: the mean cosine,
linear CKA (Kornblith et al. 2019, eq. 3) and the divergence of what the LLM would say if it stopped there
(final norm and head on that layer's state; "logit lens"). At the question's places, whose number differs,
the cosine of the means.

The picture is the paper's (§4.4): one point a clip, route and instruction. A point is the last-layer state at
the question's last place, from which the answer's first token is read: there the LLM has put instruction and
content together (means over the question show the content alone). An adapter trained on recognition alone
collapses: its points do not part by instruction.

Letters: A layers + 1, L question, N answer tokens, D LLM width, C clips, M points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from blsp.data.manifest import Utterance
from blsp.evaluation.answers import Answers
from blsp.evaluation.routes import RouteInput, RouteInputFn, read_text, request
from blsp.evaluation.tasks import Task
from blsp.inference.listener import Listener
from blsp.llm.language_model import UnsupportedModelError, decoder_of
from blsp.llm.teacher_forcing import divergence, layer_states

Array = NDArray[np.float64]
ROWS_AT_A_TIME = 8
LENS_POSITIONS = 256  # answer tokens whose divergence is taken at every layer


@dataclass(frozen=True)
class LayerAnalysis:
    """Lists by layer (embeddings first), and the points of the picture, each with its instruction, route and clip."""

    cosine: list[float]
    cosine_question: list[float]
    cka: list[float]
    kl: list[float]
    points: Array  # (M, 2)
    behaviours: list[str]  # (M,)
    routes: list[str]  # (M,)
    clips: list[str]  # (M,)
    separation: float
    separation_text: float
    retrieval: float
    n: int

    def figures(self) -> dict[str, Any]:
        """instruction_separation: how many of the speech's states lie nearest to the text states' centre of their
        own instruction (_text: how many of the text's, left out of the centre: the ceiling).
        retrieval: how many have their own transcript's state as the nearest under the same instruction."""
        lists = {name: getattr(self, name) for name in ("cosine", "cosine_question", "cka", "kl")}
        return {
            "layers": lists | {"n": self.n},
            "instruction_separation": self.separation,
            "instruction_separation_text": self.separation_text,
            "retrieval": self.retrieval,
        }


def analyse_layers(
    listener: Listener,
    tasks: dict[str, Task],
    read: Callable[[Sequence[Utterance]], dict[str, str]],
    hear: RouteInputFn,
    answers: dict[str, Answers],
    samples: int,
) -> LayerAnalysis:
    """Look at the first `samples` clips; the layers under the first instruction, the picture under all."""
    heard: list[RouteInput] = []
    rows: list[Utterance] = []
    ends: dict[str, dict[str, list[Tensor]]] = {}
    by_layer: dict[str, Any] = {}
    for behaviour, task in tasks.items():
        rows = task.rows()[:samples]
        heard = heard or hear(rows)
        said = {"text": read_text(read(rows))(rows), "speech": heard}
        if not by_layer:
            whole = {
                route: _states(listener, task, rows, each, answers[behaviour]) for route, each in said.items()
            }
            by_layer = _by_layer(listener, whole["text"], whole["speech"])
            ends[behaviour] = {
                route: [_end(question) for question, _ in pairs] for route, pairs in whole.items()
            }
            continue
        ends[behaviour] = {
            route: [
                _end(question)
                for at in _slices(rows)
                for question, _ in _states(listener, task, rows[at], each[at], answers[behaviour])
            ]
            for route, each in said.items()
        }
    return LayerAnalysis(**by_layer, **_picture(ends, [row.id for row in rows]), n=len(rows))


def _end(question: Tensor) -> Tensor:
    """(A, L, D) -> (D,): the last layer's state from which the answer is begun."""
    return question[-1, -1].clone()


def _slices(rows: Sequence[Utterance]) -> list[slice]:
    return [slice(start, start + ROWS_AT_A_TIME) for start in range(0, len(rows), ROWS_AT_A_TIME)]


def _states(
    listener: Listener, task: Task, rows: Sequence[Utterance], said: Sequence[RouteInput], answers: Answers
) -> list[tuple[Tensor, Tensor]]:
    """Of each row, every layer's states at the question's places (A, L, D) and at the answer's (A, N, D)."""
    found: list[tuple[Tensor, Tensor]] = []
    for at in _slices(rows):
        requests = [
            request(listener, task, row, words) for row, words in zip(rows[at], said[at], strict=True)
        ]
        pairs = layer_states(listener.model, requests, [answers[row.id] for row in rows[at]])
        found += [(question.cpu(), answer.cpu()) for question, answer in pairs]
    return found


def _by_layer(
    listener: Listener, text: list[tuple[Tensor, Tensor]], speech: list[tuple[Tensor, Tensor]]
) -> dict[str, Any]:
    reading = torch.cat([answer for _, answer in text], dim=1)  # (A, N, D)
    hearing = torch.cat([answer for _, answer in speech], dim=1)
    asked = [
        torch.stack([q.double().mean(dim=1) for q, _ in pairs], dim=1) for pairs in (text, speech)
    ]  # (A, C, D)
    similarity = torch.nn.functional.cosine_similarity
    return {
        "cosine": similarity(reading.double(), hearing.double(), dim=-1).mean(dim=1).tolist(),
        "cosine_question": similarity(asked[0], asked[1], dim=-1).mean(dim=1).tolist(),
        "cka": [linear_cka(a, b) for a, b in zip(reading.double(), hearing.double(), strict=True)],
        "kl": _lens(listener, reading, hearing),
    }


def linear_cka(one: Tensor, other: Tensor) -> float:
    """Linear centred kernel alignment of two sets of states (N, D) of the same N things: 1 up to rotation and scale."""
    one, other = one - one.mean(dim=0), other - other.mean(dim=0)
    shared = torch.linalg.matrix_norm(other.T @ one) ** 2
    return float(shared / (torch.linalg.matrix_norm(one.T @ one) * torch.linalg.matrix_norm(other.T @ other)))


def _lens(listener: Listener, reading: Tensor, hearing: Tensor) -> list[float]:
    """Divergence after each layer, at up to `LENS_POSITIONS` places spread over all."""
    norm = getattr(decoder_of(listener.model), "norm", None)
    if norm is None:
        raise UnsupportedModelError(
            f"{listener.model.config.text_config.model_type}: its decoder has no final `norm`"
        )
    device = listener.model.get_output_embeddings().weight.device
    places = torch.linspace(0, reading.shape[1] - 1, min(LENS_POSITIONS, reading.shape[1])).round().long()
    found = []
    for layer in range(len(reading)):
        states = [each[layer, places].to(device) for each in (reading, hearing)]
        if layer < len(reading) - 1:  # the last one has been through the norm
            states = [norm(each) for each in states]
        found.append(float(np.mean(divergence(listener.model, *states)[0])))
    return found


def _picture(ends: dict[str, dict[str, list[Tensor]]], clips: list[str]) -> dict[str, Any]:
    """Projected points with their labels, and the two figures read off the unprojected states."""
    labels = [(behaviour, route) for behaviour, each in ends.items() for route in each for _ in clips]
    states = (
        torch.cat([torch.stack(each[route]) for each in ends.values() for route in each]).double().numpy()
    )
    return {
        "points": project(states),
        "behaviours": [behaviour for behaviour, _ in labels],
        "routes": [route for _, route in labels],
        "clips": [clip for _ in range(len(labels) // len(clips)) for clip in clips],
        "separation": _separation(ends, "speech"),
        "separation_text": _separation(ends, "text"),
        "retrieval": _retrieval(ends),
    }


def _separation(ends: dict[str, dict[str, list[Tensor]]], route: str) -> float:
    """Share of a route's states nearest to the text states' mean under their own instruction, their own clip left
    out of every mean."""
    text = torch.stack([torch.stack(each["text"]) for each in ends.values()])  # (behaviours, C, D)
    states = torch.stack([torch.stack(each[route]) for each in ends.values()])
    clips = text.shape[1]
    others = text.sum(dim=1, keepdim=True) - text if clips > 1 else text
    centres = (others / max(clips - 1, 1)).transpose(0, 1)  # (C, behaviours, D)
    nearest = torch.cdist(states.transpose(0, 1), centres).argmin(dim=2)  # (C, behaviours)
    return float((nearest == torch.arange(len(ends))).double().mean())


def _retrieval(ends: dict[str, dict[str, list[Tensor]]]) -> float:
    """Share of speech states whose nearest text state under the same instruction is of the same clip."""
    right = []
    for each in ends.values():
        text, speech = torch.stack(each["text"]), torch.stack(each["speech"])
        right.append(torch.cdist(speech, text).argmin(dim=1) == torch.arange(len(text)))
    return float(torch.cat(right).double().mean())


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
