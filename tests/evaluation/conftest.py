"""A tiny random model to evaluate, a few generated recordings, and every kind of task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.speech_copies import TEXTS
from support.tiny_models import speech_like, tiny_blsp

from blsp.data.audio import write_wav
from blsp.data.manifest import write_manifest
from blsp.evaluation.judge import Evaluation
from blsp.evaluation.tasks import Suite, load_suite
from blsp.inference.listener import Listener

OPTIONS = ["hello", "france and the world", "a week", "days"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with recordings, a manifest of each kind, and a suite that asks them all."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = []
    for number, text in enumerate(TEXTS):
        write_wav(folder / f"{number}.wav", speech_like(0.4 + 0.35 * number, seed=number))
        rows.append({"id": f"en/{number}", "audio": f"{number}.wav", "text": text, "language": "en"})
    write_manifest(folder / "speech.jsonl", rows)
    write_manifest(
        folder / "french.jsonl",
        [row | {"id": f"fr/{i}", "text": f"mot {i} de la semaine"} for i, row in enumerate(rows)],
    )
    write_manifest(
        folder / "choices.jsonl",
        [row | {"options": OPTIONS, "reference": OPTIONS[i % 4]} for i, row in enumerate(rows)],
    )
    write_manifest(folder / "questions.jsonl", [row | {"reference": "seven", "references": ["7"]} for row in rows])
    (folder / "silence.jsonl").write_text('{"id": "s", "audio": "s.wav", "text": "", "no_speech": true}\n')
    write_wav(folder / "s.wav", 0 * speech_like(1.0))
    tasks = [
        {"name": "asr", "kind": "asr", "manifest": "speech.jsonl", "behaviour": "repeat"},
        {
            "name": "st-en-fr",
            "kind": "st",
            "manifest": "speech.jsonl",
            "references": "french.jsonl",
            "behaviour": "translate:fr",
            "answer_language": "fr",
        },
        {"name": "slu", "kind": "slu", "manifest": "choices.jsonl", "instruction": "Choose:", "chance": 0.25},
        {"name": "sqa", "kind": "sqa", "manifest": "questions.jsonl"},
        {"name": "chat", "kind": "chat", "manifest": "speech.jsonl", "order": "speech-first", "instruction": "Talk."},
        {"name": "continuation", "kind": "continuation", "manifest": "speech.jsonl", "behaviour": "continue"},
        {"name": "no-speech", "kind": "no-speech", "manifest": "silence.jsonl"},
    ]
    for task in tasks:
        task["max_new_tokens"] = 12
    alignment = {"manifest": "speech.jsonl", "layer_samples": 5, "max_new_tokens": 12}
    (folder / "suite.yaml").write_text(yaml.safe_dump({"tasks": tasks, "alignment": alignment}))
    return folder


@pytest.fixture
def suite(corpus: Path) -> Suite:
    return load_suite(str(corpus / "suite.yaml"), corpus)


@pytest.fixture(scope="session")
def listener(tiny_models_folder: Path) -> Listener:
    """conv: every clip is taken for speech."""
    return Listener(*tiny_blsp(tiny_models_folder, adapter="conv"))


@pytest.fixture
def evaluation_of(listener: Listener, tmp_path: Path) -> Callable[..., Evaluation]:
    """Makes an `Evaluation` in a fresh folder, without the cascade."""

    def build(**changes: Any) -> Evaluation:
        options = {"listener": listener, "folder": tmp_path / "results", "routes": ("text", "speech"), "bootstrap": 50}
        return Evaluation(**options | changes)

    return build
