"""How far the LLM that listens is from the LLM that reads: divergence along the text route's own answers.

In:  a loaded model and an `AlignmentPlan`: speech with transcripts, and instructions.
Out: `Alignment`: the figures of results.json and what the pictures are drawn from.
Try: `blsp evaluate --suite tiny --out results/tiny`, then results.json, "alignment"
Flow: evaluation/ — routes.py → **alignment** (layers.py looks inside) → pictures.py, report.py.

`kl` is the mean over the tokens of the text route's greedy answer, its end included, of KL(text || speech),
temperature 1, whole vocabulary, in nats. Both routes splice into the same prefix and suffix ids. Two marks to
read it by: `kl_shuffled` is the same with every clip exchanged for another (an adapter that only became
harmless does as well there), and 0 is what the transcript's own embeddings give.

Letters: N answer tokens.
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
from blsp.evaluation.routes import RouteInput, RouteInputFn, ask, plan, read_text, request, route_fingerprint
from blsp.evaluation.tasks import AlignmentPlan, Task
from blsp.inference.listener import Listener
from blsp.llm.teacher_forcing import answer_states, divergence

ROWS_AT_A_TIME = 16


@dataclass(frozen=True)
class Compared:
    """One clip under one instruction: divergence and agreement at each token of the text route's answer.

    shuffled: the divergence with another clip in its place, summed over the tokens.
    """

    kl: tuple[float, ...]
    agreed: tuple[bool, ...]
    shuffled: float


@dataclass
class Alignment:
    """figures: for results.json. compared: behaviour -> clip -> what was found, for the pictures."""

    figures: dict[str, Any] = field(default_factory=dict)
    compared: dict[str, dict[str, Compared]] = field(default_factory=dict)
    layers: LayerAnalysis | None = None


def measure(
    listener: Listener,
    wanted: AlignmentPlan,
    *,
    read: Callable[[Sequence[Utterance]], dict[str, str]],
    hear: RouteInputFn,
    reader: str,
    hearer: str,
    folder: Path,
    batch_size: int,
    samples: int,
    seed: int,
    done: Callable[[int], Any] = lambda count: None,
) -> Alignment:
    """All of the alignment analysis.

    read: rows -> the transcripts of the text route. reader, hearer: digests of what reads and what hears.
    folder: where logs are kept. samples, seed: of the bootstrap. done: told of finished clips.
    """
    result = Alignment()
    texts: dict[str, Answers] = {}
    for behaviour in wanted.behaviours:
        task = wanted.task(behaviour)
        rows = task.rows()
        transcripts = read(rows)
        route = f"text {sorted(transcripts.items())}"
        mark = route_fingerprint(reader, task, rows, route, batch_size)
        with answer_log(folder / f"{task.name}.text.jsonl", mark) as log:
            texts[behaviour] = ask(listener, task, rows, read_text(transcripts), log, batch_size)
        mark = route_fingerprint(hearer, task, rows, route, batch_size)
        with Log(folder / f"{task.name}.jsonl", mark, _read, _show) as kept:
            result.compared[behaviour] = compare(
                listener, task, rows, transcripts, hear, texts[behaviour], kept, batch_size, done
            )
        figures = summarise(list(result.compared[behaviour].values()), samples, seed)
        result.figures.setdefault("behaviours", {})[behaviour] = figures
    first = wanted.behaviours[0]
    tasks = {behaviour: wanted.task(behaviour) for behaviour in wanted.behaviours}
    result.layers = analyse_layers(listener, tasks, read, hear, texts, wanted.layer_samples)
    result.figures = {
        "behaviour": first,
        **result.figures["behaviours"][first],
        **result.layers.figures(),
        "by_position": by_position(list(result.compared[first].values())),
        "behaviours": result.figures["behaviours"],
    }
    return result


def compare(
    listener: Listener,
    task: Task,
    rows: Sequence[Utterance],
    transcripts: dict[str, str],
    hear: RouteInputFn,
    answers: Answers,
    log: Log[Compared],
    batch_size: int,
    done: Callable[[int], Any] = lambda count: None,
) -> dict[str, Compared]:
    """Each clip's divergence along the text route's answer."""
    for chunk in plan(rows, batch_size):
        if not all(row.id in log.known for row in chunk):
            log.write(_compare(listener, task, chunk, transcripts, hear(chunk), answers))
        done(len(chunk))
    return {row.id: log.known[row.id] for row in rows}


def _compare(
    listener: Listener,
    task: Task,
    rows: Sequence[Utterance],
    transcripts: dict[str, str],
    heard: Sequence[RouteInput],
    answers: Answers,
) -> dict[str, Compared]:
    found = {}
    exchanged = [*heard[1:], *heard[:1]]
    for at in _slices(rows):
        batch, given = rows[at], [answers[row.id] for row in rows[at]]
        said = ([transcripts[row.id] for row in batch], heard[at], exchanged[at])
        text, speech, other = (_states(listener, task, batch, each, given) for each in said)
        for row, states, hearing, wrong in zip(batch, text, speech, other, strict=True):
            kl, agreed = divergence(listener.model, states, hearing)
            shuffled, _ = divergence(listener.model, states, wrong)
            found[row.id] = Compared(tuple(kl), tuple(agreed), float(sum(shuffled)))
    return found


def _states(
    listener: Listener,
    task: Task,
    rows: Sequence[Utterance],
    said: Sequence[RouteInput],
    answers: Sequence[Answer],
) -> list[Tensor]:
    requests = [request(listener, task, row, words) for row, words in zip(rows, said, strict=True)]
    return answer_states(listener.model, requests, answers)


def _slices(rows: Sequence[Utterance]) -> Iterator[slice]:
    """At most `ROWS_AT_A_TIME` rows of one instruction (`plan` has put equal ones side by side)."""
    start = 0
    for end in range(1, len(rows) + 1):
        full = end - start == ROWS_AT_A_TIME
        if end == len(rows) or full or rows[end].instruction != rows[start].instruction:
            yield slice(start, end)
            start = end


def summarise(compared: Sequence[Compared], samples: int, seed: int) -> dict[str, Any]:
    """Token means with their intervals (clips are resampled): kl, kl_shuffled, top1_agreement."""
    tokens = np.array([len(each.kl) for each in compared], dtype=float)
    sums = {
        "kl": [sum(each.kl) for each in compared],
        "top1_agreement": [sum(each.agreed) for each in compared],
        "kl_shuffled": [each.shuffled for each in compared],
    }
    rows = draws(len(compared), samples, seed)
    figures: dict[str, Any] = {}
    for name, values in sums.items():
        figure = Figure(np.stack([np.array(values, dtype=float), tokens], axis=1), ratio)
        figures |= {name: figure.point(), f"{name}_ci": list(interval(figure, rows))}
    return figures | {"n": len(compared), "tokens": int(tokens.sum())}


def by_position(compared: Sequence[Compared]) -> dict[str, list[float]]:
    """Mean divergence and agreement at the answer's first, second, … token, and how many answers are that long."""
    longest = max(len(each.kl) for each in compared)
    found: dict[str, list[float]] = {"kl": [], "top1_agreement": [], "n": []}
    for place in range(longest):
        there = [each for each in compared if len(each.kl) > place]
        found["kl"].append(float(np.mean([each.kl[place] for each in there])))
        found["top1_agreement"].append(float(np.mean([each.agreed[place] for each in there])))
        found["n"].append(len(there))
    return found


def _read(row: dict[str, Any]) -> Compared:
    return Compared(tuple(row["kl"]), tuple(row["agreed"]), row["shuffled"])


def _show(compared: Compared) -> dict[str, Any]:
    return {"kl": list(compared.kl), "agreed": list(compared.agreed), "shuffled": compared.shuffled}
