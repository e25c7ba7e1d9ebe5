"""On which machine, with which weights and versions a result came about.

In:  a loaded model. Out: a dictionary for results.json, without anything personal.
Try: `describe(blsp.load())`
Flow: evaluation/ — last thing that results.json is given.
"""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import blsp
from blsp.inference.listener import Listener

PACKAGES = (
    "torch",
    "transformers",
    "numpy",
    "faster-whisper",
    "ctranslate2",
    "jiwer",
    "sacrebleu",
    "whisper-normalizer",
)


def describe(listener: Listener) -> dict[str, Any]:
    """Machine, versions, and what the model is made of."""
    config = listener.model.config
    return {
        "blsp": blsp.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": _machine(),
        "threads": torch.get_num_threads(),
        "device": str(listener.model.lm_head.weight.device),
        "dtype": str(listener.model.lm_head.weight.dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "adapter": config.adapter,
        "audio_model": config.audio_model_id,
        "audio_model_sha256": config.audio_model_sha256,
        "text_model": config.text_model_id,
        "text_model_sha256": config.text_model_sha256,
        "no_speech_sentence": config.no_speech_sentence,
    }


def _machine() -> str:
    """Processor and cores, or the accelerator."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [
            line.partition(":")[2].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        name = models[0] if models else name
    return f"{name}, {os.cpu_count()} cores"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
