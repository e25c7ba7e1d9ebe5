"""The two routes layer by layer inside the LLM: similarity of states, and a picture of instructions.

In:  the text route's answers under each instruction, and the clips.
Out: `LayerAnalysis`: cosine, linear CKA and divergence by layer; points for the 2-D picture.
Try: results.json, "alignment", "layers"
Flow: evaluation/ — called by alignment.py; drawn by pictures.py.

For each layer, at the positions of the answer's tokens, where both routes have the same words: the mean cosine, linear
CKA (Kornblith et al. 2019, eq. 3), and the divergence of this layer's predictions (final norm and head applied to its
state, the "logit lens"). The question's length differs between the routes, so there the cosine of the two means is
used.

The picture is the paper's (§4.4): one point for each clip, route and instruction. A point is the last-layer state at
the question's last position, where the LLM has combined instruction and content.

Shapes: A layers + 1, L question, N answer tokens, D LLM width, C clips, I instructions, M points (I × 2 routes × C).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from blsp.data.manifest import Utterance
from blsp.evaluation.answers import Answers
from blsp.evaluation.routes import RouteInput, RouteInputFn, request, slices, text_input
from blsp.evaluation.tasks import Task
from blsp.inference.listener import Listener
from blsp.llm.language_model import at_least_float32, final_norm
from blsp.llm.teacher_forcing import divergence, layer_states

Array = NDArray[np.float64]
EndStates = dict[str, dict[str, Tensor]]  # instruction -> route -> (C, D)
ROWS_AT_A_TIME = 8
LENS_POSITIONS = 256  # answer tokens at which the divergence of each layer is computed


@dataclass(frozen=True)
class LayerAnalysis:
    """Lists by layer (embeddings first), and the points of the picture with their instruction, route and clip."""

    cosine: list[float]
    cosine_question: list[float]
    cka: list[float]
    kl: list[float]
    points: Array  # (M, 2)
    behaviours: list[str]  # (M,)
    routes: list[str]  # (M,)
    clips: list[str]  # (M,)
    retrieval: float
    n: int

    def figures(self) -> dict[str, Any]:
        """This module's part of results.json.

        retrieval: share of the speech states whose nearest text state under the same instruction is that of their own
        transcript, whichever clip it is of.
        """
        lists = {name: getattr(self, name) for name in ("cosine", "cosine_question", "cka", "kl")}
        return {"layers": lists | {"n": self.n}, "retrieval": self.retrieval}


def analyse_layers(
    listener: Listener,
    tasks: dict[str, Task],
    transcripts: Callable[[Sequence[Utterance]], dict[str, str]],
    speech_input: RouteInputFn,
    answers: dict[str, Answers],
    samples: int,
) -> LayerAnalysis:
    """The analysis of the first `samples` clips: layers under the first instruction, the picture under all."""
    first, *_ = tasks
    rows = tasks[first].rows()[:samples]
    speech = speech_input(rows)
    by_layer: dict[str, Any] = {}
    ends: EndStates = {}
    for behaviour, task in tasks.items():
        rows = task.rows()[:samples]
        texts = transcripts(rows)
        inputs = {"text": text_input(texts)(rows), "speech": speech}
        states: dict[str, Iterable[tuple[Tensor, Tensor]]] = {
            route: _states(listener, task, rows, route_inputs, answers[behaviour])
            for route, route_inputs in inputs.items()
        }
        if behaviour == first:  # only the first instruction needs the states of all layers at once
            text, speech_states = (list(states[route]) for route in ("text", "speech"))
            by_layer = _by_layer(listener, text, speech_states)
            states = {"text": text, "speech": speech_states}
        # The last layer's state from which the answer begins: (A, L, D) -> (D,), stacked to (C, D).
        ends[behaviour] = {
            route: torch.stack([at_least_float32(question[-1, -1]).clone() for question, _ in pairs])
            for route, pairs in states.items()
        }
    picture, found = _picture(ends, [row.id for row in rows]), retrieval(ends, [texts[row.id] for row in rows])
    return LayerAnalysis(**by_layer, **picture, retrieval=found, n=len(rows))


def _states(
    listener: Listener, task: Task, rows: Sequence[Utterance], inputs: Sequence[RouteInput], answers: Answers
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each row, the states of all layers at the question's positions (A, L, D) and the answer's (A, N, D)."""
    for part in slices(rows, ROWS_AT_A_TIME):
        requests = [request(listener, task, row, item) for row, item in zip(rows[part], inputs[part], strict=True)]
        pairs = layer_states(listener.model, requests, [answers[row.id] for row in rows[part]])
        yield from ((question.cpu(), answer.cpu()) for question, answer in pairs)


def _by_layer(
    listener: Listener, text: list[tuple[Tensor, Tensor]], speech: list[tuple[Tensor, Tensor]]
) -> dict[str, Any]:
    # The answers of all clips, concatenated: (A, N, D) with N over all clips.
    text_answers = torch.cat([answer for _, answer in text], dim=1)
    speech_answers = torch.cat([answer for _, answer in speech], dim=1)
    # Each clip's question as one mean state: (A, C, D).
    text_means, speech_means = (
        torch.stack([question.double().mean(dim=1) for question, _ in pairs], dim=1) for pairs in (text, speech)
    )
    similarity = torch.nn.functional.cosine_similarity
    return {
        "cosine": similarity(text_answers.double(), speech_answers.double(), dim=-1).mean(dim=1).tolist(),
        "cosine_question": similarity(text_means, speech_means, dim=-1).mean(dim=1).tolist(),
        "cka": [
            linear_cka(one, other) for one, other in zip(text_answers.double(), speech_answers.double(), strict=True)
        ],
        "kl": lens(listener.model, text_answers, speech_answers),
    }


def linear_cka(one: Tensor, other: Tensor) -> float:
    """Linear centred kernel alignment of two sets of states (N, D): 1 if they differ only by rotation and scale."""
    one, other = one - one.mean(dim=0), other - other.mean(dim=0)
    shared = torch.linalg.matrix_norm(other.T @ one) ** 2
    return float(shared / (torch.linalg.matrix_norm(one.T @ one) * torch.linalg.matrix_norm(other.T @ other)))


def lens(llm: PreTrainedModel, text: Tensor, speech: Tensor) -> list[float]:
    """Mean divergence of each layer's predictions from states (A, N, D), at up to `LENS_POSITIONS` equidistant tokens.

    The last layer's states have been through the decoder's final norm; those of the others are put through it here.
    """
    norm = final_norm(llm)
    device = llm.get_output_embeddings().weight.device
    positions = torch.linspace(0, text.shape[1] - 1, min(LENS_POSITIONS, text.shape[1])).round().long()
    means = []
    for layer in range(len(text)):
        pair = [states[layer, positions].to(device) for states in (text, speech)]
        if layer < len(text) - 1:
            pair = [norm(states) for states in pair]
        means.append(float(np.mean(divergence(llm, *pair)[0])))
    return means


def _picture(ends: EndStates, clips: list[str]) -> dict[str, Any]:
    """Projected points with their labels."""
    labels = [(behaviour, route) for behaviour, routes in ends.items() for route in routes for _ in clips]
    states = torch.cat([points for routes in ends.values() for points in routes.values()]).double().numpy()
    return {
        "points": project(states),
        "behaviours": [behaviour for behaviour, _ in labels],
        "routes": [route for _, route in labels],
        "clips": clips * (len(labels) // len(clips)),
    }


def retrieval(ends: EndStates, texts: Sequence[str]) -> float:
    """Share of speech states whose nearest text state under the same instruction is of the same text.

    texts: of the C clips; several speakers may read one text.
    """
    hits = []
    for routes in ends.values():
        nearest = torch.cdist(routes["speech"], routes["text"]).argmin(dim=1).tolist()  # (C,)
        hits += [texts[number] == text for number, text in zip(nearest, texts, strict=True)]
    return sum(hits) / len(hits)


def project(states: Array) -> Array:
    """(M, D) -> (M, 2): the first two principal components, with fixed signs and unit standard deviation."""
    centred = states - states.mean(axis=0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    points = np.zeros((len(states), 2))
    components = (left * sizes)[:, :2]
    # A component's sign is arbitrary. Make its largest entry positive, so that equal states give equal pictures.
    largest = components[np.abs(components).argmax(axis=0), np.arange(components.shape[1])]
    points[:, : components.shape[1]] = components * np.where(largest < 0, -1.0, 1.0)
    return points / max(float(points.std()), 1e-12)
