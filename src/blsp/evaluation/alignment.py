"""The alignment analysis: how far the LLM's behaviour on speech is from its behaviour on text.

In:  a loaded model, an `AlignmentPlan` (speech with transcripts, and instructions) and the two routes.
Out: `Alignment`: the figures of results.json, and what the pictures are drawn from.
Try: `blsp evaluate --suite tiny --out results/tiny`, then results.json, "alignment"
Flow: evaluation/ — routes.py → **alignment** (layers.py looks inside the LLM) → pictures.py, report.py.

`kl` is the mean over the tokens of the text route's greedy answer, its end included, of KL(text || speech), at
temperature 1, over the whole vocabulary, in nats. Both routes splice into the same prefix and suffix ids. Two marks
help to read it: 0 is what the transcript's own embeddings give; `kl_shuffled` is the figure with every clip exchanged
for another one, which is all that an adapter reaches that does not listen.

Shapes: N answer tokens, D LLM width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from blsp.data.manifest import Utterance
from blsp.evaluation.answers import Answer, Answers, Log, answer_log
from blsp.evaluation.confidence import Figure, draws, interval, ratio
from blsp.evaluation.layers import LayerAnalysis, analyse_layers
from blsp.evaluation.routes import (
    RouteInput,
    RouteInputFn,
    ask,
    plan_batches,
    request,
    route_fingerprint,
    text_input,
)
from blsp.evaluation.tasks import AlignmentPlan, Task
from blsp.inference.listener import Listener
from blsp.llm.teacher_forcing import answer_states, divergence

ROWS_AT_A_TIME = 16


@dataclass(frozen=True)
class Routes:
    """The two routes that are compared, each with a digest of the model that decides its answers.

    text: rows -> transcripts by id. speech: rows -> what stands in the speech's place.
    """

    text: Callable[[Sequence[Utterance]], dict[str, str]]
    speech: RouteInputFn
    text_id: str
    speech_id: str


@dataclass(frozen=True)
class Comparison:
    """One clip under one instruction: divergence and agreement at each token of the text route's answer.

    shuffled: the divergence with another clip in its place, summed over the tokens.
    """

    kl: tuple[float, ...]
    agreed: tuple[bool, ...]
    shuffled: float


@dataclass
class Alignment:
    """comparisons: instruction -> clip -> what was measured. The first instruction is the headline."""

    comparisons: dict[str, dict[str, Comparison]] = field(default_factory=dict)
    layers: LayerAnalysis | None = None

    @property
    def headline(self) -> list[Comparison]:
        """The comparisons under the first instruction."""
        return list(next(iter(self.comparisons.values())).values())

    def figures(self, samples: int, seed: int) -> dict[str, Any]:
        """The object "alignment" of results.json; `samples` and `seed` are the bootstrap's."""
        behaviours = {
            behaviour: summarise(list(clips.values()), samples, seed)
            for behaviour, clips in self.comparisons.items()
        }
        first = next(iter(behaviours))
        return {
            "behaviour": first,
            **behaviours[first],
            **(self.layers.figures() if self.layers else {}),
            "by_position": by_position(self.headline),
            "behaviours": behaviours,
        }


def measure(
    listener: Listener,
    plan: AlignmentPlan,
    routes: Routes,
    folder: Path,
    batch_size: int,
    progress: Callable[[int], Any] = lambda count: None,
) -> Alignment:
    """The whole analysis. folder: of the logs. progress: called with the number of clips just finished."""
    alignment = Alignment()
    answers: dict[str, Answers] = {}
    tasks = {behaviour: plan.task(behaviour) for behaviour in plan.behaviours}
    for behaviour, task in tasks.items():
        rows = task.rows()
        transcripts = routes.text(rows)
        route = f"text {sorted(transcripts.items())}"
        mark = route_fingerprint(routes.text_id, task, rows, route, batch_size)
        with answer_log(folder / f"{task.name}.text.jsonl", mark) as text_log:
            answers[behaviour] = ask(listener, task, rows, text_input(transcripts), text_log, batch_size)
        mark = route_fingerprint(routes.speech_id, task, rows, route, batch_size)
        with Log(folder / f"{task.name}.jsonl", mark, _from_row, _to_row) as log:
            for batch in plan_batches(rows, batch_size):
                if not all(row.id in log.records for row in batch):
                    speech = routes.speech(batch)
                    log.write(compare(listener, task, batch, transcripts, speech, answers[behaviour]))
                progress(len(batch))
            alignment.comparisons[behaviour] = {row.id: log.records[row.id] for row in rows}
    alignment.layers = analyse_layers(
        listener, tasks, routes.text, routes.speech, answers, plan.layer_samples
    )
    return alignment


def compare(
    listener: Listener,
    task: Task,
    rows: Sequence[Utterance],
    transcripts: dict[str, str],
    speech: Sequence[RouteInput],
    answers: Answers,
) -> dict[str, Comparison]:
    """Each clip's divergence along the text route's answer, with its own speech and with the next clip's."""
    comparisons = {}
    exchanged = [*speech[1:], *speech[:1]]
    for part in _slices(rows):
        batch, targets = rows[part], [answers[row.id] for row in rows[part]]
        inputs = ([transcripts[row.id] for row in batch], speech[part], exchanged[part])
        states = (_states(listener, task, batch, route_input, targets) for route_input in inputs)
        for row, from_text, from_speech, from_other in zip(batch, *states, strict=True):  # each (N, D)
            kl, agreed = divergence(listener.model, from_text, from_speech)
            shuffled, _ = divergence(listener.model, from_text, from_other)
            comparisons[row.id] = Comparison(tuple(kl), tuple(agreed), float(sum(shuffled)))
    return comparisons


def _states(
    listener: Listener,
    task: Task,
    rows: Sequence[Utterance],
    inputs: Sequence[RouteInput],
    answers: Sequence[Answer],
) -> list[Tensor]:
    """For each row the last hidden states (N, D) from which the answer's tokens are predicted."""
    requests = [request(listener, task, row, item) for row, item in zip(rows, inputs, strict=True)]
    return answer_states(listener.model, requests, answers)


def _slices(rows: Sequence[Utterance]) -> Iterator[slice]:
    """At most `ROWS_AT_A_TIME` rows of one instruction (`plan_batches` puts equal instructions side by side)."""
    start = 0
    for end in range(1, len(rows) + 1):
        full = end - start == ROWS_AT_A_TIME
        if end == len(rows) or full or rows[end].instruction != rows[start].instruction:
            yield slice(start, end)
            start = end


def summarise(comparisons: Sequence[Comparison], samples: int, seed: int) -> dict[str, Any]:
    """Means over tokens with their intervals (clips are resampled): kl, kl_shuffled, top1_agreement."""
    tokens = np.array([len(clip.kl) for clip in comparisons], dtype=float)
    sums = {
        "kl": [sum(clip.kl) for clip in comparisons],
        "top1_agreement": [sum(clip.agreed) for clip in comparisons],
        "kl_shuffled": [clip.shuffled for clip in comparisons],
    }
    rows = draws(len(comparisons), samples, seed)
    figures: dict[str, Any] = {}
    for name, values in sums.items():
        figure = Figure(np.stack([np.array(values, dtype=float), tokens], axis=1), ratio)
        figures |= {name: figure.point(), f"{name}_ci": list(interval(figure, rows))}
    return figures | {"n": len(comparisons), "tokens": int(tokens.sum())}


def by_position(comparisons: Sequence[Comparison]) -> dict[str, list[float]]:
    """Mean divergence and agreement at the answer's first, second, … token, and how many answers are that long."""
    longest = max(len(clip.kl) for clip in comparisons)
    means: dict[str, list[float]] = {"kl": [], "top1_agreement": [], "n": []}
    for position in range(longest):
        long_enough = [clip for clip in comparisons if len(clip.kl) > position]
        means["kl"].append(float(np.mean([clip.kl[position] for clip in long_enough])))
        means["top1_agreement"].append(float(np.mean([clip.agreed[position] for clip in long_enough])))
        means["n"].append(len(long_enough))
    return means


def _from_row(row: dict[str, Any]) -> Comparison:
    return Comparison(tuple(row["kl"]), tuple(row["agreed"]), row["shuffled"])


def _to_row(comparison: Comparison) -> dict[str, Any]:
    return {"kl": list(comparison.kl), "agreed": list(comparison.agreed), "shuffled": comparison.shuffled}
