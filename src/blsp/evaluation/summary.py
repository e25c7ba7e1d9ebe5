"""Sentences that summarise the report at its top, and the format of its figures and tables.

In:  `Results` and their JSON. Out: Markdown: bullets, cells, tables.
Try: `print(summarise(results, results.to_json()))`
Flow: evaluation/ — results.py → **summary** → report.py. The model cards use the tables, too.
"""

import math
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

from blsp.evaluation.results import Results, TaskResult

Scores = dict[str, dict[str, Any]]  # route -> metric -> value


def summarise(results: Results, figures: dict[str, Any]) -> str:
    """One bullet for each task that the LLM can do on text or that needs no LLM, and one for the divergence."""
    lines = []
    for result in results.tasks:
        scores: Scores = figures["tasks"][result.task.name]
        counts = result.lacks_evidence() is None or "readout" in scores
        if scores.get("speech", {}).get("n") and counts:
            lines.append(f"- **{result.task.name}**: {SENTENCES[result.task.kind](result, scores)}")
    if figures["alignment"]:
        lines.append(f"- **behaviour**: {_behaviour(figures['alignment'])}")
    return "\n".join(lines)


def _recognition(result: TaskResult, scores: Scores) -> str:
    """Word errors of the read-out, of `blsp transcribe`, of a recogniser, and of the LLM if it can repeat."""
    parts = []
    if "readout" in scores:
        parts.append(f"the adapter's own read-out gets {_figure(scores, 'readout', 'wer')} of the words wrong")
    if "transcript" in scores:
        parts.append(f"`blsp transcribe`, with the model's help, {_figure(scores, 'transcript', 'wer')}")
    if "recogniser" in scores:
        parts.append(f"the cascade's recogniser {_figure(scores, 'recogniser', 'wer')}")
    if result.lacks_evidence() is None:
        parts.append(f"the model, asked to repeat the speech, {_figure(scores, 'speech', 'wer')}")
        parts += [f"asked to repeat the text, {_figure(scores, 'text', 'wer')}"] if "text" in scores else []
    return f"over {len(result.rows)} utterances {', '.join(parts)}."


def _understanding(result: TaskResult, scores: Scores) -> str:
    chance = f" Guessing gives {shown('accuracy', result.task.chance)}." if result.task.chance else ""
    share = _figure(scores, "speech", "accuracy")
    return f"right on speech in {share} of {len(result.rows)} cases{_others(scores, 'accuracy')}.{chance}"


def _translation(result: TaskResult, scores: Scores) -> str:
    value = _figure(scores, "speech", "bleu")
    return f"{value} BLEU on speech, over {len(result.rows)} sentences{_others(scores, 'bleu')}."


def _open(result: TaskResult, scores: Scores) -> str:
    same = shown("agreement", scores["speech"].get("agreement"))
    through = scores.get("cascade", {}).get("agreement")
    cascade = f" (through the cascade, {shown('agreement', through)})" if through is not None else ""
    return f"the same answer, word for word, as on text in {same} of {len(result.rows)} cases{cascade}."


def _no_speech(result: TaskResult, scores: Scores) -> str:
    invented = len(result.rows) - scores["speech"]["no_speech"]
    return f"of {len(result.rows)} clips without speech for it, it took {invented} for speech."


def _behaviour(figures: dict[str, Any]) -> str:
    agreement = shown("agreement", figures["top1_agreement"])
    return (
        f"on speech, its next-token distribution is {figures['kl']:.2f} nats away from the one on text "
        f"({figures['kl_shuffled']:.2f} when it is given another clip), and the likeliest next token is the same "
        f"at {agreement} of the answer's tokens."
    )


def _others(scores: Scores, metric: str) -> str:
    """The other routes in brackets: (on text 80.5 %, through the cascade 79.0 %)."""
    words = {"text": "on text", "cascade": "through the cascade"}
    parts = [f"{words[route]} {_figure(scores, route, metric)}" for route in words if metric in scores.get(route, {})]
    return f" ({', '.join(parts)})" if parts else ""


def _figure(scores: Scores, route: str, metric: str) -> str:
    return shown(metric, scores[route][metric])


SENTENCES: dict[str, Callable[[TaskResult, Scores], str]] = {
    "asr": _recognition,
    "st": _translation,
    "slu": _understanding,
    "sqa": _understanding,
    "chat": _open,
    "continuation": _open,
    "no-speech": _no_speech,
}

PERCENT = frozenset({"wer", "cer", "accuracy", "accuracy_generated", "em", "f1", "agreement"})
NAMES = {
    "wer": "WER",
    "cer": "CER",
    "bleu": "BLEU",
    "chrf": "chrF",
    "accuracy": "accuracy",
    "accuracy_generated": "accuracy, written",
    "em": "exact match",
    "f1": "F1",
    "agreement": "same answer",
    "words": "words",
    "judge": "judge (1–10)",
}
UNKNOWN = "n/a"


def shown(metric: str, value: float | None) -> str:
    """A figure in its unit: 0.0312 WER -> 3.1 %; 14.12 BLEU -> 14.1."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    return f"{100 * value:.1f} %" if metric in PERCENT else f"{value:.1f}"


def with_interval(metric: str, value: float | None, bounds: Sequence[float] | None) -> str:
    """A figure with its interval: 3.1 % [2.0–4.4]."""
    text = shown(metric, value)
    if bounds is None or text == UNKNOWN or not all(map(math.isfinite, bounds)):
        return text
    low, high = (shown(metric, bound).removesuffix(" %") for bound in bounds)
    return f"{text} [{low}–{high}]"


def change(percent: float | None) -> str:
    """A relative change: −12 %, or from +200 % on a multiple: 3.4 ×."""
    if percent is None or not math.isfinite(percent):
        return UNKNOWN
    if percent >= 200:
        return f"{1 + percent / 100:.1f} ×"
    return f"{'+' if percent >= 0.5 else '−' if percent <= -0.5 else ''}{abs(percent):.0f} %"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with padded columns."""
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *(_width(row[column]) for row in cells)) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _width(text: str) -> int:
    """The width of a text on the screen: East Asian characters have two columns, combining marks none."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else not unicodedata.combining(c) for c in text)
