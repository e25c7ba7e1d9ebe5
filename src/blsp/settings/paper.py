"""The paper's settings: the values of `--paper`, used instead of the defaults.

In:  the class of a command's settings. Out: the values of its flags in the paper (arXiv 2309.00916) and its code.
Try: `blsp train --paper --data continued.jsonl --out runs/paper --audio-model openai/whisper-small --llm MODEL`
Flow: **paper.py** → flags.py; values of a YAML file and typed flags replace these values

Values that are also our defaults are listed too, so that this file is complete. docs/training.md explains where the
defaults differ and why, and the differences without a flag.
"""

from typing import Any

PAPER: dict[str, dict[str, Any]] = {
    "ContinueSettings": {
        "behaviours": "continue",
        "orders": "instruction-first",
        "normalise": "whisper",
        "max_new_tokens": 64,
        "max_prompt_tokens": 192,
        "temperature": 0.0,
    },
    "EncodeSettings": {"pad_to_30s": True},
    "TrainSettings": {
        "adapter": "conv",
        "adapter_options": ("bottleneck=512", "embedding_std=1"),  # the last LayerNorm begins with gain 1 and bias 0
        "loss": "ce",
        "pad_to_30s": True,
        "max_seconds": 30.0,
        "epochs": 1.0,
        "batch_size": 768,
        "lr": 5e-5,
        "weight_decay": 0.05,
        "warmup_steps": 1000,
        "schedule": "linear",
        "clip": 1.0,
        "augment": (),
        "no_speech": 0.0,
        "average_last": 0,
        "dtype": "bfloat16",
    },
}
