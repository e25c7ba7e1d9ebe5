"""What the tour shows: transcripts beside what was read out and answered, and how divergence fell.

In:  adapters, manifests, a run's metrics. Out: plain text for a terminal.
Try: `print(divergence_lines("runs/tour/train/metrics.jsonl"))`
Flow: tour.py → **tour_page.py** → inference/listener.py. What fails is shown as failing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blsp.inference.listener import Listener

Rows = list[dict[str, Any]]


def read_manifest(path: Path) -> Rows:
    """All rows of a small manifest, as they stand in the file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def divergence_lines(metrics: str | Path) -> str:
    """Divergence between hearing and reading at the first and the last probe, beside that of exchanged clips."""
    probed = [row for row in read_manifest(Path(metrics)) if "train_kl" in row or "train_wer" in row]
    lines = ["speech/text divergence, nats per token (lower: the LLM behaves on hearing as on reading)"]
    names = {
        "train_kl": "clips it learns from",
        "train_kl_shuffled": "  the same, clips exchanged",
        "held_out_kl": "clips held out",
        "held_out_kl_shuffled": "  the same, clips exchanged",
        "train_wer": "read-out word error rate, learnt from",
        "held_out_wer": "read-out word error rate, held out",
    }
    for key, label in names.items():
        values = [row[key] for row in probed if key in row]
        if values:
            lines.append(f"  {label:<38} {values[0]:7.3f} → {values[-1]:7.3f}")
    return "\n".join(lines)


def compare_page(
    adapter: str, before: str | None, parts: Sequence[tuple[str, Path, int]], device: str
) -> str:
    """Some clips of each manifest as the adapter hears them; word error rates of whole manifests below."""
    from blsp.continuation.prompts import instruction_for
    from blsp.inference.listener import Question, load

    listener = load(adapter, device=device)
    lines: list[str] = []
    for label, manifest, count in parts:
        rows = read_manifest(manifest)[:count]
        audio = [str(manifest.parent / row["audio"]) for row in rows]
        instruction = instruction_for("continue")
        heard = listener.read(listener.hear(audio))
        reading = listener.generate([Question(text=row["text"], instruction=instruction) for row in rows])
        hearing = listener.generate([Question(audio=clip, instruction=instruction) for clip in audio])
        for row, readout, text_answer, speech_answer in zip(rows, heard, reading, hearing, strict=True):
            lines += [
                f"[{label}] {row['id']}",
                f"   transcript: {row['text']}",
                f"     read out: {readout or '(nothing)'}",
                f"   on reading: {_short(text_answer)}",
                f"   on hearing: {_short(speech_answer)}",
            ]
    models = [("before", load(before, device=device))] if before else []
    for label, manifest, _ in parts:
        for when, judge in [*models, ("after" if before else "now", listener)]:
            lines.append(f"read-out word error rate, {label}, {when}: {_error_rate(judge, manifest):.3f}")
    return "\n".join(lines)


def question_page(adapter: str, manifest: Path, device: str) -> str:
    """Spoken questions, answered on both routes."""
    from blsp.inference.listener import Question, load

    listener = load(adapter, device=device)
    rows = read_manifest(manifest)
    audio = [str(manifest.parent / row["audio"]) for row in rows]
    reading = listener.generate([Question(text=row["text"]) for row in rows])
    hearing = listener.generate([Question(audio=clip) for clip in audio])
    lines = []
    for row, text_answer, speech_answer in zip(rows, reading, hearing, strict=True):
        lines += [
            row["text"],
            f"   on reading: {_short(text_answer)}",
            f"   on hearing: {_short(speech_answer)}",
        ]
    return "\n".join(lines)


def _error_rate(listener: Listener, manifest: Path) -> float:
    import jiwer
    from whisper_normalizer.english import EnglishTextNormalizer

    rows = read_manifest(manifest)
    normalise = EnglishTextNormalizer()
    heard = listener.read(listener.hear([str(manifest.parent / row["audio"]) for row in rows]))
    return float(jiwer.wer([normalise(row["text"]) for row in rows], [normalise(text) for text in heard]))


def _short(text: str, width: int = 150) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"
