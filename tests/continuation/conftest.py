"""A tiny LLM that sometimes stops, and a small manifest with every kind of row."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blsp.data.manifest import Utterance, write_manifest
from blsp.settings import ContinueSettings

TEXTS = ["hello world", "what is the capital of france", "how many days", "please repeat the following words", "seven"]


@pytest.fixture(scope="session")
def stopping_llm(tiny_llm: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama for which every fourth token ends the answer, so that answers have many lengths."""
    folder = tmp_path_factory.mktemp("llm") / "stopping"
    shutil.copytree(tiny_llm("llama"), folder)
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": list(range(2, 320, 12))}))
    return str(folder)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Forty rows: each text several times, tags, nothing, silence, a long one, one with an instruction."""
    rows = [Utterance(id=f"r{i}", audio=f"{i}.wav", text=TEXTS[i % 5] + " again" * (i % 4)) for i in range(35)]
    rows += [
        Utterance(id="tags", audio="t.wav", text="<SIL> [noise] ..."),
        Utterance(id="empty", audio="e.wav", text="  "),
        Utterance(id="silence", audio="s.wav", text="", extra={"no_speech": True, "source": "made"}),
        Utterance(id="long", audio="l.wav", text="how many days are in a week " * 40),
        Utterance(id="own", audio="o.wav", text="seven", instruction="Say it in French:"),
    ]
    path = tmp_path / "in.jsonl"
    write_manifest(path, rows)
    return path


@pytest.fixture
def settings(manifest: Path, stopping_llm: str) -> Callable[..., ContinueSettings]:
    """`settings(out, **more)`: both orders, two behaviours, batches of four, at most ten tokens."""

    def made(out: Path, **more: Any) -> ContinueSettings:
        usual = {"behaviours": "continue:0.5,repeat:0.5", "orders": "speech-first,instruction-first"}
        sizes = {"batch_size": 4, "max_new_tokens": 10, "device": "cpu", "dtype": "float32"}
        given: dict[str, Any] = {"manifest": str(manifest), "llm": stopping_llm} | usual | sizes | more
        return ContinueSettings(out=out, **given)

    return made
