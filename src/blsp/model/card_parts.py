"""The card of a folder for the hub: its metadata, and the README of a merged model.

In:  the model's configuration; figures of `blsp evaluate` (results.json); the card of the adapter that is merged.
Out: the text of README.md. Its metadata is checked and written by huggingface_hub.
Try: `card_head(config, "adapter", ["adapter-conv"])`
Flow: training/adapter_card.py, checkpoint.py (`export`), recipes → **card_parts.py** → README.md
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from blsp.model.configuration_blsp import BlspConfig, CheckpointError
from blsp.weights.embedded import hub_name

TASK = "audio-text-to-text"
METRICS = {"wer": ("wer", "WER", 100), "bleu": ("bleu", "BLEU", 1), "accuracy": ("accuracy", "accuracy", 100)}
ROUTES = {
    "speech": ", the LLM's answer",
    "readout": ", what was read out",
    "transcript": ", `blsp transcribe`",
}  # with the model itself


def card_head(
    config: BlspConfig,
    relation: str,
    tags: Sequence[str],
    name: str = "blsp",
    results: Sequence[EvalResult] = (),
    **more: Any,
) -> str:
    """The card's metadata. relation: between the model and its parts, "adapter" or "merge". results: its figures.

    A part that is no hub id (a folder of this machine) is left out.
    """
    parts = [hub_name(part) for part in (config.text_model_id, config.audio_model_id)]
    known = [part for part in parts if part is not None]
    data = ModelCardData(
        base_model=known or None,
        base_model_relation=relation if known else None,
        library_name="transformers",
        pipeline_tag=TASK,
        tags=["blsp", "speech", *tags],
        model_name=name,
        eval_results=list(results) or None,
        metrics=sorted({result.metric_type for result in results}) or None,
        **more,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def measured(path: Path) -> list[EvalResult]:
    """The figures of a results.json that the hub shows: on hearing, WER and accuracy in percent, and BLEU."""
    try:
        tasks = json.loads(path.read_text(encoding="utf-8"))["tasks"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read as results.json of `blsp evaluate`: {error!r}") from error
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=task,
            dataset_name=f"{task} (blsp evaluate)",
            metric_type=kind,
            metric_name=f"{title}{ROUTES[route]}",
            metric_value=round(factor * found[metric], 1),  # as the card's tables show it
        )
        for task, routes in tasks.items()
        for route, found in routes.items()
        for metric, (kind, title, factor) in METRICS.items()
        if route in ROUTES and isinstance(found.get(metric), int | float)
    ]


def card_of(folder: str | Path) -> dict[str, Any]:
    """What the card of an adapter's folder says and a merged model's may repeat; nothing where there is no card."""
    path = Path(folder) / "README.md"
    if not path.is_file():
        return {}
    try:
        data = ModelCard.load(path, ignore_metadata_errors=True).data
    except (ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path}: its metadata cannot be read: {error}; mend or remove the file") from error
    found = {"language": data.language, "datasets": data.datasets, "results": data.eval_results}
    return {name: value for name, value in found.items() if value}


def merged_card(config: BlspConfig, name: str, **metadata: Any) -> str:
    """The README of a merged model. metadata: of `card_head`."""
    llm, audio = config.text_model_id, config.audio_model_id
    return f"""{card_head(config, "merge", [f"adapter-{config.adapter}"], name, **metadata)}
# BLSP: {audio} → {llm}

The LLM `{llm}` listens through the encoder of `{audio}` and a `{config.adapter}` adapter. All weights and
the code are in this folder; transformers loads it by itself:

    pip install torch "transformers>=5.20" soundfile soxr av fsspec

```python
from transformers import AutoModelForMultimodalLM, AutoProcessor

processor = AutoProcessor.from_pretrained("this/folder", trust_remote_code=True)
model = AutoModelForMultimodalLM.from_pretrained("this/folder", trust_remote_code=True)
messages = [{{"role": "user", "content": [{{"type": "audio", "path": "question.wav"}}]}}]
inputs = processor.apply_chat_template(
    messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
)
answer = model.generate(**inputs, max_new_tokens=64)[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(answer, skip_special_tokens=True)[0])
```

The licences of both parts also apply to this folder.
"""
