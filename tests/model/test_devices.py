"""Arguments of transformers for loading: device_map, attn_implementation, parts that stay in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import speech_like, tiny_blsp
from transformers import AutoModelForMultimodalLM

import blsp
from blsp.distributed import find_runtime
from blsp.model.checkpoint import export_merged, load_blsp, save_adapter
from blsp.model.configuration_blsp import AUDIO_TOKEN
from blsp.model.modeling_blsp import BlspForConditionalGeneration

PARTS = (
    "audio_tower",
    "multi_modal_projector",
    *(f"language_model.{part}" for part in ("embed_tokens", "norm", "rotary_emb")),
)
DISK = {"lm_head": "cpu", "model.language_model.layers": "disk"} | {f"model.{part}": "cpu" for part in PARTS}


@pytest.fixture(scope="module", params=["adapter", "merged"])
def saved(request, tiny_models_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model, its inputs, and a folder of it."""
    blsp.register()
    model, processor = tiny_blsp(tiny_models_folder, adapter="grounded", runtime=find_runtime("cpu", "float32"))
    folder = tmp_path_factory.mktemp("saved") / request.param
    (save_adapter if request.param == "adapter" else export_merged)(model, processor, folder)
    texts = [f"say{AUDIO_TOKEN} one", f"say{AUDIO_TOKEN} one two"]
    inputs = processor(text=texts, audio=[speech_like(0.5), speech_like(1.1, 1)], sampling_rate=16000)
    return model, inputs, folder


def written(model: Any, inputs: Any) -> list[list[int]]:
    return model.generate(**inputs, max_new_tokens=8, do_sample=False).tolist()


@pytest.mark.parametrize("device_map", ["auto", "sequential", "cpu", {"": "cpu"}, torch.device("cpu"), DISK])
def test_a_model_spread_over_devices_writes_the_same(saved, tmp_path: Path, device_map: Any) -> None:
    model, inputs, folder = saved
    loaded = AutoModelForMultimodalLM.from_pretrained(folder, device_map=device_map, offload_folder=str(tmp_path))
    assert written(loaded, inputs) == written(model, inputs)


def test_what_stays_whole_on_a_device(saved) -> None:
    loaded = BlspForConditionalGeneration.from_pretrained(saved[2])
    assert {"WhisperEncoder", "GroundedAdapter", "LlamaDecoderLayer"} <= set(loaded._no_split_modules)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_adapter_stays_in_float32(saved, dtype: str) -> None:
    _, inputs, folder = saved
    model = BlspForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    assert {p.dtype for p in model.model.multi_modal_projector.parameters()} == {torch.float32}
    assert {p.dtype for p in model.model.language_model.parameters()} == {getattr(torch, dtype)}
    assert written(model, inputs)


@pytest.mark.parametrize("load", [BlspForConditionalGeneration, AutoModelForMultimodalLM])
def test_the_attention_is_the_one_that_was_asked_for(saved, load: Any) -> None:
    model, inputs, folder = saved
    loaded = load.from_pretrained(folder, attn_implementation="eager")
    parts = (loaded, loaded.model, loaded.model.audio_tower, loaded.model.language_model)
    assert {part.config._attn_implementation for part in parts} == {"eager"}
    assert written(loaded, inputs) == written(model, inputs)


def test_a_new_model_keeps_the_attention_of_a_cpu(saved) -> None:
    model, _, folder = saved
    loaded = load_blsp(folder, find_runtime("cpu", "float32"))[0] if folder.name == "adapter" else model
    assert {part.model.language_model.config._attn_implementation for part in (model, loaded)} == {"cpu"}


@pytest.mark.parametrize("load", [BlspForConditionalGeneration, AutoModelForMultimodalLM])
def test_attention_that_is_not_there_is_an_error(saved, load: Any) -> None:
    with pytest.raises((ImportError, ValueError), match=r"flash_attn|FlashAttention|kernels"):
        load.from_pretrained(saved[2], attn_implementation="flash_attention_2")


@pytest.mark.parametrize("name", ["prompt_lookup_num_tokens", "assistant_model"])
def test_drafts_from_the_prompts_ids_are_refused(saved, name: str) -> None:
    model, inputs, _ = saved
    with pytest.raises(ValueError, match=f"{name}: .* leave it out"):
        model.generate(**inputs, max_new_tokens=4, **{name: 3})
