"""The results of an evaluation, and the files results.json and samples.jsonl.

In:  tasks with their answers and scores, the alignment analysis. Out: two files.
Try: `write_results(results, Path("results/tiny"))`
Flow: evaluation/ — judge.py → **results** (the numbers) → report.py (the page).

results.json: {"suite", "tasks": {task: {route: {metric, metric_ci, "n", faults}}}, "gaps", "alignment",
"signatures", "left_out": [{task, id, audio, reason}], "environment"}. "tasks" and "alignment" are the same to the last
digit in every run; "environment" holds what differs between runs.
"""

import json
import math
import os
import platform
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import blsp
from blsp.data.files import write_json
from blsp.data.manifest import Utterance, write_manifest
from blsp.evaluation.alignment import Alignment
from blsp.evaluation.answers import Answers
from blsp.evaluation.bootstrap import drawn_units, draws_of, grouped, interval, known_speakers, relative_gap, widening
from blsp.evaluation.scoring import MAIN_METRIC, Score
from blsp.evaluation.tasks import LeftOut, Task
from blsp.inference.listener import Listener

COMPARED = (("speech", "text"), ("speech", "cascade"), ("cascade", "text"))
TWICE_CHANCE, ENOUGH, ENOUGH_BLEU = 2.0, 0.5, 5.0  # the least that the text route must reach: see `lacks_evidence`
TRANSCRIPTS = ("recogniser", "readout", "transcript")  # columns of transcripts, without an answer


@dataclass
class TaskResult:
    """One task: answers and scores by route.

    unavailable: route -> why it is missing. recogniser_transcripts: by the cascade's recogniser; model_transcripts: by
    `blsp transcribe`.
    """

    task: Task
    rows: list[Utterance]
    answers: dict[str, Answers] = field(default_factory=dict)
    scores: dict[str, Score] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    recogniser_transcripts: dict[str, str] = field(default_factory=dict)
    model_transcripts: dict[str, str] = field(default_factory=dict)

    @property
    def metric(self) -> str:
        """The metric that the report shows first."""
        return MAIN_METRIC[self.task.kind]

    def lacks_evidence(self) -> str | None:
        """Why the task is no evidence about listening: the LLM cannot do it on text either. None if it can."""
        text = self.scores.get("text")
        if text is None or self.metric not in text.figures or self.task.kind in ("chat", "continuation"):
            return None
        value, chance = text.figures[self.metric].point(), self.task.chance
        if self.metric == "wer":
            return None if value <= ENOUGH else f"a WER of {value:.2f} as text"
        if self.metric == "bleu":
            return None if value >= ENOUGH_BLEU else f"{value:.1f} BLEU as text"
        if value >= ENOUGH or (chance and value >= TWICE_CHANCE * chance):
            return None
        bar = f"twice chance, {TWICE_CHANCE * chance:.2f}" if chance else f"{ENOUGH}"
        return f"{value:.2f} as text, below {bar}"


@dataclass
class Results:
    """A finished evaluation. bootstrap, seed: number of bootstrap samples, and their seed."""

    suite: str
    bootstrap: int
    seed: int
    tasks: list[TaskResult] = field(default_factory=list)
    alignment: Alignment | None = None
    left_out: list[LeftOut] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The content of results.json, with nan for undefined figures."""
        doubts = {result.task.name: result.lacks_evidence() for result in self.tasks}
        return {
            "suite": self.suite,
            "tasks": {result.task.name: self._scores(result) for result in self.tasks},
            "gaps": {result.task.name: self._gaps(result) for result in self.tasks},
            "no_evidence": {name: reason for name, reason in doubts.items() if reason is not None},
            "speakers": {
                result.task.name: known_speakers([row.speaker for row in result.rows]) for result in self.tasks
            },
            "alignment": self.alignment.figures(self.bootstrap, self.seed) if self.alignment else {},
            "signatures": {
                result.task.name: next(iter(result.scores.values())).signatures
                for result in self.tasks
                if result.scores and next(iter(result.scores.values())).signatures
            },
            "left_out": [asdict(row) for row in self.left_out],
            "environment": self.environment,
        }

    def _scores(self, result: TaskResult) -> dict[str, Any]:
        """By route: all metrics with intervals, the number of questions, and counts of faults."""
        speakers = [row.speaker for row in result.rows]
        units, factor = drawn_units(speakers), widening(speakers)
        rows = draws_of(units, self.bootstrap, self.seed)
        routes: dict[str, Any] = {}
        for route, score in result.scores.items():
            routes[route] = {}
            for name, figure in score.figures.items():
                bounds = interval(grouped(figure, units), rows, factor)
                routes[route] |= {name: figure.point(), f"{name}_ci": list(bounds)}
            routes[route] |= {"n": len(result.rows), **score.counts}
        return routes | {route: {"n": 0, "unavailable": why} for route, why in result.unavailable.items()}

    def _gaps(self, result: TaskResult) -> dict[str, Any]:
        """By metric: how much larger one route's figure is than another's, in percent."""
        speakers = [row.speaker for row in result.rows]
        units, factor = drawn_units(speakers), widening(speakers)
        rows = draws_of(units, self.bootstrap, self.seed)
        gaps: dict[str, Any] = {}
        for route, other in COMPARED:
            if route not in result.scores or other not in result.scores:
                continue
            for name, figure in result.scores[route].figures.items():
                other_figure = result.scores[other].figures.get(name)
                if other_figure is not None and name != "agreement":
                    pair = grouped(figure, units), grouped(other_figure, units)
                    percent, bounds = relative_gap(*pair, rows, factor)
                    gaps.setdefault(name, {})[f"{route}_vs_{other}"] = percent
                    gaps[name][f"{route}_vs_{other}_ci"] = list(bounds)
        return gaps


def write_results(results: Results, folder: Path) -> None:
    """Write results.json and samples.jsonl, each atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", _plain(results.to_json()))
    write_manifest(folder / "samples.jsonl", (sample for task in results.tasks for sample in _samples(task)))


class ResultsError(ValueError):
    """A results.json that cannot be read; the message names it."""


def read_results(folder: Path) -> dict[str, Any]:
    """The content of another evaluation's results.json."""
    path = folder / "results.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path}: cannot be read ({error}); --compare takes the folders of earlier runs") from error
    if not isinstance(content, dict) or not {"tasks", "alignment"} <= set(content):
        raise ResultsError(f"{path}: holds no results of `blsp evaluate`; --compare takes the folders of earlier runs")
    return content


def _samples(result: TaskResult) -> list[dict[str, Any]]:
    """One object for each question: the question, each route's answer, and its scores."""
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
            fields = {
                "text": answer.text,
                "finish": answer.finish or None,
                "heard": answer.transcript,
                "option_scores": None if answer.option_scores is None else list(answer.option_scores),
                **result.scores[route].rows.get(row.id, {}),
            }
            sample["answers"][route] = {name: value for name, value in fields.items() if value is not None}
        for route in TRANSCRIPTS:
            if route in result.scores:
                sample["answers"][route] = result.scores[route].rows.get(row.id, {})
        samples.append(_plain(sample))
    return samples


def _plain(value: Any) -> Any:
    """The same value with null for nan, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# packages whose versions are stored
STACK = ("torch", "transformers", "numpy", "faster-whisper", "ctranslate2", "jiwer", "sacrebleu", "whisper-normalizer")


def describe(listener: Listener) -> dict[str, Any]:
    """The environment of a run: machine, versions, and the parts of the model."""
    config = listener.model.config
    return {
        "blsp": blsp.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": _machine(),
        "threads": torch.get_num_threads(),
        "device": str(listener.model.lm_head.weight.device),
        "dtype": str(listener.model.lm_head.weight.dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "packages": {name: number for name in STACK if (number := _version(name))},
        "adapter": config.adapter,
        "audio_model": config.audio_model_id,
        "audio_model_sha256": config.audio_model_sha256,
        "text_model": config.text_model_id,
        "text_model_sha256": config.text_model_sha256,
        "attention": listener.model.model.language_model.config._attn_implementation,
        "rescore": config.rescore,
        "full_window": config.full_window,
        "no_speech_sentence": config.no_speech_sentence,
    }


def _machine() -> str:
    """The processor and its number of cores, or the accelerator."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        name = models[0] if models else name
    return f"{name}, {os.cpu_count()} cores"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
