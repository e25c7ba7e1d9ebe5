"""The model card of a freshly trained adapter: what it is made of and how it was made, in Hugging Face's
form.

In:  the run's settings and its metrics.jsonl. Out: the text of README.md in the adapter's folder.
Try: ``print(model_card(settings, Path("runs/x/metrics.jsonl")))``
Flow: training/loop.py -> **card.py** -> adapter/README.md
"""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from blsp.settings import TrainSettings
from blsp.training.run_folder import as_flags

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
