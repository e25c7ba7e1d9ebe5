"""Tour of the whole method on real speech, in minutes: each step is a command that a user could type.

In:  the recordings of `examples/speech/` and the embedded default models; nothing is downloaded.
Out: a folder with all files that were made; the input and the output of each step, printed.
Try: `blsp tour`
Flow: corpora → manifest → continuations (step 1) → speech features → alignment training (step 2) → checkpoint
      → inference → evaluation: **tour.py** runs them through cli.py, as a user would.

A finished step with the same commands is shown again, not repeated. Bad results are shown too.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blsp.cli import main
from blsp.data.files import digest_of, read_rows
from blsp.data.jobs import RecordLog
from blsp.settings import DEFAULT_MODEL, SettingsError, TourSettings
from blsp.weights.shipped import is_shipped

if TYPE_CHECKING:
    from blsp.inference.listener import Listener

LLM = "embedded:smollm2-135m-instruct"
ENCODER = "embedded:whisper-tiny.en"
TOP_K = "32"
HELD_OUT = 24  # training recordings that are held out for the probes
SHOWN = 5  # clips shown of each set
Rows = list[dict[str, Any]]


class TourError(RuntimeError):
    """A step that failed; the message names the command."""


@dataclass(frozen=True)
class Stop:
    """One step of the tour: its reason, its duration, its commands, and a function that describes its results."""

    name: str
    reason: str
    duration: str
    commands: tuple[tuple[str, ...], ...]
    look: Callable[[], str]


def tour(settings: TourSettings) -> None:
    """`blsp tour`: run each step, or show it again if an earlier tour has finished it."""
    if not (settings.speech / "train.jsonl").exists():
        raise SettingsError(
            f"--speech {settings.speech}: no train.jsonl there; run the tour in a checkout of the repository, "
            "or name the folder examples/speech of one"
        )
    stops = plan(settings)
    began = time.monotonic()
    commands = [["--speech", str(settings.speech)]]
    for number, stop in enumerate(stops, 1):
        print(f"\n━━ {number} of {len(stops)} · {stop.name} ━━ ({stop.duration})\n{stop.reason}\n")
        commands += map(list, stop.commands)
        print(visit(stop, settings.out / "stops", commands))
    print(f"\nThe tour took {time.monotonic() - began:.0f} s. Everything it made: {settings.out}/")
    print("Ask it something yourself:  blsp chat --model " + str(settings.out / "train" / "adapter"))


def visit(stop: Stop, folder: Path, commands: list[list[str]]) -> str:
    """Run a step and store the description of its results; a step with a stored description is only shown.

    commands: of all steps up to this one; if one of them has changed, the stored description is not used.
    """
    with RecordLog[dict[str, Any]](folder / f"{stop.name.replace(' ', '-')}.jsonl", digest_of(commands)) as log:
        if stop.name in log.records:
            return "(done by an earlier tour)\n" + log.records[stop.name]["seen"]
        for command in stop.commands:
            run_command(command)
        seen = stop.look()
        log.write({stop.name: {"seen": seen}})
    return seen


def run_command(command: Sequence[str]) -> None:
    """Print a command and run it in this process; raises TourError when it fails."""
    print("  $ blsp " + " ".join(command), flush=True)
    if code := main(list(command)):
        raise TourError(f"`blsp {' '.join(command)}` ended with exit code {code}; solve that and run the tour again")


def plan(settings: TourSettings) -> list[Stop]:
    """The steps, for a fresh adapter or for the shipped one."""
    speech, out = settings.speech, settings.out
    shipped = is_shipped(DEFAULT_MODEL) and not settings.cold
    start = DEFAULT_MODEL if shipped else None
    continued, features, run = out / "continued.jsonl", out / "features", out / "train"
    adapter = str(run / "adapter")
    device = ("--device", settings.device)
    return [
        Stop(
            "the manifest",
            "Real recordings of voice actors, with their words: one JSON line per utterance.",
            "seconds",
            (),
            lambda: _manifests_text(speech),
        ),
        Stop(
            "the continuations",
            "Step 1: the frozen LLM reads each transcript and continues it. What it does after reading,\n"
            "it should later do after listening. The 32 most probable tokens of each step are stored too.",
            "about a minute",
            (
                (
                    "continue", "--manifest", str(speech / "train.jsonl"), "--out", str(continued), "--llm", LLM,
                    "--behaviours", "continue:0.5,repeat:0.5", "--orders", "instruction-first:0.5,speech-first:0.5",
                    "--top-k", TOP_K, "--max-new-tokens", "40", *device,
                ),
            ),
            lambda: _rows_text(continued, ("text", "instruction", "continuation"), 2),
        ),
        Stop(
            "the speech features",
            "The frozen encoder runs once over every clip, on its true length; training reads the result.",
            "seconds",
            (
                (
                    "encode", "--manifest", str(continued), "--audio-model", ENCODER, "--cache", str(features),
                    *device,
                ),
            ),
            lambda: f"kept in {features}: "
            f"{sum(file.stat().st_size for file in features.rglob('*') if file.is_file()) / 1e6:.1f} MB",
        ),
        Stop(
            "the training",
            "Step 2: only the adapter is trained. First it learns to read speech out as tokens of the LLM,\n"
            "then the LLM's next-token distribution is matched to the one it has for the transcript.",
            "five to eight minutes" if start is None else "two to four minutes",
            (
                (
                    "train", "--config", str(speech.parent / "tour" / ("adapt.yaml" if start else "cold.yaml")),
                    "--data", str(continued), "--cache", str(features), "--out", str(run),
                    "--held-out", str(HELD_OUT),
                    *(("--init-from", start) if start else ()), *device,
                ),
            ),
            lambda: divergence_text(run / "metrics.jsonl") + f"\nthe curves: {run / 'curves.png'}",
        ),
        Stop(
            "what it understands",
            "Five recordings from its training, five of the same actors that it has never heard, and five of\n"
            "a telephone voice: the transcript, the adapter's read-out, and the LLM's continuation.",
            "a minute",
            (),
            lambda: comparison_text(
                adapter,
                start,
                {
                    "training": training_rows(speech / "train.jsonl", HELD_OUT),
                    "held out": read_clips(speech / "heldout.jsonl"),
                    "other voice": read_clips(speech / "asterisk.jsonl"),
                },
                settings.device,
            ),
        ),
        Stop(
            "spoken questions",
            "Neither these questions nor these voices were in its training, and all the answers that it\n"
            "learned from were written by the LLM. The same question as text and as speech:",
            "seconds",
            (),
            lambda: questions_text(start or adapter, speech / "questions.jsonl", settings.device),
        ),
    ]  # fmt: skip


# --- descriptions of results ------------------------------------------------------------------------------
def read_manifest(path: Path) -> Rows:
    """All rows of a small manifest, unchanged."""
    return [row for _, row in read_rows(path)]


def read_clips(manifest: Path) -> Rows:
    """The rows of a manifest with `audio` as a path from the current folder."""
    return [row | {"audio": str(manifest.parent / row["audio"])} for row in read_manifest(manifest)]


def training_rows(manifest: Path, held_out: int) -> Rows:
    """The rows of the training data: all but those that `--held-out` holds out for the probes."""
    from blsp.data.manifest import Utterance
    from blsp.training.dataset import learnt_from

    rows = read_clips(manifest)
    learnt = {row.id for row in learnt_from([Utterance.from_json(row) for row in rows], held_out)}
    return [row for row in rows if row["id"] in learnt]


def divergence_text(metrics: str | Path) -> str:
    """Divergence of speech from text at the first and the last probe, also with exchanged clips."""
    probes = [row for row in read_manifest(Path(metrics)) if "train_kl" in row or "train_wer" in row]
    lines = ["divergence of speech from text, nats per token (0: the LLM treats speech as it treats text)"]
    labels = {
        "train_kl": "training clips",
        "train_kl_shuffled": "  the same, clips exchanged",
        "held_out_kl": "clips held out",
        "held_out_kl_shuffled": "  the same, clips exchanged",
        "train_wer": "word error rate of the read-out, training",
        "held_out_wer": "word error rate of the read-out, held out",
    }
    for key, label in labels.items():
        values = [row[key] for row in probes if key in row]
        if values:
            lines.append(f"  {label:<42} {values[0]:7.3f} → {values[-1]:7.3f}")
    return "\n".join(lines)


def comparison_text(adapter: str, before: str | None, clips: dict[str, Rows], device: str) -> str:
    """Five clips of each set, with transcript, read-out and answers; then word error rates of the whole sets."""
    from blsp.inference.listener import Question, load
    from blsp.llm.instructions import instruction_for

    listener = load(adapter, device=device)
    instruction = instruction_for("continue")
    lines: list[str] = []
    for label, rows in clips.items():
        shown = rows[:SHOWN]
        audio = [row["audio"] for row in shown]
        readouts = listener.readout(listener.embed_audio(audio))
        from_text = listener.generate([Question(text=row["text"], instruction=instruction) for row in shown])
        from_speech = listener.generate([Question(audio=clip, instruction=instruction) for clip in audio])
        for row, readout, text_answer, speech_answer in zip(shown, readouts, from_text, from_speech, strict=True):
            lines += [
                f"[{label}] {row['id']}",
                f"   transcript: {row['text']}",
                f"     read-out: {readout or '(nothing)'}",
                f"    from text: {_short(text_answer)}",
                f"  from speech: {_short(speech_answer)}",
            ]
    listeners = {"before": load(before, device=device), "after": listener} if before else {"now": listener}
    for label, rows in clips.items():
        for when, measured in listeners.items():
            rate = _error_rate(measured, rows)
            lines.append(f"word error rate of the read-out, {label} ({len(rows)} clips), {when}: {rate:.3f}")
    return "\n".join(lines)


def questions_text(adapter: str, manifest: Path, device: str) -> str:
    """Questions with their answers on both routes."""
    from blsp.inference.listener import Question, load

    listener = load(adapter, device=device)
    rows = read_clips(manifest)
    from_text = listener.generate([Question(text=row["text"]) for row in rows])
    from_speech = listener.generate([Question(audio=row["audio"]) for row in rows])
    lines = []
    for row, text_answer, speech_answer in zip(rows, from_text, from_speech, strict=True):
        lines += [row["text"], f"    from text: {_short(text_answer)}", f"  from speech: {_short(speech_answer)}"]
    return "\n".join(lines)


def _manifests_text(speech: Path) -> str:
    lines = []
    for name in ("train.jsonl", "heldout.jsonl", "asterisk.jsonl", "questions.jsonl"):
        rows = read_manifest(speech / name)
        minutes = sum(row.get("seconds", 0.0) for row in rows) / 60
        speakers = len({row.get("speaker") for row in rows})
        lines.append(f"{speech / name}: {len(rows)} clips, {minutes:.1f} minutes, {speakers} speakers")
    example = json.dumps(read_manifest(speech / "train.jsonl")[0], ensure_ascii=False)
    return "\n".join([*lines, example])


def _rows_text(path: Path, fields: Sequence[str], count: int) -> str:
    rows = read_manifest(path)
    lines = [f"{path}: {len(rows)} rows"]
    for row in rows[:count]:
        lines += [f"  {field:>13}: {row[field]}" for field in fields] + [""]
    return "\n".join(lines)


def _error_rate(listener: Listener, rows: Rows) -> float:
    import jiwer
    from whisper_normalizer.english import EnglishTextNormalizer

    normalise = EnglishTextNormalizer()
    readouts = listener.readout(listener.embed_audio([row["audio"] for row in rows]))
    return float(jiwer.wer([normalise(row["text"]) for row in rows], [normalise(text) for text in readouts]))


def _short(text: str, width: int = 150) -> str:
    line = " ".join(text.split())
    return (line if len(line) <= width else line[: width - 1] + "…") or "(empty)"
