"""Figures as a person reads them, and tables in Markdown that line up on a screen too.

In:  values with their metric's name. Out: text.
Try: `print(table(["task", "WER"], [["asr", shown("wer", 0.031)]]))`
Flow: evaluation/ — under report.py.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

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
    """0.0312 WER -> 3.1 %; 14.12 BLEU -> 14.1."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    return f"{100 * value:.1f} %" if metric in PERCENT else f"{value:.1f}"


def with_interval(metric: str, value: float | None, around: Sequence[float] | None) -> str:
    """3.1 % [2.0–4.4]."""
    text = shown(metric, value)
    if around is None or text == UNKNOWN or not all(map(math.isfinite, around)):
        return text
    low, high = (shown(metric, bound).removesuffix(" %") for bound in around)
    return f"{text} [{low}–{high}]"


def change(percent: float | None) -> str:
    """−12 %, or 3.4 × where a share of a hundred says little."""
    if percent is None or not math.isfinite(percent):
        return UNKNOWN
    if percent >= 200:
        return f"{1 + percent / 100:.1f} ×"
    return f"{'+' if percent >= 0.5 else '−' if percent <= -0.5 else ''}{abs(percent):.0f} %"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are padded to one width."""
    cells = [[_escaped(cell) for cell in row] for row in (header, *rows)]
    widths = [max(3, *(_width(row[column]) for row in cells)) for column in range(len(header))]
    lines = [
        "| " + " | ".join(_padded(c, w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _escaped(cell: str) -> str:
    return " ".join(cell.split()).replace("|", "\\|")


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else not unicodedata.combining(c) for c in text)


def _padded(text: str, width: int) -> str:
    return text + " " * (width - _width(text))
