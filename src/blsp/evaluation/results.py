"""All that an evaluation found, and results.json and samples.jsonl as the contract wants them.

In:  tasks with their answers and scores, the alignment analysis. Out: two files.
Try: `write_results(results, Path("results/tiny"))`
Flow: evaluation/ — judge.py fills it, **results** writes the numbers, report.py the page.

results.json: {"suite", "tasks": {task: {route: {metric, metric_ci, "n", faults}}}, "gaps", "alignment",
"signatures", "environment"}. "tasks" and "alignment" are the same to the digit in every run; "environment"
holds what differs.
"""

from __future__ import annotations

import json
import math
import os
import platform
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import blsp
from blsp.data.manifest import Utterance, write_manifest
from blsp.evaluation.alignment import Alignment
from blsp.evaluation.answers import Answers
from blsp.evaluation.confidence import draws, interval, relative_gap
from blsp.evaluation.scoring import MAIN_METRIC, Score
from blsp.evaluation.tasks import Task
from blsp.inference.listener import Listener

COMPARED = (("speech", "text"), ("speech", "cascade"), ("cascade", "text"))
TWICE_CHANCE, ENOUGH = 2.0, 0.5
TRANSCRIPTS = ("recogniser", "readout", "transcript")  # what was written down, without an answer
ENOUGH_BLEU = 5.0


@dataclass
class TaskResult:
    """One task: answers and scores by route; why a route is missing; what the recogniser and the
    listener (`blsp transcribe`) wrote."""

    task: Task
    rows: list[Utterance]
    answers: dict[str, Answers] = field(default_factory=dict)
    scores: dict[str, Score] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    recognised: dict[str, str] = field(default_factory=dict)
    transcribed: dict[str, str] = field(default_factory=dict)

    @property
    def metric(self) -> str:
        return MAIN_METRIC[self.task.kind]


@dataclass
class Results:
    """A finished evaluation."""

    suite: str
    bootstrap: int
    seed: int
    tasks: list[TaskResult] = field(default_factory=list)
    alignment: Alignment | None = None
    environment: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "suite": self.suite,
            "tasks": {each.task.name: self._task(each) for each in self.tasks},
            "gaps": {each.task.name: self._gaps(each) for each in self.tasks},
            "no_evidence": {
                each.task.name: why for each in self.tasks if (why := evidence(each)) is not None
            },
            "alignment": self.alignment.figures if self.alignment else {},
            "signatures": {
                each.task.name: next(iter(each.scores.values())).signatures
                for each in self.tasks
                if each.scores and next(iter(each.scores.values())).signatures
            },
            "environment": self.environment,
        }

    def _task(self, result: TaskResult) -> dict[str, Any]:
        rows = draws(len(result.rows), self.bootstrap, self.seed)
        found: dict[str, Any] = {}
        for route, score in result.scores.items():
            found[route] = {}
            for name, figure in score.figures.items():
                found[route] |= {name: figure.point(), f"{name}_ci": list(interval(figure, rows))}
            found[route] |= {"n": len(result.rows), **score.counts}
        return found | {route: {"n": 0, "unavailable": why} for route, why in result.unavailable.items()}

    def _gaps(self, result: TaskResult) -> dict[str, Any]:
        """By metric: how much larger one route's figure is than another's, in percent."""
        rows = draws(len(result.rows), self.bootstrap, self.seed)
        found: dict[str, Any] = {}
        for route, other in COMPARED:
            if route not in result.scores or other not in result.scores:
                continue
            for name, figure in result.scores[route].figures.items():
                against = result.scores[other].figures.get(name)
                if against is not None and name != "agreement":
                    percent, around = relative_gap(figure, against, rows)
                    found.setdefault(name, {})[f"{route}_vs_{other}"] = percent
                    found[name][f"{route}_vs_{other}_ci"] = list(around)
        return found


def evidence(result: TaskResult) -> str | None:
    """Why the task says nothing about listening: the LLM cannot do it on reading either. None where it does say."""
    score = result.scores.get("text")
    if score is None or result.metric not in score.figures or result.task.kind in ("chat", "continuation"):
        return None
    value, chance = score.figures[result.metric].point(), result.task.chance
    if result.metric == "wer":
        return None if value <= ENOUGH else f"a WER of {value:.2f} as text"
    if result.metric == "bleu":
        return None if value >= ENOUGH_BLEU else f"{value:.1f} BLEU as text"
    if value >= ENOUGH or (chance and value >= TWICE_CHANCE * chance):
        return None
    bar = f"twice chance, {TWICE_CHANCE * chance:.2f}" if chance else f"{ENOUGH}"
    return f"{value:.2f} as text, below {bar}"


def write_results(results: Results, folder: Path) -> None:
    """results.json and samples.jsonl, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_plain(results.to_json()), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    partial = folder / f".results.json.{os.getpid()}.partial"
    partial.write_text(text, encoding="utf-8")
    partial.replace(folder / "results.json")
    write_manifest(folder / "samples.jsonl", (sample for each in results.tasks for sample in _samples(each)))


def _samples(result: TaskResult) -> list[dict[str, Any]]:
    """One object a question: what was asked, what every route answered, and what that is worth."""
    samples = []
    for row in result.rows:
        sample: dict[str, Any] = {
            "task": result.task.name,
            **{name: value for name, value in row.to_json().items() if name not in row.extra},
            "order": result.task.order,
            "answers": {},
        }
        for route, answers in result.answers.items():
            answer = answers[row.id]
            shown: dict[str, Any] = {
                "text": answer.text,
                "finish": answer.finish or None,
                "heard": answer.heard,
            }
            if answer.option_scores is not None:
                shown["option_scores"] = list(answer.option_scores)
            shown |= result.scores[route].rows.get(row.id, {})
            sample["answers"][route] = {name: value for name, value in shown.items() if value is not None}
        for route in TRANSCRIPTS:
            if route in result.scores:
                sample["answers"][route] = result.scores[route].rows.get(row.id, {})
        samples.append(_plain(sample))
    return samples


def _plain(value: Any) -> Any:
    """JSON has no nan: an undefined figure is null."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


PACKAGES = (
    "torch",
    "transformers",
    "numpy",
    "faster-whisper",
    "ctranslate2",
    "jiwer",
    "sacrebleu",
    "whisper-normalizer",
)


def describe(listener: Listener) -> dict[str, Any]:
    """Machine, versions, and what the model is made of."""
    config = listener.model.config
    return {
        "blsp": blsp.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": _machine(),
        "threads": torch.get_num_threads(),
        "device": str(listener.model.lm_head.weight.device),
        "dtype": str(listener.model.lm_head.weight.dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "adapter": config.adapter,
        "audio_model": config.audio_model_id,
        "audio_model_sha256": config.audio_model_sha256,
        "text_model": config.text_model_id,
        "text_model_sha256": config.text_model_sha256,
        "no_speech_sentence": config.no_speech_sentence,
    }


def _machine() -> str:
    """Processor and cores, or the accelerator."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [
            line.partition(":")[2].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        name = models[0] if models else name
    return f"{name}, {os.cpu_count()} cores"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
