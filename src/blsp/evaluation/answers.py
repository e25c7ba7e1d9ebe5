"""The logs of answers: one line a question, so that a killed run continues.

In:  batches of answers. Out: `OUT/log/TASK.ROUTE.jsonl`; its first line is a digest of what was asked of which model.
Try: `answer_log(Path("log/sqa.speech.jsonl"), fingerprint).records`
Flow: evaluation/ — routes.py writes and reads them; scoring.py and report.py get `Answer`s.
      A log of another model, task, batch plan or version is renamed to *.old, so that results never mix.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from blsp.data.jobs import RecordLog
from blsp.distributed import from_first, shared

Item = TypeVar("Item")
Record = TypeVar("Record")

NO_SPEECH = "no-speech"  # Answer.finish if the answer is the fixed sentence, or if there was nothing to answer


@dataclass(frozen=True)
class Answer:
    """The answer of one route to one question.

    finish: stop | length | no-speech | "" (nothing was generated). ids: the tokens, without the end of sequence.
    option_scores: mean log-likelihood per token of each option. transcript: of the recogniser or the read-out (the
    field `heard` in files).
    """

    text: str
    finish: str = ""
    ids: tuple[int, ...] = ()
    option_scores: tuple[float, ...] | None = None
    transcript: str | None = None


Answers = dict[str, Answer]  # by the row's id


AnswerLog = RecordLog[Answer]


def fill(
    log: RecordLog[Record],
    batches: Sequence[Sequence[Item]],
    key: Callable[[Item], str],
    compute: Callable[[Sequence[Item]], dict[str, Record]],
    progress: Callable[[int], Any] = lambda count: None,
) -> dict[str, Record]:
    """All records, after computing the batches that are not complete in the log. Ranks share them, and all get all.

    progress: called with the number of items just finished.
    """
    log.records = from_first(lambda: log.records)
    waiting = [batch for batch in batches if not all(key(item) in log.records for item in batch)]
    progress(sum(map(len, batches)) - sum(map(len, waiting)))
    for batch, records in zip(waiting, shared(waiting, compute), strict=True):
        log.write(records)
        progress(len(batch))
    return log.records


def answer_log(path: Path, fingerprint: str) -> AnswerLog:
    """One route's answers to one task."""
    return RecordLog(path, fingerprint, _from_row, _to_row)


def _from_row(row: dict[str, Any]) -> Answer:
    scores = row.get("option_scores")
    return Answer(
        text=row["text"],
        finish=row.get("finish", ""),
        ids=tuple(row.get("ids", ())),
        option_scores=None if scores is None else tuple(scores),
        transcript=row.get("heard"),
    )


def _to_row(answer: Answer) -> dict[str, Any]:
    fields = {
        "text": answer.text,
        "finish": answer.finish,
        "ids": answer.ids,
        "option_scores": answer.option_scores,
        "heard": answer.transcript,
    }
    return {name: value for name, value in fields.items() if value not in (None, ())}
