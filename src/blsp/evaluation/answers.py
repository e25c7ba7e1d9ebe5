"""The logs of answers: one line a question, so that a killed run continues.

In:  batches of answers. Out: `OUT/log/TASK.ROUTE.jsonl`; its first line is a digest of what was asked of which model.
Try: `answer_log(Path("log/sqa.speech.jsonl"), fingerprint).records`
Flow: evaluation/ — routes.py writes and reads them; scoring.py and report.py get `Answer`s.

A log with another fingerprint (model, task, rows, batch plan, versions) is started again, so that results never mix
two models or two wordings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from blsp.data.jobs import RowLog
from blsp.data.jsonl import read_rows

Record = TypeVar("Record")
NO_SPEECH = (
    "no-speech"  # Answer.finish where the set sentence is the answer, or where there was nothing to answer
)


@dataclass(frozen=True)
class Answer:
    """What one route answered to one question.

    finish: stop | length | no-speech | "" (nothing was generated). ids: the tokens, without the end of sequence.
    option_scores: mean log-likelihood a token of each option. transcript: what the recogniser or the read-out wrote
    (in files this field is called `heard`).
    """

    text: str
    finish: str = ""
    ids: tuple[int, ...] = ()
    option_scores: tuple[float, ...] | None = None
    transcript: str | None = None


Answers = dict[str, Answer]  # by the row's id


class Log(Generic[Record]):
    """Records by id; `records` begins with those of earlier runs that had the same fingerprint."""

    def __init__(
        self,
        path: Path,
        fingerprint: str,
        from_row: Callable[[dict[str, Any]], Record],
        to_row: Callable[[Record], dict[str, Any]],
    ) -> None:
        self.path, self._from_row, self._to_row = path, from_row, to_row
        path.parent.mkdir(parents=True, exist_ok=True)
        self.records: dict[str, Record] = self._earlier(fingerprint)
        self._log = RowLog(path)
        if path.stat().st_size == 0:
            self._log.append({"fingerprint": fingerprint})

    def write(self, records: dict[str, Record]) -> None:
        """Store a finished batch."""
        for name, record in records.items():
            self._log.append({"id": name, **self._to_row(record)})
        self.records.update(records)

    def close(self) -> None:
        self._log.close()

    def __enter__(self) -> Log[Record]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _earlier(self, fingerprint: str) -> dict[str, Record]:
        if not self.path.exists():
            return {}
        RowLog(self.path).close()  # removes an incomplete last line
        rows = [row for _, row in read_rows(self.path)]
        if rows and rows[0].get("fingerprint") == fingerprint:
            return {row["id"]: self._from_row(row) for row in rows[1:]}
        if len(rows) > 1:
            print(f"{self.path}: made by another model, task or version; done again")
        self.path.unlink()
        return {}


AnswerLog = Log[Answer]


def answer_log(path: Path, fingerprint: str) -> AnswerLog:
    """One route's answers to one task."""
    return Log(path, fingerprint, _from_row, _to_row)


def fingerprint(**parts: Any) -> str:
    """A digest of everything that decides the answers."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _from_row(row: dict[str, Any]) -> Answer:
    scores: Sequence[float] | None = row.get("option_scores")
    return Answer(
        text=row["text"],
        finish=row.get("finish", ""),
        ids=tuple(row.get("ids", ())),
        option_scores=None if scores is None else tuple(scores),
        transcript=row.get("heard"),
    )


def _to_row(answer: Answer) -> dict[str, Any]:
    row = {
        "text": answer.text,
        "finish": answer.finish,
        "ids": list(answer.ids),
        "option_scores": answer.option_scores and list(answer.option_scores),
        "heard": answer.transcript,
    }
    return {name: value for name, value in row.items() if value not in (None, [], ())}
