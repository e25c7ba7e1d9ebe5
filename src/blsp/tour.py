"""The whole way on real speech, in minutes: every stop is a command that a user could type.

In:  the recordings of `examples/speech/` and the embedded default models; nothing is fetched.
Out: a folder with everything that was made on the way, and at each stop what went in and what came out.
Try: `blsp tour`
Flow: corpora → manifest → continuations (step 1) → speech features → alignment training (step 2) → checkpoint
      → inference → evaluation: this file walks it from end to end, through `cli.py` as a user would.

A stop that was finished with the same commands is shown again, not repeated.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from blsp.settings import DEFAULT_MODEL, SettingsError, TourSettings
from blsp.tour_page import (
    compare_page,
    divergence_lines,
    learnt_rows,
    question_page,
    read_clips,
    read_manifest,
)
from blsp.weights.shipped import is_shipped

LLM = "embedded:smollm2-135m-instruct"
ENCODER = "embedded:whisper-tiny.en"
TOP_K = "32"
HELD_OUT = 24  # training recordings kept back for the probes


class TourError(RuntimeError):
    """A stop that failed; the message names the command."""


@dataclass(frozen=True)
class Stop:
    """One station: why it is there, the commands it runs, and what there is to see afterwards."""

    name: str
    why: str
    minutes: str
    commands: tuple[tuple[str, ...], ...]
    look: Callable[[], str]


def tour(settings: TourSettings) -> None:
    """`blsp tour`: walk every stop, resuming where an earlier walk ended."""
    if not (settings.speech / "train.jsonl").exists():
        raise SettingsError(
            f"--speech {settings.speech}: no train.jsonl there; run the tour in a checkout of the repository, "
            "or name the folder examples/speech of one"
        )
    stops = plan(settings)
    began = time.monotonic()
    way = [["--speech", str(settings.speech)]]
    for number, stop in enumerate(stops, 1):
        print(f"\n━━ {number} of {len(stops)} · {stop.name} ━━ ({stop.minutes})\n{stop.why}\n")
        way += map(list, stop.commands)
        print(visit(stop, settings.out / "stops", way))
    print(f"\nThe tour took {time.monotonic() - began:.0f} s. Everything it made: {settings.out}/")
    print("Ask it something yourself:  blsp chat --model " + str(settings.out / "train" / "adapter"))


def visit(stop: Stop, folder: Path, way: list[list[str]]) -> str:
    """Run a stop's commands and remember what there was to see; a stop done before is only shown.

    way: all commands up to and with this stop's: where one is another, what they led to is looked at anew.
    """
    record = folder / f"{stop.name.replace(' ', '-')}.json"
    if record.exists() and (done := json.loads(record.read_text(encoding="utf-8"))).get("way") == way:
        return "(done on an earlier walk)\n" + done["seen"]
    for command in stop.commands:
        run_command(command)
    seen = stop.look()
    folder.mkdir(parents=True, exist_ok=True)
    fresh = record.with_suffix(".writing")
    fresh.write_text(json.dumps({"way": way, "seen": seen}, ensure_ascii=False, indent=1), encoding="utf-8")
    fresh.replace(record)
    return seen


def run_command(command: Sequence[str]) -> None:
    """Type a command: show it, run it in this process, stop the tour when it fails."""
    from blsp.cli import main

    print("  $ blsp " + " ".join(command), flush=True)
    if code := main(list(command)):
        raise TourError(
            f"`blsp {' '.join(command)}` ended with exit code {code}; mend that and run the tour again"
        )


def plan(settings: TourSettings) -> list[Stop]:
    """The stops, for a fresh adapter or for the shipped one."""
    speech, out = settings.speech, settings.out
    shipped = is_shipped(DEFAULT_MODEL) and not settings.cold
    start = DEFAULT_MODEL if shipped else None
    continued, features, run = out / "continued.jsonl", out / "features", out / "train"
    adapter = str(run / "adapter")
    device = ("--device", settings.device)
    return [
        Stop(
            "the manifest",
            "Real recordings of voice actors, with what they say: one JSON line per utterance.",
            "seconds",
            (),
            lambda: _show_manifests(speech),
        ),
        Stop(
            "the continuations",
            "Step 1: the frozen LLM reads each transcript and writes on. What it does now, reading,\n"
            "it shall do later, hearing. The teacher's likeliest 32 tokens are kept for every step.",
            "about a minute",
            (
                (
                    "continue", "--manifest", str(speech / "train.jsonl"), "--out", str(continued), "--llm", LLM,
                    "--behaviours", "continue:0.5,repeat:0.5", "--orders", "instruction-first:0.5,speech-first:0.5",
                    "--top-k", TOP_K, "--max-new-tokens", "40", *device,
                ),
            ),
            lambda: _show_rows(continued, ("text", "instruction", "continuation"), 2),
        ),
        Stop(
            "the speech features",
            "The frozen encoder hears every clip once, on its true length; training reads the result.",
            "seconds",
            (
                (
                    "encode", "--manifest", str(continued), "--audio-model", ENCODER, "--cache", str(features),
                    *device,
                ),
            ),
            lambda: f"kept in {features}: {_megabytes(features):.1f} MB",
        ),
        Stop(
            "the training",
            "Step 2: only the adapter learns. First to read the speech out over the LLM's own tokens,\n"
            "then to make the LLM's next-token distribution the same as on reading.",
            "five to eight minutes" if start is None else "two to four minutes",
            (
                (
                    "train", "--config", str(speech.parent / "tour" / ("adapt.yaml" if start else "cold.yaml")),
                    "--data", str(continued), "--cache", str(features), "--out", str(run),
                    "--held-out", str(HELD_OUT),
                    *(("--init-from", start) if start else ()), *device,
                ),
            ),
            lambda: divergence_lines(run / "metrics.jsonl") + f"\nthe curves: {run / 'curves.png'}",
        ),
        Stop(
            "what it hears",
            "Five recordings it has learnt from, five of the same actors it has never heard, and five of\n"
            "a telephone voice: the transcript, what the adapter reads out, and how the LLM goes on.",
            "a minute",
            (),
            lambda: compare_page(
                adapter,
                start,
                {
                    "learnt from": learnt_rows(speech / "train.jsonl", HELD_OUT),
                    "never heard": read_clips(speech / "heldout.jsonl"),
                    "another voice": read_clips(speech / "asterisk.jsonl"),
                },
                settings.device,
            ),
        ),
        Stop(
            "spoken questions",
            "It has met neither these questions nor these voices, and no answer that it learnt from is a\n"
            "person's: all are the LLM's own. The same question as text and as speech:",
            "seconds",
            (),
            lambda: question_page(start or adapter, speech / "questions.jsonl", settings.device),
        ),
    ]  # fmt: skip


def _show_manifests(speech: Path) -> str:
    lines = []
    for name in ("train.jsonl", "heldout.jsonl", "asterisk.jsonl", "questions.jsonl"):
        rows = read_manifest(speech / name)
        minutes = sum(row.get("seconds", 0.0) for row in rows) / 60
        speakers = len({row.get("speaker") for row in rows})
        lines.append(f"{speech / name}: {len(rows)} clips, {minutes:.1f} minutes, {speakers} speakers")
    example = json.dumps(read_manifest(speech / "train.jsonl")[0], ensure_ascii=False)
    return "\n".join([*lines, example])


def _show_rows(path: Path, fields: Sequence[str], count: int) -> str:
    rows = read_manifest(path)
    lines = [f"{path}: {len(rows)} rows"]
    for row in rows[:count]:
        lines += [f"  {field:>13}: {row[field]}" for field in fields] + [""]
    return "\n".join(lines)


def _megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
