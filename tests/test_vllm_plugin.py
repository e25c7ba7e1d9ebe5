"""The plugin for vLLM, with a double of the parts of vLLM that it uses; `make test-vllm` runs vLLM itself."""

from __future__ import annotations

import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from support.tiny_models import speech_like, tiny_blsp

from blsp import vllm_plugin
from blsp.model.adapter_parts import ConvStack
from blsp.model.configuration_blsp import AUDIO_TOKEN, CheckpointError


class Base:
    """What the plugin uses of TransformersMultiModalForCausalLM."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        self.model = vllm_config.loaded

    def configure_mm_token_handling(self, *given: Any) -> None:
        self.handling = given


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """vLLM's registry, after `register`, with a double of vLLM."""
    models: dict[str, str] = {}
    name = "vllm.model_executor.models.transformers"
    for module, content in (
        ("vllm", {"ModelRegistry": SimpleNamespace(register_model=models.__setitem__)}),
        (name, {"TransformersMultiModalForCausalLM": Base}),
        ("vllm.model_executor", {}),
        ("vllm.model_executor.models", {}),
    ):
        double = ModuleType(module)
        vars(double).update(content)
        monkeypatch.setitem(sys.modules, module, double)
    vllm_plugin._model_class.cache_clear()
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, function = project["entry-points"]["vllm.general_plugins"]["blsp"].split(":")
    getattr(import_module(module), function)()
    return models


def served(registered: dict[str, str], model: Any) -> Any:
    """The model as vLLM makes it, by the name that config.json has."""
    (architecture,) = registered
    assert architecture == type(model).__name__
    module, name = registered[architecture].split(":")
    config = SimpleNamespace(model_config=SimpleNamespace(hf_config=model.config), loaded=model.model)
    return getattr(import_module(module), name)(vllm_config=config)


@pytest.mark.parametrize("adapter", ["conv", "stack"])
def test_clips_get_the_vectors_that_they_get_alone(
    registered: dict[str, str], tiny_models_folder: Path, adapter: str
) -> None:
    model, processor = tiny_blsp(tiny_models_folder / f"vllm-{adapter}", family="llama", adapter=adapter)
    there = served(registered, model)
    assert there.handling == (model.config.text_config.vocab_size, [model.config.audio_token_id])
    clips = [processor(text=AUDIO_TOKEN, audio=speech_like(seconds)) for seconds in (1.0, 0.5)]
    with torch.no_grad():
        alone = [model.get_audio_features(c["input_features"], c["input_features_mask"]).pooler_output for c in clips]
        names = ("input_features", "input_features_mask")
        listed = there.embed_multimodal(**{name: [clip[name][0] for clip in clips] for name in names})
        stacked = there.embed_multimodal(**{name: clips[0][name] for name in names}, num_audio_tokens=None)
    assert [len(vectors) for vectors in listed] == [clip["input_ids"].numel() for clip in clips]
    assert all(map(torch.equal, listed, alone)) and torch.equal(stacked[0], alone[0])
    assert there.embed_multimodal() == []


def test_what_linear_layers_get_is_contiguous() -> None:
    stack = ConvStack([8, 8], [2])
    assert stack(torch.zeros(1, 5, 8), torch.tensor([5]))[0].is_contiguous(), "vLLM's own layers refuse it"


def test_an_adapter_that_reads_out_is_refused_by_name(registered: dict[str, str], tiny_models_folder: Path) -> None:
    model, _ = tiny_blsp(tiny_models_folder / "vllm-grounded", family="llama", adapter="grounded")
    with pytest.raises(CheckpointError, match="adapter 'grounded' reads out"):
        served(registered, model)
    with pytest.raises(AttributeError, match="has no attribute 'Other'"):
        _ = vllm_plugin.Other
