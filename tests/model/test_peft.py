"""Training more than the adapter: gradients to the encoder, LoRA with PEFT, and saving a changed LLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support.tiny_models import speech_like, tiny_blsp

from blsp.distributed import find_runtime
from blsp.model.checkpoint import save_adapter
from blsp.model.configuration_blsp import AUDIO_TOKEN
from blsp.model.modeling_blsp import BlspForConditionalGeneration
from blsp.model.weight_samples import UnmergedError

ADAPTERS = pytest.mark.parametrize("adapter", ["conv", "grounded"])


@pytest.fixture
def pair(tiny_models_folder: Path, request: pytest.FixtureRequest) -> Any:
    """A model of its own, to be changed."""
    adapter = request.node.callspec.params.get("adapter", "conv") if hasattr(request.node, "callspec") else "conv"
    return tiny_blsp(tiny_models_folder, adapter=adapter, runtime=find_runtime("cpu", "float32"))


def inputs_of(processor: Any) -> dict[str, Any]:
    texts = [f"say{AUDIO_TOKEN} one", f"say{AUDIO_TOKEN} one two"]
    return dict(processor(text=texts, audio=[speech_like(0.5), speech_like(1.1, 1)], sampling_rate=16000))


def backward(model: Any, processor: Any) -> set[str]:
    """The parameters that get a gradient other than zero."""
    inputs = inputs_of(processor)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == processor.audio_token_id, -100)
    model(**inputs, labels=labels).loss.backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and float(p.grad.abs().sum()) > 0}


@ADAPTERS
def test_gradients_reach_a_trainable_encoder(pair, adapter: str) -> None:
    model, processor = pair
    assert not any("audio_tower" in name for name in backward(model, processor))
    model.model.audio_tower.requires_grad_(True)
    model.model.audio_tower.embed_positions.requires_grad_(False)
    trained = {f"model.audio_tower.{name}" for name, p in model.model.audio_tower.named_parameters() if p.requires_grad}
    assert trained - backward(model, processor) <= {name for name in trained if name.endswith("k_proj.bias")}


@ADAPTERS
def test_lora_on_encoder_and_llm(pair, adapter: str) -> None:
    """The k_proj of Whisper has no bias; each LoRA starts with B = 0, so the first gradient is that of B."""
    peft = pytest.importorskip("peft")
    model, processor = pair
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["multi_modal_projector"])
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.01)
    reached = backward(wrapped, processor)
    lora = {name for name, _ in wrapped.named_parameters() if "lora_" in name}
    assert {part for part in ("audio_tower", "language_model") if any(part in name for name in lora)} == {
        "audio_tower",
        "language_model",
    }
    assert lora <= reached
    assert any("multi_modal_projector.modules_to_save" in name for name in reached)


@pytest.mark.parametrize("part", ["audio_tower", "language_model"])
def test_a_merged_change_is_saved_with_the_whole_model(pair, tmp_path: Path, part: str) -> None:
    peft = pytest.importorskip("peft")
    model, processor = pair
    targets = rf".*{part}.*q_proj"
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    with pytest.raises(UnmergedError, match=r"q_proj.*merge_and_unload"):
        model.save_pretrained(tmp_path / "unmerged")
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert merged.config.adapter_only  # of the model in memory
    loaded = BlspForConditionalGeneration.from_pretrained(tmp_path / "merged")
    expected = merged.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    with torch.no_grad():
        logits = [m(**inputs_of(processor)).logits for m in (loaded, merged)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


def test_another_number_format_is_no_change(pair, tmp_path: Path) -> None:
    """The number format may change; a trained tensor may not."""
    model, _ = pair
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert _tensors(tmp_path / "half") == set(model.adapter_state())
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    model.save_pretrained(tmp_path / "whole")
    assert _tensors(tmp_path / "whole") > set(model.adapter_state())


def test_a_loaded_folder_knows_what_was_loaded(pair, tmp_path: Path) -> None:
    model, processor = pair
    save_adapter(model, processor, tmp_path / "adapter")
    loaded = BlspForConditionalGeneration.from_pretrained(tmp_path / "adapter")
    assert loaded.frozen_sample.keys() == model.frozen_sample.keys()
    assert any("language_model" in name for name in loaded.frozen_sample)


def _tensors(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())
