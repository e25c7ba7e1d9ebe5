"""What the tour shows: transcripts beside what was read out and answered, and how divergence fell.

In:  adapters, manifests, a run's metrics. Out: plain text for a terminal.
Try: `print(divergence_lines("runs/tour/train/metrics.jsonl"))`
Flow: tour.py → **tour_page.py** → inference/listener.py. What fails is shown as failing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blsp.inference.listener import Listener

Rows = list[dict[str, Any]]
SHOWN = 5  # clips of each part


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


def read_clips(manifest: Path) -> Rows:
    """The rows of a manifest with `audio` as a path from here."""
    return [row | {"audio": str(manifest.parent / row["audio"])} for row in read_manifest(manifest)]


def learnt_rows(manifest: Path, held_out: int) -> Rows:
    """The rows that training learnt from: all but those that `--held-out` kept back for its probes."""
    from blsp.training.dataset import id_hash

    rows = read_clips(manifest)
    kept_back = sorted(id_hash(row["id"]) for row in rows)[:held_out]
    return [row for row in rows if id_hash(row["id"]) not in kept_back]


def compare_page(adapter: str, before: str | None, parts: dict[str, Rows], device: str) -> str:
    """Five clips of each part as the adapter hears them; word error rates of the whole parts below."""
    from blsp.inference.listener import Question, load
    from blsp.llm.instructions import instruction_for

    listener = load(adapter, device=device)
    instruction = instruction_for("continue")
    lines: list[str] = []
    for label, rows in parts.items():
        shown = rows[:SHOWN]
        audio = [row["audio"] for row in shown]
        heard = listener.readout(listener.embed_audio(audio))
        reading = listener.generate([Question(text=row["text"], instruction=instruction) for row in shown])
        hearing = listener.generate([Question(audio=clip, instruction=instruction) for clip in audio])
        for row, readout, text_answer, speech_answer in zip(shown, heard, reading, hearing, strict=True):
            lines += [
                f"[{label}] {row['id']}",
                f"   transcript: {row['text']}",
                f"     read out: {readout or '(nothing)'}",
                f"   on reading: {_short(text_answer)}",
                f"   on hearing: {_short(speech_answer)}",
            ]
    judges = {"before": load(before, device=device), "after": listener} if before else {"now": listener}
    for label, rows in parts.items():
        for when, judge in judges.items():
            lines.append(
                f"read-out word error rate, {label} ({len(rows)} clips), {when}: {_error_rate(judge, rows):.3f}"
            )
    return "\n".join(lines)


def question_page(adapter: str, manifest: Path, device: str) -> str:
    """Spoken questions, answered on both routes."""
    from blsp.inference.listener import Question, load

    listener = load(adapter, device=device)
    rows = read_clips(manifest)
    reading = listener.generate([Question(text=row["text"]) for row in rows])
    hearing = listener.generate([Question(audio=row["audio"]) for row in rows])
    lines = []
    for row, text_answer, speech_answer in zip(rows, reading, hearing, strict=True):
        lines += [
            row["text"],
            f"   on reading: {_short(text_answer)}",
            f"   on hearing: {_short(speech_answer)}",
        ]
    return "\n".join(lines)


def _error_rate(listener: Listener, rows: Rows) -> float:
    import jiwer
    from whisper_normalizer.english import EnglishTextNormalizer

    normalise = EnglishTextNormalizer()
    heard = listener.readout(listener.embed_audio([row["audio"] for row in rows]))
    return float(jiwer.wer([normalise(row["text"]) for row in rows], [normalise(text) for text in heard]))


def _short(text: str, width: int = 150) -> str:
    flat = " ".join(text.split())
    return (flat if len(flat) <= width else flat[: width - 1] + "…") or "(empty)"
