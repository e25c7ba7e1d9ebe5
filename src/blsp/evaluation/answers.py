"""Answers as they are kept: one line a question, in a log that a killed run goes on with.

In:  batches of answers. Out: `OUT/log/TASK.ROUTE.jsonl`, whose first line says exactly what was asked of whom.
Try: `answer_log(Path("log/sqa.speech.jsonl"), fingerprint).known`
Flow: evaluation/ — routes.py writes and reads them; scoring.py and report.py get `Answer`s.

A log whose fingerprint (model, task, rows, batch plan, versions) is another one is begun afresh, so that
results never mix two models or two wordings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from blsp.data.jobs import RowLog
from blsp.data.jsonl import read_rows

Kept = TypeVar("Kept")
NO_SPEECH = "no-speech"  # Answer.finish where the set sentence is the answer, or nothing was there to answer


@dataclass(frozen=True)
class Answer:
    """What one route made of one question.

    finish: stop | length | no-speech | "" (nothing was generated). ids: the tokens, without the end.
    option_scores: mean log-likelihood a token of each option. heard: what the recogniser or the read-out wrote.
    """

    text: str
    finish: str = ""
    ids: tuple[int, ...] = ()
    option_scores: tuple[float, ...] | None = None
    heard: str | None = None


Answers = dict[str, Answer]  # by the row's id


class Log(Generic[Kept]):
    """Records by name; `known` are those of earlier runs with the same fingerprint."""

    def __init__(
        self,
        path: Path,
        fingerprint: str,
        read: Callable[[dict[str, Any]], Kept],
        show: Callable[[Kept], dict[str, Any]],
    ) -> None:
        self.path, self._read, self._show = path, read, show
        path.parent.mkdir(parents=True, exist_ok=True)
        self.known: dict[str, Kept] = self._earlier(fingerprint)
        self._log = RowLog(path)
        if path.stat().st_size == 0:
            self._log.append({"fingerprint": fingerprint})

    def write(self, records: dict[str, Kept]) -> None:
        """Keep a finished batch."""
        for name, record in records.items():
            self._log.append({"id": name, **self._show(record)})
        self.known.update(records)

    def close(self) -> None:
        self._log.close()

    def __enter__(self) -> Log[Kept]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _earlier(self, fingerprint: str) -> dict[str, Kept]:
        if not self.path.exists():
            return {}
        RowLog(self.path).close()  # cuts a torn last line
        rows = [row for _, row in read_rows(self.path)]
        if rows and rows[0].get("fingerprint") == fingerprint:
            return {row["id"]: self._read(row) for row in rows[1:]}
        if len(rows) > 1:
            print(f"{self.path}: of another model, task or version; done again")
        self.path.unlink()
        return {}


AnswerLog = Log[Answer]


def answer_log(path: Path, fingerprint: str) -> AnswerLog:
    """One route's answers to one task."""
    return Log(path, fingerprint, _answer, _shown)


def fingerprint(**parts: Any) -> str:
    """A digest of whatever decides the answers."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _answer(row: dict[str, Any]) -> Answer:
    scores: Sequence[float] | None = row.get("option_scores")
    return Answer(
        text=row["text"],
        finish=row.get("finish", ""),
        ids=tuple(row.get("ids", ())),
        option_scores=None if scores is None else tuple(scores),
        heard=row.get("heard"),
    )


def _shown(answer: Answer) -> dict[str, Any]:
    return {key: value for key, value in asdict(answer).items() if value not in (None, ())}
