"""Tasks and suites, read from YAML, and the rows of a task, read from its manifest.

In:  the name of a suite of the package (`tiny`), or a YAML file of your own.
Out: `Suite`: tasks in order, and the data of the alignment analysis.
Try: `load_suite("tiny", Path("~/.cache/blsp/corpus").expanduser()).tasks[0].rows()`
Flow: evaluation/ — **tasks** → routes → scoring → report.

A task is data: a new one needs ten lines of YAML (docs/evaluation.md). Kinds of task differ only in how an answer is
scored:

    asr           the LLM repeats what was said                     WER, CER
    st            it translates                                     BLEU, chrF
    slu           intents by choice, slots by short answer          accuracy; exact match and F1
    sqa           spoken questions, short answers or choice         accuracy, exact match, F1
    chat          open questions                                    chrF against the text route's answer, a judge
    continuation  the behaviour that was trained                    chrF against the text route's answer
    no-speech     silence, noise, music: nothing was said           accuracy: the set sentence and nothing else
"""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml

from blsp.data.audio import AudioError
from blsp.data.clips import load_clip
from blsp.data.manifest import Manifest, Utterance
from blsp.llm.instructions import BehaviourError, instruction_for
from blsp.llm.prompt import ORDERS, Order

KINDS = ("asr", "st", "slu", "sqa", "chat", "continuation", "no-speech")
SUITES = resources.files("blsp.evaluation") / "suites"


Clip = tuple[str, float | None, float | None]  # audio, start, duration of a row


class TaskError(ValueError):
    """An invalid task or suite; the message names the file, the task and what to do."""


@dataclass(frozen=True)
class Task:
    """One set of questions and how they are asked and scored."""

    name: str
    kind: str
    manifest: str
    """JSONL of utterances, relative to --data in a suite of the package, to the file's folder in a YAML file"""
    note: str = ""
    """one sentence for the report: whose speech, what is asked"""
    instruction: str = ""
    """asked with every row; a row's own instruction wins; empty: the speech is the question"""
    behaviour: str = ""
    """instead of `instruction`: one of llm/instructions.py, e.g. repeat, translate:fr"""
    order: Order = "instruction-first"
    max_new_tokens: int = 128
    """the paper's zero-shot setting"""
    language: str = "en"
    """ISO 639-1 of the speech; a row's own language wins"""
    answer_language: str = "en"
    """ISO 639-1 in which an answer is expected"""
    samples: int | None = None
    """ask so many rows, drawn by a hash of their names, so that the same prompts are drawn in every language"""
    min_words: int = 0
    """leave out rows with a shorter transcript"""
    references: str | None = None
    """another manifest whose transcripts are the references; rows are matched by what follows their id's first /"""
    distractors: str | None = None
    """a field of the rows that lists wrong answers: with the reference they are the options"""
    chance: float = 0.0
    """what guessing scores, where options are few"""
    generate: bool = True
    """False: choose among the options by likelihood only"""
    folder: Path = field(default=Path("."), compare=False, repr=False)
    unreadable: frozenset[Clip] = field(default=frozenset(), compare=False, repr=False)
    """recordings that are left out (`leave_out_unreadable`)"""

    def rows(self, limit: int | None = None) -> list[Utterance]:
        """The first `limit` questions, each with its instruction, language (and reference) filled in."""
        rows = [row for row in Manifest(self._path(self.manifest)) if len(row.text.split()) >= self.min_words]
        if self.references is not None:
            texts = {_prompt_name(row.id): row.text for row in Manifest(self._path(self.references))}
            pairs = [(row, texts.get(_prompt_name(row.id))) for row in rows]
            rows = [replace(row, reference=text) for row, text in pairs if text is not None]
        rows = [row for row in _draw(rows, self.samples)[:limit] if clip_of(row) not in self.unreadable]
        if not rows:
            raise TaskError(f"task {self.name!r}: {self._path(self.manifest)} has no row that it could ask")
        return [self._with_question(row) for row in rows]

    @property
    def wording(self) -> str:
        """The instruction, in words."""
        return instruction_for(self.behaviour) if self.behaviour else self.instruction

    def _with_question(self, row: Utterance) -> Utterance:
        """The row with its instruction and options; raise `TaskError` where it cannot be scored."""
        if self.kind == "st" and row.reference is None:
            raise TaskError(f"task {self.name!r}: row {row.id!r} has no reference to score against")
        if self.kind in ("slu", "sqa") and row.options is None and row.reference is None:
            raise TaskError(f"task {self.name!r}: row {row.id!r} has neither options nor a reference")
        if self.distractors is not None:
            wrong = row.extra.get(self.distractors)
            if not wrong or row.reference is None:
                raise TaskError(f"task {self.name!r}: row {row.id!r} lists no wrong answers under {self.distractors!r}")
            row = replace(row, options=tuple(sorted({row.reference, *wrong})))
        if empty := [option for option in row.options or () if not option.strip()]:
            raise TaskError(f"task {self.name!r}: row {row.id!r}: its option {empty[0]!r} is empty")
        if row.options is not None and row.reference not in row.options:
            raise TaskError(f"task {self.name!r}: row {row.id!r}: its reference is not among its options")
        instruction = self.wording if row.instruction is None else row.instruction
        return replace(row, instruction=instruction, language=row.language or self.language)

    def _path(self, name: str) -> Path:
        return self.folder / Path(name).expanduser()


@dataclass(frozen=True)
class AlignmentPlan:
    """The speech and the instructions on which the behaviour of the routes is compared."""

    manifest: str
    behaviours: tuple[str, ...] = ("continue", "repeat", "answer")
    """the first is the headline"""
    order: Order = "instruction-first"
    samples: int | None = None
    min_words: int = 0
    layer_samples: int = 24
    """clips looked at layer by layer and in the picture of instructions; 0: without both"""
    max_new_tokens: int = 64
    language: str = "en"
    """ISO 639-1 of the speech; a row's own language wins"""
    folder: Path = field(default=Path("."), compare=False, repr=False)
    unreadable: frozenset[Clip] = field(default=frozenset(), compare=False, repr=False)

    def limited(self, limit: int | None) -> "AlignmentPlan":
        """The plan with `limit` samples at most."""
        return replace(self, samples=min(filter(None, (self.samples, limit)), default=None))

    def task(self, behaviour: str) -> Task:
        """The questions of one behaviour, as a task."""
        shared = {f.name: getattr(self, f.name) for f in fields(self)} | {"kind": "continuation"}
        del shared["behaviours"], shared["layer_samples"]
        return Task(name=f"alignment.{behaviour.replace(':', '-')}", behaviour=behaviour, **shared)


@dataclass(frozen=True)
class Suite:
    """Tasks in the order of the report, and the alignment analysis, if one is wanted."""

    name: str
    tasks: tuple[Task, ...]
    alignment: AlignmentPlan | None = None


def load_suite(name: str, data: Path) -> Suite:
    """A suite of the package, its manifests in the folder `data`; or a YAML file, its manifests beside it."""
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        return _suite(path.stem, _mapping(path.read_text(encoding="utf-8"), name), name, path.absolute().parent)
    source = SUITES / f"{name}.yaml"
    if not source.is_file():
        names = ", ".join(sorted(file.name.removesuffix(".yaml") for file in SUITES.iterdir()))
        raise TaskError(f"--suite {name}: there are {names}; or name a YAML file")
    return _suite(name, _mapping(source.read_text(encoding="utf-8"), name), name, data)


def select(suite: str | None, names: Sequence[str], data: Path) -> Suite:
    """The tasks that `--suite` and `--task` name: a whole suite, some tasks of it, or tasks of YAML files."""
    if not names:
        assert suite is not None
        return load_suite(suite, data)
    whole = load_suite(suite or "tiny", data)
    by_name = {task.name: task for task in whole.tasks}
    chosen: list[Task] = []
    alignment = whole.alignment if suite else None
    for name in names:
        if name.endswith((".yaml", ".yml")):
            own = load_suite(name, data)
            chosen.extend(own.tasks)
            alignment = own.alignment or alignment
        elif name in by_name:
            chosen.append(by_name[name])
        else:
            raise TaskError(f"--task {name}: {whole.name} has {', '.join(by_name)}; or name a YAML file")
    _check_names(chosen, "--task")
    return Suite(whole.name if suite else "+".join(task.name for task in chosen), tuple(chosen), alignment)


def check_manifests(suite: Suite) -> None:
    """Raise `TaskError` for the first manifest that is not there, before anything heavy is loaded."""
    manifests = [(task.folder, name) for task in suite.tasks for name in (task.manifest, task.references) if name]
    if suite.alignment is not None:
        manifests.append((suite.alignment.folder, suite.alignment.manifest))
    for folder, name in manifests:
        path = folder / Path(name).expanduser()
        if not path.is_file():
            raise TaskError(
                f"{path}: no such manifest. The manifests of a YAML file lie beside it; those of the suites by name "
                "lie in --data, and `make eval-data` makes their speech once"
            )


@dataclass(frozen=True)
class LeftOut:
    """A recording that cannot be read, and why; of the task that has it."""

    task: str
    id: str
    audio: str
    reason: str


def leave_out_unreadable(suite: Suite, limit: int | None) -> tuple[Suite, list[LeftOut]]:
    """The suite without the questions whose recordings cannot be read, on every route alike; and these.

    Every recording is decoded once, before hours of work. Raises TaskError for a task of which none is left.
    """
    plan = suite.alignment and suite.alignment.limited(limit)
    left_out: list[LeftOut] = []
    unreadable: set[Clip] = set()
    for task in (*suite.tasks, *([plan.task(plan.behaviours[0])] if plan else ())):
        rows = task.rows(limit)
        with ThreadPoolExecutor(os.cpu_count()) as decoders:  # libsndfile and soxr let other threads run
            reasons = list(decoders.map(_trouble, rows))
        if all(reasons):
            raise TaskError(f"task {task.name!r}: none of its recordings can be read; row {rows[0].id!r}: {reasons[0]}")
        for row, reason in zip(rows, reasons, strict=True):
            if reason:
                left_out.append(LeftOut(task.name, row.id, row.audio, reason))
                unreadable.add(clip_of(row))
    clips = frozenset(unreadable)
    tasks = tuple(replace(task, unreadable=clips) for task in suite.tasks)
    return Suite(suite.name, tasks, suite.alignment and replace(suite.alignment, unreadable=clips)), left_out


def _trouble(row: Utterance) -> str | None:
    """Why the row's recording cannot be read; None where it can."""
    try:
        load_clip(row)
    except AudioError as error:
        return str(error)
    return None


def clip_of(row: Utterance) -> Clip:
    """Which part of which file the row's recording is."""
    return row.audio, row.start, row.duration


def _suite(name: str, content: dict[str, Any], where: str, folder: Path) -> Suite:
    mappings = content.get("tasks", [content] if "kind" in content else None)
    if not isinstance(mappings, list) or not mappings:
        raise TaskError(f"{where}: holds neither one task (name, kind, manifest) nor a list `tasks:` of them")
    tasks = tuple(_task(mapping, where, folder) for mapping in mappings)
    _check_names(tasks, where)
    plan = None
    if "alignment" in content:
        mapping = _checked(AlignmentPlan, content["alignment"], f"{where}, alignment")
        mapping["behaviours"] = tuple(mapping.get("behaviours", AlignmentPlan.behaviours))
        plan = AlignmentPlan(**mapping, folder=folder)
    return Suite(name, tasks, plan)


def _check_names(tasks: Sequence[Task], where: str) -> None:
    """Raise `TaskError` for two tasks of one name: rows, logs and results are found by it."""
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise TaskError(f"{where}: two tasks are called {max(names, key=names.count)!r}; rename one")


def _task(mapping: Any, where: str, folder: Path) -> Task:
    where = f"{where}, task {mapping.get('name')!r}" if isinstance(mapping, dict) else where
    task = Task(**_checked(Task, mapping, where), folder=folder)
    if task.kind not in KINDS:
        raise TaskError(f"{where}: kind {task.kind!r}: must be one of {', '.join(KINDS)}")
    if task.order not in ORDERS:
        raise TaskError(f"{where}: order {task.order!r}: must be one of {', '.join(get_args(Order))}")
    if task.behaviour and task.instruction:
        raise TaskError(f"{where}: give `instruction` or `behaviour`, not both")
    try:
        _ = task.wording
    except BehaviourError as error:
        raise TaskError(f"{where}: {error}") from error
    return task


def _checked(kind: type, mapping: Any, where: str) -> dict[str, Any]:
    """The mapping, if its keys are fields of `kind` and the needed ones are there."""
    names = {f.name for f in fields(kind)} - {"folder", "unreadable"}
    needed = {"name", "kind", "manifest"} & names
    if not isinstance(mapping, dict) or not needed <= set(mapping):
        raise TaskError(f"{where}: needs {', '.join(sorted(needed))}")
    if unknown := set(mapping) - names:
        raise TaskError(f"{where}: unknown {sorted(unknown)[0]!r}; known are {', '.join(sorted(names))}")
    return dict(mapping)


def _mapping(text: str, where: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise TaskError(f"{where}: is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise TaskError(f"{where}: must hold a mapping, as in `kind: asr`")
    return content


def _prompt_name(identifier: str) -> str:
    """The prompt's name, whatever the language: asterisk_en/agent-pass -> agent-pass."""
    return identifier.partition("/")[2] or identifier


def _draw(rows: list[Utterance], samples: int | None) -> list[Utterance]:
    """`samples` of the rows in their order: those whose names have the lowest hashes."""
    if samples is None or len(rows) <= samples:
        return rows
    drawn = sorted(rows, key=lambda row: hashlib.sha256(_prompt_name(row.id).encode()).digest())[:samples]
    drawn_ids = {row.id for row in drawn}
    return [row for row in rows if row.id in drawn_ids]
