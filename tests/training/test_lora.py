"""`blsp train --lora`: training, saving, loading, resuming, merging, and errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support.tiny_models import speech_like, tiny_blsp
from support.training_examples import make_examples, write_data

pytest.importorskip("peft")

from blsp.distributed import find_runtime
from blsp.llm.prefix import PrefixCache
from blsp.model.checkpoint import CheckpointError, export, load_blsp, load_mean, save_adapter
from blsp.model.configuration_blsp import AUDIO_TOKEN
from blsp.model.lora import add_lora, lora_options, lora_weights, without_lora
from blsp.model.modeling_blsp import BlspForConditionalGeneration
from blsp.settings import ExportSettings, SettingsError, TrainSettings
from blsp.training import loop, run_state, step
from blsp.training.step import Objective

F32 = find_runtime("cpu", "float32")
PARTS = ("encoder", "llm")


@pytest.fixture
def settings(tmp_path: Path, tiny_llm: Any, tiny_whisper: str) -> TrainSettings:
    return TrainSettings(
        data=(str(write_data(tmp_path / "data", rows=10)),),
        out=tmp_path / "run",
        audio_model=tiny_whisper,
        llm=tiny_llm("llama"),
        adapter="conv",
        adapter_options=("bottleneck=8",),
        loss="kl",
        lora=("llm", "encoder"),
        lora_rank=2,
        batch_size=4,
        steps=4,
        lr=0.05,
        held_out=2,
        average_last=2,
        save_every=2,
        dtype="float32",
    )


def answer(model: Any, processor: Any) -> torch.Tensor:
    inputs = processor(text=f"say{AUDIO_TOKEN} again", audio=speech_like(1.0), sampling_rate=16000)
    with torch.no_grad():
        return model(**inputs).logits


def changed_pair(folder: Path) -> tuple[Any, Any]:
    """A model whose LoRA is not zero."""
    model, processor = tiny_blsp(folder, runtime=F32)
    add_lora(model, lora_options(PARTS, 2))
    torch.manual_seed(3)
    for weight in lora_weights(model).values():
        weight.data.normal_(std=0.3)
    return model, processor


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_gradients_reach_the_adapter_and_lora_alone(tiny_models_folder: Path, loss: str) -> None:
    model, processor = changed_pair(tiny_models_folder)
    trained = {name for name, _ in model.named_parameters() if "lora_" in name or "projector" in name}
    for name in trained:
        model.get_parameter(name).requires_grad_(True)
    sums = step.run(model, make_examples(processor, 4), Objective({loss: 1.0}), PrefixCache(model, reuse=False))
    sums.terms[loss].backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and float(p.grad.abs().sum()) > 0}
    assert reached == trained
    assert {part for part in ("audio_tower", "language_model") if any(part in name for name in reached)} == {
        "audio_tower",
        "language_model",
    }


def test_a_fresh_lora_changes_nothing_and_without_it_the_llm_is_the_plain_one(tiny_models_folder: Path) -> None:
    plain, processor = tiny_blsp(tiny_models_folder, runtime=F32)
    expected = answer(plain, processor)
    add_lora(plain, lora_options(PARTS, 2))
    assert torch.equal(answer(plain, processor), expected)
    model, _ = changed_pair(tiny_models_folder)
    assert not torch.allclose(answer(model, processor), expected)
    with without_lora(model):
        assert torch.equal(answer(model, processor), expected)


def test_train_save_load_and_merge(settings: TrainSettings, tmp_path: Path, capsys: Any) -> None:
    loop.train(settings)
    assert "law 1 does not hold" in capsys.readouterr().err
    folder = settings.out / "adapter"
    card = (folder / "README.md").read_text()
    assert "law 1 does not hold" in card and "- lora" in card
    model, processor = load_blsp(folder, F32)
    assert model.config.lora == {"parts": ["encoder", "llm"], "rank": 2, "alpha": 4}
    assert not any(p.requires_grad for p in model.model.audio_tower.parameters())
    assert all(float(p.abs().sum()) > 0 for name, p in lora_weights(model).items() if "lora_B" in name)
    expected = answer(model, processor)
    assert torch.equal(answer(BlspForConditionalGeneration.from_pretrained(folder), processor), expected)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert not any("base_layer" in name for name in file.keys())  # noqa: SIM118  no dict
    model.save_pretrained(tmp_path / "again")
    save_adapter(model, processor, tmp_path / "saved")
    for place in ("again", "saved"):
        assert torch.equal(answer(BlspForConditionalGeneration.from_pretrained(tmp_path / place), processor), expected)
    with pytest.raises(CheckpointError, match="LoRA"):
        load_mean([folder, tmp_path / "saved"], F32)

    export(ExportSettings(model=str(folder), out=tmp_path / "merged"))
    merged, _ = load_blsp(tmp_path / "merged", F32)
    assert merged.config.lora is None and not lora_weights(merged)
    torch.testing.assert_close(answer(merged, processor), expected, rtol=0, atol=1e-4)


def test_a_killed_run_goes_on_to_the_bit(settings: TrainSettings, tmp_path: Path, monkeypatch: Any) -> None:
    loop.train(settings)
    killed = replace(settings, out=tmp_path / "killed")
    learn = loop.learn

    def until(run: Any, state: Any, number: int, batches: Any) -> None:
        if number == 3:
            raise KeyboardInterrupt
        learn(run, state, number, batches)

    monkeypatch.setattr(loop, "learn", until)
    with pytest.raises(KeyboardInterrupt):
        loop.train(killed)
    assert run_state.newest_complete(killed.out / "checkpoints").name == "step-2"
    monkeypatch.setattr(loop, "learn", learn)
    loop.train(killed)
    results = [(out / "adapter/model.safetensors").read_bytes() for out in (settings.out, killed.out)]
    assert results[0] == results[1]


def test_training_goes_on_from_lora(settings: TrainSettings, tmp_path: Path) -> None:
    loop.train(settings)
    start = (str(settings.out / "adapter"),)
    more = replace(settings, out=tmp_path / "more", init_from=start, adapter_options=(), steps=1)
    with pytest.raises(SettingsError, match="--lora encoder llm --lora-rank 2"):
        loop.train(replace(more, lora=("llm",)))
    loop.train(replace(more, out=tmp_path / "further"))
    assert load_blsp(tmp_path / "further" / "adapter", F32)[0].config.lora


def test_what_does_not_go_together_is_refused(
    settings: TrainSettings, tmp_path: Path, tiny_models_folder: Path
) -> None:
    with pytest.raises(SettingsError, match="leave out --cache"):
        replace(settings, cache=tmp_path)
    with pytest.raises(SettingsError, match="--shard-llm"):
        replace(settings, shard_llm=True)
    with pytest.raises(SettingsError, match="does not run the LLM"):
        loop.train(replace(settings, adapter="grounded", adapter_options=(), loss="ctc"))
    save_adapter(*changed_pair(tiny_models_folder), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="blsp export"):
        load_blsp(tmp_path / "adapter", find_runtime("cpu", "float32", "int8"))


def test_tensors_of_lora_are_never_dropped(tiny_models_folder: Path, tmp_path: Path) -> None:
    """A folder whose config.json does not name its LoRA, or another rank, is refused."""
    save_adapter(*changed_pair(tiny_models_folder), tmp_path / "adapter")
    config = tmp_path / "adapter" / "config.json"
    text = config.read_text()
    for lora in ('"lora": null, "was": {', '"lora": {"parts": ["llm"], "rank": 2, "alpha": 4}, "was": {'):
        config.write_text(text.replace('"lora": {', lora))
        with pytest.raises(CheckpointError, match="lora_"):
            load_blsp(tmp_path / "adapter", F32)
