"""The alignment analysis: how far the LLM's behaviour on speech is from its behaviour on text.

In:  a loaded model, an `AlignmentPlan` (speech with transcripts, and instructions) and the two routes.
Out: `Alignment`: the figures of results.json, and the values for the pictures.
Try: `blsp evaluate --suite tiny --out results/tiny`, then results.json, "alignment"
Flow: evaluation/ — routes.py → **alignment** (layers.py looks inside the LLM) → pictures.py, report.py.

`kl` is KL(text || speech) in nats, over the whole vocabulary, at temperature 1. It is the mean over the tokens of the
text route's greedy answer, with its end. Both routes use the same prefix and suffix ids. The transcript's own
embeddings would give 0. Baselines are measured on the same clips and answers, with another input in the place of the
speech vectors:

    kl_shuffled   the vectors of a clip of another text: the value of an adapter that does not listen
    kl_cascade    the words of the cascade's recogniser
    kl_readout    the adapter's own transcript as text, if it has one
    kl_deaf       as many copies of one vector, the LLM's embedding of a space

Shapes: N answer tokens, D LLM width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from blsp.data.jobs import RecordLog
from blsp.data.manifest import Utterance
from blsp.data.partners import partners
from blsp.evaluation.answers import Answer, Answers, answer_log, fill
from blsp.evaluation.bootstrap import (
    NEVER_NEGATIVE,
    SHARE,
    Figure,
    drawn_units,
    draws_of,
    grouped,
    interval,
    known_speakers,
    ratio,
    widening,
)
from blsp.evaluation.following import Following, judge_following
from blsp.evaluation.layers import LayerAnalysis, analyse_layers
from blsp.evaluation.routes import (
    RouteInput,
    RouteInputFn,
    ask,
    plan_batches,
    request,
    route_fingerprint,
    slices,
    text_input,
)
from blsp.evaluation.tasks import AlignmentPlan, Task
from blsp.inference.listener import Listener
from blsp.llm.language_model import embed
from blsp.llm.prompt import text_ids
from blsp.llm.teacher_forcing import answer_states, divergence
from blsp.model.adapter_parts import AudioEmbeds

Transcripts = Callable[[Sequence[Utterance]], dict[str, str]]
ROWS_AT_A_TIME = 16


@dataclass(frozen=True)
class Routes:
    """The two routes that are compared, each with a digest of its model.

    text: rows -> transcripts by id. speech: rows -> inputs in the place of the speech. cascade: rows -> the
    recogniser's transcripts by id, for a baseline; None: without this baseline.
    """

    text: Transcripts
    speech: RouteInputFn
    text_id: str
    speech_id: str
    cascade: Transcripts | None = None


@dataclass(frozen=True)
class Comparison:
    """One clip under one instruction: divergence and agreement at each token of the text route's answer.

    baselines: by name, the divergence with that input instead of the speech, summed over the tokens.
    """

    kl: tuple[float, ...]
    agreed: tuple[bool, ...]
    baselines: dict[str, float]


@dataclass
class Alignment:
    """comparisons: instruction -> clip -> comparison. The first instruction gives the main figures.

    speakers: of the clips, in order.
    """

    comparisons: dict[str, dict[str, Comparison]] = field(default_factory=dict)
    speakers: list[str | None] = field(default_factory=list)
    following: Following | None = None
    layers: LayerAnalysis | None = None

    @property
    def headline(self) -> list[Comparison]:
        """The comparisons under the first instruction."""
        return list(next(iter(self.comparisons.values())).values())

    def figures(self, samples: int, seed: int) -> dict[str, Any]:
        """The object "alignment" of results.json; `samples` and `seed` are the bootstrap's."""
        units, factor = drawn_units(self.speakers), widening(self.speakers)
        behaviours = {
            behaviour: summarise(list(clips.values()), samples, seed, units, factor)
            for behaviour, clips in self.comparisons.items()
        }
        first = next(iter(behaviours))
        return {
            "behaviour": first,
            **behaviours[first],
            "speakers": known_speakers(self.speakers),
            **(self.following.figures(units, samples, seed, factor) if self.following else {}),
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
    spoken: dict[str, Answers] = {}
    tasks = {behaviour: plan.task(behaviour) for behaviour in plan.behaviours}
    for behaviour, task in tasks.items():
        rows = task.rows()
        transcripts = routes.text(rows)
        route = f"text {sorted(transcripts.items())}"
        mark = route_fingerprint(routes.text_id, task, rows, route, batch_size)
        with answer_log(folder / f"{task.name}.text.jsonl", mark) as text_log:
            answers[behaviour] = ask(listener, task, rows, text_input(transcripts), text_log, batch_size)
        recognised = routes.cascade(rows) if routes.cascade else None
        route += f" baselines {recognised and sorted(recognised.items())}"
        mark = route_fingerprint(routes.speech_id, task, rows, route, batch_size)
        with RecordLog(folder / f"{task.name}.jsonl", mark, _from_row, _to_row) as log:
            inputs = partial(_inputs, listener, routes.speech, rows, transcripts, recognised)
            measured = partial(compare, listener, task, inputs, answers[behaviour])
            batches = list(plan_batches(rows, batch_size))
            records = fill(log, batches, lambda row: row.id, measured, progress)
            alignment.speakers = [row.speaker for row in rows]
            alignment.comparisons[behaviour] = {row.id: records[row.id] for row in rows}
        mark = route_fingerprint(routes.speech_id, task, rows, "speech", batch_size)
        with answer_log(folder / f"{task.name}.speech.jsonl", mark) as speech_log:
            spoken[behaviour] = ask(listener, task, rows, routes.speech, speech_log, batch_size)
    if len(tasks) > 1:
        alignment.following = judge_following(answers, spoken, {row.id: transcripts[row.id] for row in rows})
    if plan.layer_samples:
        alignment.layers = analyse_layers(listener, tasks, routes.text, routes.speech, answers, plan.layer_samples)
    return alignment


def _inputs(
    listener: Listener,
    speech: RouteInputFn,
    everyone: Sequence[Utterance],
    transcripts: dict[str, str],
    recognised: dict[str, str] | None,
    rows: Sequence[Utterance],
) -> dict[str, list[RouteInput]]:
    """By route and baseline, the inputs in the place of the speech of a batch. everyone: the rows of all batches."""
    inputs = {"text": text_input(transcripts)(rows), "speech": speech(rows)}
    inputs["shuffled"] = exchanged_speech(speech, rows, everyone, transcripts)
    inputs |= baseline_inputs(listener, inputs["speech"])
    if recognised is not None:
        inputs["cascade"] = text_input(recognised)(rows)
    return inputs


def exchanged_speech(
    speech: RouteInputFn, rows: Sequence[Utterance], everyone: Sequence[Utterance], transcripts: dict[str, str]
) -> list[RouteInput]:
    """For each row of a batch, the speech of another text: of the next such clip in the batch, or the first of all."""
    heard, texts = speech(rows), [transcripts[row.id] for row in rows]
    exchanged = []
    for text, partner in zip(texts, partners(texts), strict=True):
        same = texts[partner] == text  # one text fills the batch; a last batch may be a single row
        stranger = next((row for row in everyone if transcripts[row.id] != text), None) if same else None
        exchanged.append(speech([stranger])[0] if stranger else heard[partner])
    return exchanged


def baseline_inputs(listener: Listener, speech: Sequence[RouteInput]) -> dict[str, list[RouteInput]]:
    """By baseline that is made of the clips themselves, the inputs in the place of the speech."""
    inputs: dict[str, list[RouteInput]] = {}
    clips = [clip for clip in speech if isinstance(clip, AudioEmbeds)]
    if listener.reads_out and all(clip.token_ids is not None for clip in clips):
        inputs["readout"] = [*listener.readout(clips)]
    if ids := text_ids(listener.tokenizer, " ")[-1:]:  # some tokenizers have no token for a space
        space = embed(listener.model, ids).detach()  # (1, D)
        inputs["deaf"] = [replace(clip, vectors=space.expand(len(clip.vectors), -1)) for clip in clips]
    return inputs


def compare(
    listener: Listener,
    task: Task,
    inputs_of: Callable[[Sequence[Utterance]], dict[str, list[RouteInput]]],
    answers: Answers,
    rows: Sequence[Utterance],
) -> dict[str, Comparison]:
    """Each clip's divergence along the text route's answer. inputs_of: of text, speech and each baseline."""
    inputs, comparisons = inputs_of(rows), {}
    for part in slices(rows, ROWS_AT_A_TIME):
        batch, targets = rows[part], [answers[row.id] for row in rows[part]]
        states = {name: _states(listener, task, batch, items[part], targets) for name, items in inputs.items()}
        text, speech = states.pop("text"), states.pop("speech")  # for each row (N, D)
        for i, row in enumerate(batch):
            kl, agreed = divergence(listener.model, text[i], speech[i])
            sums = {
                name: float(sum(divergence(listener.model, text[i], rows_states[i])[0]))
                for name, rows_states in states.items()
            }
            comparisons[row.id] = Comparison(tuple(kl), tuple(agreed), sums)
    return comparisons


def _states(
    listener: Listener, task: Task, rows: Sequence[Utterance], inputs: Sequence[RouteInput], answers: Sequence[Answer]
) -> list[Tensor]:
    """For each row the last hidden states (N, D) from which the answer's tokens are predicted."""
    requests = [request(listener, task, row, item) for row, item in zip(rows, inputs, strict=True)]
    return answer_states(listener.model, requests, answers)


def summarise(
    comparisons: Sequence[Comparison],
    samples: int,
    seed: int,
    units: NDArray[np.int64] | None = None,
    factor: float = 1.0,
) -> dict[str, Any]:
    """Means over tokens with intervals: kl, top1_agreement, kl_NAME of each baseline, and kl_minus_cascade (paired).

    units: resampled as a whole, with the same draws for every figure; None: clips. factor: of the intervals
    (`bootstrap.widening`).
    """
    tokens = np.array([len(clip.kl) for clip in comparisons], dtype=float)
    sums: dict[str, list[float]] = {
        "kl": [sum(clip.kl) for clip in comparisons],
        "top1_agreement": [sum(clip.agreed) for clip in comparisons],
    }
    for name in comparisons[0].baselines:
        sums[f"kl_{name}"] = [clip.baselines[name] for clip in comparisons]
    if "kl_cascade" in sums:
        sums["kl_minus_cascade"] = [
            speech - cascade for speech, cascade in zip(sums["kl"], sums["kl_cascade"], strict=True)
        ]
    units = np.arange(len(comparisons)) if units is None else units
    rows = draws_of(units, samples, seed)
    figures: dict[str, Any] = {}
    for name, values in sums.items():
        limits = {"top1_agreement": SHARE, "kl_minus_cascade": (-math.inf, math.inf)}.get(name, NEVER_NEGATIVE)
        figure = Figure(np.stack([np.array(values, dtype=float), tokens], axis=1), ratio, limits)
        figures |= {name: figure.point(), f"{name}_ci": list(interval(grouped(figure, units), rows, factor))}
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
    return Comparison(tuple(row["kl"]), tuple(row["agreed"]), row["baselines"])


def _to_row(comparison: Comparison) -> dict[str, Any]:
    return {"kl": list(comparison.kl), "agreed": list(comparison.agreed), "baselines": comparison.baselines}
