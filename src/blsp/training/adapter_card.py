"""The model card of an adapter's folder: metadata for the hub, how to use it, how it was trained, what was measured.

In:  the model's configuration, the settings of the run, metrics.jsonl, the verdict.
Out: the text of README.md.
Try: `model_card(config, settings, Path("runs/x/metrics.jsonl"), "")`
Flow: training/loop.py at the end → **adapter_card.py** → `save_adapter`
"""

import json
from pathlib import Path

from huggingface_hub import EvalResult

from blsp.model.card_parts import TASK, card_head
from blsp.model.configuration_blsp import BlspConfig
from blsp.model.lora import lora_note
from blsp.settings import TrainSettings
from blsp.training.run_state import as_flags, dump_flags

PROBE_MEANINGS = {
    "kl": "next-token divergence from the text route, nats per token",
    "kl_shuffled": "the same with every clip exchanged for another one",
    "top1": "top-1 agreement with the text route",
    "wer": "word error rate of the read-out, or of the tokens with the nearest embeddings",
    "tokens": "spoken tokens whose embedding is the nearest of all at their place",
}
METRICS = {"kl": "kl_divergence", "top1": "accuracy", "wer": "wer"}  # probes -> the hub's names


def model_card(config: BlspConfig, settings: TrainSettings, metrics: Path, verdict: str) -> str:
    """The README of the adapter's folder: metadata, how to use it, how it was trained, the verdict, the last probes."""
    last = json.loads(metrics.read_text(encoding="utf-8").splitlines()[-1])
    probes = {name: last[f"held_out_{name}"] for name in METRICS if f"held_out_{name}" in last}
    datasets = [Path(name).name.partition(".")[0] for name in settings.data]
    head = card_head(
        config,
        "adapter",
        [f"adapter-{settings.adapter}", *(["lora"] if config.lora else [])],
        settings.out.name,
        held_out_results(datasets, probes),
        datasets=datasets,
    )
    return f"""{head}
# BLSP adapter: {settings.audio_model} → {settings.llm}

A `{settings.adapter}` adapter that lets the frozen LLM `{settings.llm}` listen through the frozen encoder of
`{settings.audio_model}`. The folder holds the adapter alone; the frozen parts are loaded by name and checked
by digest.
{_lora_text(config)}
    import blsp
    print(blsp.load("this/folder").answer("question.wav"))

## Training

{last["samples"]} samples, {last["audio_seconds"] / 3600:.2f} hours of speech, {last["step"]} steps,
{last["seconds"] / 60:.1f} minutes, final loss {last["loss"]:.4f}.

```yaml
{dump_flags(as_flags(settings)).strip()}
```

## Measured

{verdict}

{_probes(last)}
"""


def _lora_text(config: BlspConfig) -> str:
    if not config.lora:
        return ""
    return f"""
It also holds LoRA (rank {config.lora["rank"]}) on: {", ".join(config.lora["parts"])}. With it
{lora_note(config.lora["parts"])}. The digests are those of the
parts before LoRA. `blsp export` merges it.
"""


def held_out_results(datasets: list[str], probes: dict[str, float]) -> list[EvalResult]:
    """The measures on held-out clips as the hub shows them."""
    return [
        EvalResult(
            task_type=TASK,
            dataset_type="held-out",
            dataset_name=f"clips of {', '.join(datasets)} that were not learnt from",
            metric_type=METRICS[probe],
            metric_name=PROBE_MEANINGS[probe],
            metric_value=round(value, 4),
        )
        for probe, value in probes.items()
    ]


def _probes(last: dict[str, float]) -> str:
    rows = [
        f"| {clips} | {meaning} | {last[f'{part}_{name}']:.4f} |"
        for part, clips in (("held_out", "not learnt from"), ("train", "learnt from"))
        for name, meaning in PROBE_MEANINGS.items()
        if f"{part}_{name}" in last
    ]
    if not rows:
        return "No probes were taken."
    return "\n".join(["| clips | measure | value |", "|---|---|---|", *rows])
