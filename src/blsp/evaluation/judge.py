"""`blsp evaluate`: ask, score, compare, report.

In:  `EvaluateSettings`, or a loaded model and a `Suite`. Out: the results folder, and the table on the screen.
Try: `blsp evaluate --suite tiny --out results/tiny`
Flow: evaluation/ — tasks.py → routes.py → scoring.py → alignment.py → report.py, in this order, here.

Every answer is logged when its batch is done; the same command goes on where a killed one stopped, with the
same numbers to the digit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from blsp.data.manifest import Utterance
from blsp.evaluation.alignment import Alignment, measure
from blsp.evaluation.answers import AnswerLog, Answers, answer_log, fingerprint
from blsp.evaluation.confidence import mean_figure
from blsp.evaluation.endpoints import Endpoint, ask_peer, parse_endpoint, parse_peers, rate
from blsp.evaluation.recogniser import Recogniser, recogniser_of
from blsp.evaluation.report import write_report
from blsp.evaluation.results import Results, TaskResult, describe
from blsp.evaluation.routes import (
    RouteInputFn,
    ask,
    hear_speech,
    listener_fingerprint,
    read_text,
    reader_fingerprint,
    route_fingerprint,
    supports_language,
    write_down,
)
from blsp.evaluation.scoring import plain_words, score, score_transcripts
from blsp.evaluation.tasks import Suite, Task, check_manifests, check_recordings, select
from blsp.inference.listener import Listener, load
from blsp.weights.embedded import cache_root

if TYPE_CHECKING:
    from blsp.settings import EvaluateSettings

ROUTES = ("text", "cascade", "speech")
UNHEARD = "the speech encoder knows English only"
NO_SENTENCE = "a peer has no set sentence for silence"


@dataclass
class Evaluation:
    """A model on the bench: what it is asked with, and where its answers are kept."""

    listener: Listener
    folder: Path
    routes: Sequence[str] = ROUTES
    asr: str | None = None
    asr_compute: str = "int8"
    normalise: str = "none"
    peers: Sequence[Endpoint] = ()
    rater: Endpoint | None = None
    limit: int | None = None
    batch_size: int = 32
    seed: int = 0
    bootstrap: int = 1000
    hear: RouteInputFn | None = (
        None  # the speech route's ears, where they are not the model's own (tests of the judge)
    )
    reader: str = ""  # digests of the text and speech inputs: they decide whether logged answers still hold
    hearer: str = ""
    recogniser: Recogniser | None = None
    bar: tqdm = field(default_factory=lambda: tqdm(disable=True))

    def __post_init__(self) -> None:
        self.reader = reader_fingerprint(self.listener)
        self.hearer = (
            listener_fingerprint(self.listener) if self.hear is None else f"{self.reader} {self.hear!r}"
        )
        self.hear = self.hear or hear_speech(self.listener)

    def log(self, task: Task, rows: Sequence[Utterance], route: str, kind: str) -> AnswerLog:
        model = self.hearer if kind == "speech" else self.reader
        mark = route_fingerprint(model, task, rows, kind, self.batch_size)
        return answer_log(self.folder / "log" / f"{task.name}.{route}.jsonl", mark)

    def rows(self, task: Task) -> list[Utterance]:
        return task.rows()[: self.limit]

    def read(self, rows: Sequence[Utterance]) -> dict[str, str]:
        """The transcripts that the text route reads: as given, or through Whisper's normaliser (the paper's way)."""
        if self.normalise == "whisper":
            return {row.id: " ".join(plain_words(row.text, row.language or "en")) for row in rows}
        return {row.id: row.text for row in rows}


def evaluate(settings: EvaluateSettings) -> None:
    """`blsp evaluate`."""
    data = settings.data or cache_root() / "corpus"
    suite = select(settings.suite, settings.task, data)
    check_manifests(suite)
    bench = Evaluation(
        listener=load(settings.model, device=settings.device, dtype=settings.dtype),
        folder=settings.out,
        routes=settings.routes,
        asr=settings.asr,
        asr_compute=settings.asr_compute,
        normalise=settings.normalise,
        peers=parse_peers(settings.peer),
        rater=parse_endpoint(settings.judge) if settings.judge else None,
        limit=settings.limit,
        batch_size=settings.batch_size,
        seed=settings.seed,
        bootstrap=settings.bootstrap,
    )
    results = judge(bench, suite)
    results.environment |= {"model": settings.model, "data": str(data).replace(str(Path.home()), "~")}
    print(write_report(results, settings.out, settings.compare))


def judge(bench: Evaluation, suite: Suite) -> Results:
    """Every task on every route, scored; then the alignment analysis."""
    began = time.monotonic()
    results = Results(suite.name, bench.bootstrap, bench.seed)
    rows = {task.name: bench.rows(task) for task in suite.tasks}
    if bench.peers or set(bench.routes) - {"text"}:
        check_recordings(rows)
    unasked = sum(
        len(rows[task.name]) for task in suite.tasks if task.kind == "no-speech" and "text" in bench.routes
    )
    total = (len(bench.routes) + len(bench.peers)) * sum(map(len, rows.values())) - unasked
    with tqdm(total=total, unit="answer", smoothing=0.05) as bench.bar:
        for task in suite.tasks:
            results.tasks.append(judge_task(bench, task, rows[task.name]))
    if suite.alignment is not None and "speech" in bench.routes:
        results.alignment = judge_alignment(bench, suite)
    results.environment = describe(bench.listener) | {
        "routes": list(bench.routes),
        "normalise": bench.normalise,
        "recogniser": bench.recogniser and f"{bench.recogniser.name} ({bench.recogniser.compute})",
        "batch_size": bench.batch_size,
        "bootstrap": bench.bootstrap,
        "seed": bench.seed,
        "limit": bench.limit,
        "seconds": round(time.monotonic() - began, 1),
    }
    return results


def judge_task(bench: Evaluation, task: Task, rows: list[Utterance]) -> TaskResult:
    """One task on every route."""
    result = TaskResult(task, rows)
    bench.bar.set_description(task.name)
    if "text" in bench.routes and task.kind != "no-speech":
        with bench.log(task, rows, "text", f"text {bench.normalise}") as log:
            result.answers["text"] = _ask(bench, task, rows, read_text(bench.read(rows)), log)
    if "cascade" in bench.routes:
        _cascade(bench, result)
    if "speech" in bench.routes:
        _speech(bench, result)
    for peer in bench.peers:
        if task.kind == "no-speech":
            result.unavailable[peer.name] = NO_SENTENCE
            bench.bar.update(len(rows))
            continue
        with bench.log(task, rows, f"peer-{peer.name}", f"{peer.model}@{peer.url}") as log:
            result.answers[peer.name] = ask_peer(peer, task, rows, log, bench.bar.update)
    _score(bench, result)
    return result


def _ask(
    bench: Evaluation, task: Task, rows: Sequence[Utterance], say: RouteInputFn, log: AnswerLog
) -> Answers:
    return ask(bench.listener, task, rows, say, log, bench.batch_size, bench.bar.update)


def _speech(bench: Evaluation, result: TaskResult) -> None:
    task, rows = result.task, result.rows
    if not supports_language(bench.listener, task.language):
        result.unavailable["speech"] = UNHEARD
        bench.bar.update(len(rows))
        return
    assert bench.hear is not None
    with bench.log(task, rows, "speech", "speech") as log:
        result.answers["speech"] = _ask(bench, task, rows, bench.hear, log)
    if task.kind == "asr" and bench.listener.reads_out:
        with bench.log(task, rows, "transcript", "speech") as log:
            result.transcribed = write_down(bench.listener, rows, log, bench.batch_size)


def _cascade(bench: Evaluation, result: TaskResult) -> None:
    """The recogniser writes, the same LLM answers; where it wrote the very transcript, the text route has answered."""
    task, rows = result.task, result.rows
    recogniser = bench.recogniser = bench.recogniser or _load_recogniser(bench)
    if not recogniser.supports_language(task.language):
        result.unavailable["cascade"] = "the recogniser knows English only"
        bench.bar.update(len(rows))
        return
    mark = fingerprint(name=recogniser.name, compute=recogniser.compute)
    with answer_log(bench.folder / "log" / "recogniser.jsonl", mark) as log:
        written = dict(zip([row.id for row in rows], recogniser.transcribe(rows, log), strict=True))
    result.recognised = written
    text, read = result.answers.get("text", {}), bench.read(rows)
    same = {row.id for row in rows if row.id in text and written[row.id].strip() == read[row.id].strip()}
    others = [row for row in rows if row.id not in same]
    kind = f"cascade {sorted((name, words) for name, words in written.items())}"
    with bench.log(task, others, "cascade", kind) as log:
        answers = _ask(bench, task, others, read_text(written), log)
    bench.bar.update(len(same))
    result.answers["cascade"] = {row.id: text[row.id] if row.id in same else answers[row.id] for row in rows}


def _load_recogniser(bench: Evaluation) -> Recogniser:
    name = bench.asr or recogniser_of(bench.listener.model.config.audio_model_id)
    device = bench.listener.model.lm_head.weight.device.type
    return Recogniser(name, bench.asr_compute, device)


def _score(bench: Evaluation, result: TaskResult) -> None:
    task, rows, text = result.task, result.rows, result.answers.get("text")
    for route, answers in result.answers.items():
        result.scores[route] = score(task, rows, answers, text)
        if bench.rater and task.kind == "chat":
            _rate(bench, bench.rater, result, route)
    if task.kind != "asr":
        return
    if result.recognised:
        written = [result.recognised[row.id] for row in rows]
        result.scores["recogniser"] = score_transcripts(task, rows, written)
    speech = result.answers.get("speech", {})
    if speech and all(answer.heard is not None for answer in speech.values()):
        result.scores["readout"] = score_transcripts(task, rows, [speech[row.id].heard or "" for row in rows])
    if result.transcribed:
        written = [result.transcribed[row.id] for row in rows]
        result.scores["transcript"] = score_transcripts(task, rows, written)


def _rate(bench: Evaluation, rater: Endpoint, result: TaskResult, route: str) -> None:
    answers = result.answers[route]
    kind = f"{rater.model}@{rater.url} {sorted((name, answer.text) for name, answer in answers.items())}"
    with bench.log(result.task, result.rows, f"{route}.judge", kind) as log:
        marks = rate(rater, result.rows, answers, log)
    values = [marks[row.id] for row in result.rows]
    result.scores[route].add("judge", result.rows, mean_figure(torch.tensor(values).double().numpy()), values)


def judge_alignment(bench: Evaluation, suite: Suite) -> Alignment:
    """The alignment analysis on the suite's speech."""
    plan = suite.alignment
    assert plan is not None and bench.hear is not None
    plan = replace(plan, samples=min(filter(None, (plan.samples, bench.limit)), default=None))
    total = len(plan.behaviours) * len(plan.task(plan.behaviours[0]).rows())
    with tqdm(total=total, unit="clip", desc="alignment") as bar:
        return measure(
            bench.listener,
            plan,
            read=bench.read,
            hear=bench.hear,
            reader=f"{bench.reader} {bench.normalise}",
            hearer=f"{bench.hearer} {bench.normalise}",
            folder=bench.folder / "log",
            batch_size=bench.batch_size,
            samples=bench.bootstrap,
            seed=bench.seed,
            done=bar.update,
        )
