"""`blsp evaluate`: ask all questions, score the answers, compare the routes, write the report.

In:  `EvaluateSettings`, or a loaded model and a `Suite`. Out: the results folder, and the table on the screen.
Try: `blsp evaluate --suite tiny --out results/tiny`
Flow: evaluation/ — tasks.py → routes.py → scoring.py → alignment.py → report.py; this file calls them in this order.
      A killed run continues with the batches that are not logged, and gives the same numbers to the last digit.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from blsp.data.jobs import lock_job
from blsp.data.manifest import Utterance
from blsp.distributed import Runtime, find_runtime, from_first, leave
from blsp.evaluation.alignment import Alignment, Routes, measure
from blsp.evaluation.answers import AnswerLog, Answers, answer_log
from blsp.evaluation.bootstrap import mean_figure
from blsp.evaluation.endpoints import MARKS, Endpoint, ask_peer, parse_endpoint, parse_peers, rate
from blsp.evaluation.recogniser import Recogniser, recogniser_of
from blsp.evaluation.report import write_report
from blsp.evaluation.results import Results, TaskResult, describe, read_results
from blsp.evaluation.routes import (
    RouteInputFn,
    ask,
    route_fingerprint,
    speech_fingerprint,
    speech_input,
    supports_language,
    text_fingerprint,
    text_input,
    transcribe_rows,
)
from blsp.evaluation.scoring import plain_words, score, score_transcripts
from blsp.evaluation.tasks import Suite, Task, TaskError, check_manifests, leave_out_unreadable, select
from blsp.inference.listener import Listener, load, load_options
from blsp.settings import EvaluateSettings
from blsp.weights.embedded import cache_root

ROUTES = ("text", "cascade", "speech")
ENGLISH_ENCODER = "the speech encoder knows English only"
ENGLISH_RECOGNISER = "the recogniser knows English only"
NOTHING_HEARD = "there is nothing to compare it with: nothing here hears the language"
NO_SENTENCE = "a peer has no set sentence for silence"


@dataclass
class Evaluation:
    """A model under evaluation, the settings, and the folder of its answers."""

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
    speech: RouteInputFn | None = None
    """the input of the speech route; None: the model's own (tests of the judge give another)"""
    recogniser: Recogniser | None = None
    """the cascade's recogniser; None: loaded when it is first needed"""
    bar: tqdm = field(default_factory=lambda: tqdm(disable=True))
    text_id: str = field(init=False)
    """a digest of the text route's model; logged answers with another digest are asked again"""
    speech_id: str = field(init=False)
    """the same for the speech route"""

    def __post_init__(self) -> None:
        self.text_id = text_fingerprint(self.listener)
        self.speech_id = speech_fingerprint(self.listener) if self.speech is None else f"{self.text_id} {self.speech!r}"

    @property
    def speech_route(self) -> RouteInputFn:
        """The input of the speech route."""
        if self.speech is None:
            self.speech = speech_input(self.listener)
        return self.speech

    def log(self, task: Task, rows: Sequence[Utterance], route: str, kind: str) -> AnswerLog:
        """The log of a route's answers. kind: other settings that decide the answers."""
        model = self.speech_id if kind == "speech" else self.text_id
        mark = route_fingerprint(model, task, rows, kind, self.batch_size)
        return answer_log(self.folder / "log" / f"{task.name}.{route}.jsonl", mark)

    def rows(self, task: Task) -> list[Utterance]:
        """The questions of a task, at most `limit`."""
        return task.rows(self.limit)

    def transcripts(self, rows: Sequence[Utterance]) -> dict[str, str]:
        """The text route's transcripts: as given, or normalised with Whisper's normaliser, as in the paper."""
        if self.normalise == "whisper":
            return {row.id: " ".join(plain_words(row.text, row.language or "en")) for row in rows}
        return {row.id: row.text for row in rows}

    def load_recogniser(self) -> Recogniser:
        """The cascade's recogniser, loaded once."""
        if self.recogniser is None:
            model = self.listener.model
            name = self.asr or recogniser_of(model.config.audio_model_id)
            self.recogniser = Recogniser(name, self.asr_compute, model.lm_head.weight.device)
        return self.recogniser

    def recognise(self, rows: Sequence[Utterance]) -> dict[str, str]:
        """The recogniser's transcripts by the row's id; those in the log are not computed again."""
        recogniser = self.load_recogniser()
        with answer_log(self.folder / "log" / "recogniser.jsonl", recogniser.mark) as log:
            return dict(zip([row.id for row in rows], recogniser.transcribe(rows, log), strict=True))

    def ask(self, task: Task, rows: Sequence[Utterance], inputs: RouteInputFn, log: AnswerLog) -> Answers:
        """The answers of the evaluated model to some rows."""
        return ask(self.listener, task, rows, inputs, log, self.batch_size, self.bar.update)


def evaluate(settings: EvaluateSettings) -> None:
    """`blsp evaluate`."""
    runtime = find_runtime(settings.device, settings.dtype, minutes=settings.collective_minutes)
    settings.out.mkdir(parents=True, exist_ok=True)
    with lock_job(settings.out, runtime.rank), tempfile.TemporaryDirectory() as scratch:
        # ranks share the batches; only the first rank keeps its logs after the run
        _evaluate(settings, settings.out if runtime.rank == 0 else Path(scratch), runtime)
        leave(runtime)


def _evaluate(settings: EvaluateSettings, folder: Path, runtime: Runtime) -> None:
    data = settings.data or cache_root() / "corpus"
    suite = select(settings.suite, settings.task, data)
    check_manifests(suite)
    peers, rater = parse_peers(settings.peer), parse_endpoint(settings.judge) if settings.judge else None
    for other in settings.compare:
        read_results(other)  # a wrong folder is refused now, and not after the questions
    evaluation = Evaluation(
        listener=load(settings.model, **load_options(settings)),
        folder=folder,
        routes=settings.routes,
        asr=settings.asr,
        asr_compute=settings.asr_compute,
        normalise=settings.normalise,
        peers=peers,
        rater=rater,
        limit=settings.limit,
        batch_size=settings.batch_size,
        seed=settings.seed,
        bootstrap=settings.bootstrap,
    )
    results = judge(evaluation, suite)
    if not any(result.answers for result in results.tasks):
        reasons = {reason for result in results.tasks for reason in result.unavailable.values()}
        raise TaskError(f"{settings.out}: no question could be asked ({'; '.join(sorted(reasons))})")
    results.environment |= {"model": settings.model, "data": str(data).replace(str(Path.home()), "~")}
    if runtime.rank == 0:
        print(write_report(results, settings.out, settings.compare))


def judge(evaluation: Evaluation, suite: Suite) -> Results:
    """Every task on every route, scored; then the alignment analysis."""
    start = time.monotonic()
    results = Results(suite.name, evaluation.bootstrap, evaluation.seed)
    if evaluation.peers or set(evaluation.routes) - {"text"}:
        suite, results.left_out = leave_out_unreadable(suite, evaluation.limit)
    rows = {task.name: evaluation.rows(task) for task in suite.tasks}
    hidden = find_runtime("cpu").rank > 0
    with tqdm(
        total=_answer_count(evaluation, suite, rows), unit="answer", smoothing=0.05, disable=hidden
    ) as evaluation.bar:
        for task in suite.tasks:
            results.tasks.append(judge_task(evaluation, task, rows[task.name]))
    if suite.alignment is not None and "speech" in evaluation.routes:
        results.alignment = judge_alignment(evaluation, suite)
    recogniser = evaluation.recogniser
    results.environment = describe(evaluation.listener) | {
        "routes": list(evaluation.routes),
        "normalise": evaluation.normalise,
        "recogniser": recogniser and f"{recogniser.name} ({recogniser.compute})",
        "batch_size": evaluation.batch_size,
        "bootstrap": evaluation.bootstrap,
        "seed": evaluation.seed,
        "limit": evaluation.limit,
        "seconds": round(time.monotonic() - start, 1),
    }
    return results


def _answer_count(evaluation: Evaluation, suite: Suite, rows: dict[str, list[Utterance]]) -> int:
    """The number of answers for the progress bar; the text route gets no clips without speech."""
    columns = len(evaluation.routes) + len(evaluation.peers)
    unasked = sum(len(rows[task.name]) for task in suite.tasks if task.kind == "no-speech")
    return columns * sum(map(len, rows.values())) - ("text" in evaluation.routes) * unasked


def judge_task(evaluation: Evaluation, task: Task, rows: list[Utterance]) -> TaskResult:
    """One task on every route."""
    result = TaskResult(task, rows, unavailable=_unavailable(evaluation, task))
    evaluation.bar.set_description(task.name)
    evaluation.bar.update(len(result.unavailable) * len(rows))
    routes = set(evaluation.routes) - set(result.unavailable)
    if "text" in routes and task.kind != "no-speech":
        with evaluation.log(task, rows, "text", f"text {evaluation.normalise}") as log:
            inputs = text_input(evaluation.transcripts(rows))
            result.answers["text"] = evaluation.ask(task, rows, inputs, log)
    if "cascade" in routes:
        _cascade(evaluation, result)
    if "speech" in routes:
        _speech(evaluation, result)
    for peer in evaluation.peers:
        _peer(evaluation, result, peer)
    _score(evaluation, result)
    return result


def _unavailable(evaluation: Evaluation, task: Task) -> dict[str, str]:
    """By route, why the task is not asked on it. Text alone is not asked where it was to be compared with speech."""
    reasons = {}
    if "cascade" in evaluation.routes and not evaluation.load_recogniser().supports_language(task.language):
        reasons["cascade"] = ENGLISH_RECOGNISER
    if "speech" in evaluation.routes and not supports_language(evaluation.listener, task.language):
        reasons["speech"] = ENGLISH_ENCODER
    if reasons and not evaluation.peers and set(evaluation.routes) == {"text", *reasons}:
        reasons["text"] = NOTHING_HEARD
    return reasons


def _speech(evaluation: Evaluation, result: TaskResult) -> None:
    task, rows = result.task, result.rows
    with evaluation.log(task, rows, "speech", "speech") as log:
        result.answers["speech"] = evaluation.ask(task, rows, evaluation.speech_route, log)
    if task.kind == "asr" and evaluation.listener.reads_out:
        with evaluation.log(task, rows, "transcript", "speech") as log:
            result.model_transcripts = transcribe_rows(
                evaluation.listener, rows, result.answers["speech"], log, evaluation.batch_size
            )


def _cascade(evaluation: Evaluation, result: TaskResult) -> None:
    """The recogniser writes a transcript, and the same LLM answers it.

    If the recogniser wrote the exact transcript, the text route's answer is used.
    """
    task, rows = result.task, result.rows
    recognised = result.recogniser_transcripts = evaluation.recognise(rows)
    text_answers, transcripts = result.answers.get("text", {}), evaluation.transcripts(rows)
    answers = {
        row.id: text_answers[row.id]
        for row in rows
        if row.id in text_answers and recognised[row.id].strip() == transcripts[row.id].strip()
    }
    evaluation.bar.update(len(answers))
    others = [row for row in rows if row.id not in answers]
    kind = f"cascade {sorted((name, words) for name, words in recognised.items())}"
    with evaluation.log(task, others, "cascade", kind) as log:
        answers |= evaluation.ask(task, others, text_input(recognised), log)
    result.answers["cascade"] = {row.id: answers[row.id] for row in rows}


def _peer(evaluation: Evaluation, result: TaskResult, peer: Endpoint) -> None:
    task, rows = result.task, result.rows
    if task.kind == "no-speech":
        result.unavailable[peer.name] = NO_SENTENCE
        evaluation.bar.update(len(rows))
        return
    with evaluation.log(task, rows, f"peer-{peer.name}", f"{peer.model}@{peer.url}") as log:
        result.answers[peer.name] = from_first(lambda: ask_peer(peer, task, rows, log, evaluation.bar.update))


def _score(evaluation: Evaluation, result: TaskResult) -> None:
    task, rows = result.task, result.rows
    for route, answers in result.answers.items():
        result.scores[route] = score(task, rows, answers, result.answers.get("text"))
    if evaluation.rater and task.kind == "chat":
        _rate(evaluation, evaluation.rater, result)
    if task.kind != "asr":
        return
    readout = {name: answer.transcript for name, answer in result.answers.get("speech", {}).items()}
    transcripts: dict[str, Mapping[str, str | None]] = {
        "recogniser": result.recogniser_transcripts,
        "readout": {} if None in readout.values() else readout,
        "transcript": result.model_transcripts,
    }
    for column, texts in transcripts.items():
        if texts:
            result.scores[column] = score_transcripts(task, rows, [texts[row.id] or "" for row in rows])


def _rate(evaluation: Evaluation, rater: Endpoint, result: TaskResult) -> None:
    """The judge's marks, compared over the questions that have one on every route."""
    marks = {route: _marks(evaluation, rater, result, route) for route in result.answers}
    unmarked = np.isnan([*marks.values()]).any(axis=0)
    for route, values in marks.items():
        figure = mean_figure(np.where(unmarked, np.nan, values), MARKS)
        result.scores[route].add("judge", result.rows, figure, [*values])
        result.scores[route].counts["unmarked"] = int(unmarked.sum())


def _marks(evaluation: Evaluation, rater: Endpoint, result: TaskResult, route: str) -> np.ndarray:
    """(N,) the judge's mark for each answer of a route; nan where it gave none."""
    answers = result.answers[route]
    kind = f"{rater.model}@{rater.url} {sorted((name, answer.text) for name, answer in answers.items())}"
    with evaluation.log(result.task, result.rows, f"{route}.judge", kind) as log:
        marks = from_first(lambda: rate(rater, result.rows, answers, log))
    return np.array([marks[row.id] for row in result.rows], dtype=float)


def judge_alignment(evaluation: Evaluation, suite: Suite) -> Alignment:
    """The alignment analysis on the suite's speech."""
    assert suite.alignment is not None
    plan = suite.alignment.limited(evaluation.limit)
    rows = plan.task(plan.behaviours[0]).rows()
    with_cascade = "cascade" in evaluation.routes and all(
        evaluation.load_recogniser().supports_language(row.language or "en") for row in rows
    )
    routes = Routes(
        text=evaluation.transcripts,
        speech=evaluation.speech_route,
        text_id=f"{evaluation.text_id} {evaluation.normalise}",
        speech_id=f"{evaluation.speech_id} {evaluation.normalise}",
        cascade=evaluation.recognise if with_cascade else None,
    )
    hidden = find_runtime("cpu").rank > 0
    with tqdm(total=len(plan.behaviours) * len(rows), unit="clip", desc="alignment", disable=hidden) as bar:
        return measure(evaluation.listener, plan, routes, evaluation.folder / "log", evaluation.batch_size, bar.update)
