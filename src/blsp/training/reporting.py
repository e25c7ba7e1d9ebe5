"""What a run shows of itself: a bar, lines of metrics.jsonl with the probes, the picture of its curves.

In:  the run and its state after a step. Out: ``metrics.jsonl``, ``curves.png``, a progress bar on stderr.
Try: `report(run, state, bar)`
Flow: training/loop.py after every step -> **reporting.py** -> the run folder
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import yaml
from tqdm import tqdm

from blsp.distributed import Runtime
from blsp.settings import TrainSettings
from blsp.training import probes, step
from blsp.training.curves import draw
from blsp.training.optimiser import State, learning_rate
from blsp.training.run import Run
from blsp.training.run_state import Progress, as_flags, empty_window

PICTURE_SECONDS = 60  # at least, between two drawings of curves.png


def report(run: Run, state: State, bar: tqdm) -> None:
    """One line of metrics.jsonl every so many steps, with the probes every so many more."""
    now, settings = state.progress, run.settings
    last = now.step == run.steps
    bar.update()
    probing = now.step == 1 or now.step % settings.probe_every == 0 or last
    if not (probing or now.step % settings.log_every == 0):
        return
    state.progress = empty_window(now)
    row = {
        "step": now.step,
        "loss": now.window_loss / now.window_steps,
        "lr": learning_rate(settings, now.step, run.steps),
        "samples": now.samples,
        "audio_seconds": round(now.audio_seconds, 3),
        "seconds": round(now.seconds, 3),
        "padding": round(now.window_padding / max(1, now.window_positions), 4),
    }
    bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
    if probing and (run.runtime.rank == 0 or settings.shard_llm):  # a sharded LLM is run by all or by none
        row |= measure(run)
    if run.runtime.rank != 0:
        return
    if probing:
        bar.write(", ".join(f"{name} {value:.4g}" for name, value in row.items()), file=sys.stderr)
    with open(settings.out / "metrics.jsonl", "a", encoding="utf-8") as out:
        out.write(json.dumps(row) + "\n")
    if probing and time.monotonic() - state.drawn > PICTURE_SECONDS:
        state.drawn = time.monotonic()
        picture(run)


def measure(run: Run) -> dict[str, float]:
    """The probes on held-out and training clips."""
    found: dict[str, float] = {}
    with step.autocast(run.runtime):
        for probe in run.probes:
            found |= probes.measure(probe, run.prefixes, run.processor.tokenizer, run.settings.batch_tokens)
    return found


def progress_bar(run: Run, progress: Progress) -> tqdm:
    """Steps done and to do, with an estimate of the time left."""
    return tqdm(
        total=run.steps,
        initial=progress.step,
        desc=run.settings.out.name,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,
        disable=run.runtime.rank != 0,
    )


def picture(run: Run) -> None:
    """Draw curves.png from what metrics.jsonl holds."""
    if run.runtime.rank == 0:
        draw(run.settings.out / "metrics.jsonl", run.settings.out / "curves.png")


def say(runtime: Runtime, text: str) -> None:
    """Print once, however many processes there are."""
    if runtime.rank == 0:
        print(text)


MEANINGS = {
    "kl": "next-token divergence from the text route, nats per token",
    "kl_shuffled": "the same with every clip exchanged for another one",
    "top1": "top-1 agreement with the text route",
    "wer": "word error rate of the read-out",
}


def model_card(settings: TrainSettings, metrics: Path) -> str:
    """YAML head, how to use it, how it was trained, and the last probes."""
    head = {
        "library_name": "transformers",
        "pipeline_tag": "audio-text-to-text",
        "base_model": [settings.llm, settings.audio_model],
        "tags": ["blsp", "speech", f"adapter-{settings.adapter}"],
    }
    last = json.loads(metrics.read_text(encoding="utf-8").splitlines()[-1])
    return f"""---
{yaml.safe_dump(head, sort_keys=False).strip()}
---

# BLSP adapter: {settings.audio_model} → {settings.llm}

A `{settings.adapter}` adapter that lets the frozen LLM `{settings.llm}` listen through the frozen encoder of
`{settings.audio_model}`. The folder holds the adapter alone; the frozen parts are loaded by name and checked
by digest.

    import blsp
    print(blsp.load("this/folder").answer("question.wav"))

## Training

{last["samples"]} samples, {last["audio_seconds"] / 3600:.2f} hours of speech, {last["step"]} steps,
{last["seconds"] / 60:.1f} minutes, final loss {last["loss"]:.4f}.

```yaml
{yaml.safe_dump(as_flags(settings), sort_keys=False, allow_unicode=True).strip()}
```

## Measured during training

{_probes(last)}
"""


def _probes(last: dict[str, float]) -> str:
    rows = [
        f"| {part.replace('_', '-')} | {meaning} | {last[f'{part}_{name}']:.4f} |"
        for part in ("held_out", "train")
        for name, meaning in MEANINGS.items()
        if f"{part}_{name}" in last
    ]
    if not rows:
        return "No probes were taken."
    return "\n".join(["| clips | measure | value |", "|---|---|---|", *rows])
