"""`--attn-implementation` of each command that has it: the LLM's attention is the one that was named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import tiny_blsp
from support.training_examples import write_data
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from blsp import cli
from blsp.distributed import find_runtime
from blsp.model.checkpoint import export_merged, save_adapter

NAME = "counted"
COMMANDS = ("train", "generate", "generate merged", "evaluate", "continue")


@pytest.fixture
def calls() -> Any:
    """The modules that called an attention of that name; it is torch's own, but it is counted."""
    seen: list[str] = []

    def counted(module: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(type(module).__name__)
        return sdpa_attention_forward(module, *arguments, **options)

    AttentionInterface.register(NAME, counted)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return seen


@pytest.fixture(scope="module")
def made(tiny_models_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a task, and both forms of a model."""
    folder = tmp_path_factory.mktemp("made")
    write_data(folder, rows=10)
    (folder / "task.yaml").write_text("name: mine\nkind: asr\nmanifest: continued.jsonl\nlanguage: en\nsamples: 3\n")
    model, processor = tiny_blsp(tiny_models_folder, runtime=find_runtime("cpu"))
    save_adapter(model, processor, folder / "adapter")
    export_merged(model, processor, folder / "merged")
    return folder


@pytest.fixture
def run(made: Path, tiny_llm: Callable[[str], str], tiny_whisper: str, tmp_path: Path) -> Callable[..., int]:
    """Run one of the commands, with further flags; its `--out` is a new folder's `out`."""
    data = str(made / "continued.jsonl")

    llm = tiny_llm("llama")

    def of(command: str, *flags: str) -> int:
        name, _, form = command.partition(" ")
        model = ["--model", str(made / (form or "adapter"))]
        parts = ["--audio-model", tiny_whisper, "--llm", llm, "--adapter", "conv", "--adapter-options", "bottleneck=8"]
        usual = {
            "train": ["--data", data, *parts, "--loss", "ce", "--steps", "2", "--batch-size", "4"],
            "generate": ["--manifest", data, "--limit", "3", "--max-new-tokens", "4", *model],
            "evaluate": ["--task", str(made / "task.yaml"), "--routes", "text", "speech", "--bootstrap", "5", *model],
            "continue": ["--manifest", data, "--limit", "3", "--max-new-tokens", "4", "--llm", llm],
        }[name]
        out = ["--out", str(tmp_path / "out"), "--device", "cpu", "--dtype", "float32"]
        return cli.main([name, *usual, *out, *flags])

    return of


@pytest.mark.parametrize("command", COMMANDS)
def test_the_llm_attends_as_it_is_told(command: str, run: Callable[..., int], calls: list[str]) -> None:
    assert run(command, "--attn-implementation", NAME) == 0
    assert set(calls) == {"LlamaAttention"}


@pytest.mark.parametrize("command", COMMANDS)
def test_without_the_flag_it_is_torchs(command: str, run: Callable[..., int], calls: list[str]) -> None:
    assert run(command) == 0
    assert not calls


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["flash_attention_2", "no_such_attention"])
def test_attention_that_is_not_there_is_named(command: str, name: str, run: Callable[..., int], capsys: Any) -> None:
    assert run(command, "--attn-implementation", name) == 1
    said = capsys.readouterr().err
    assert f"--attn-implementation {name}" in said and "take sdpa or eager" in said


def test_a_run_goes_on_with_the_attention_it_was_started_with(run: Callable[..., int], capsys: Any) -> None:
    assert run("train", "--attn-implementation", "eager") == 0
    assert run("train", "--attn-implementation", "sdpa") == 1
    assert "attn_implementation" in capsys.readouterr().err
