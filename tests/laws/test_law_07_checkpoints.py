"""Law 7: a saved adapter holds exactly the adapter's tensors and loads back identical. Other frozen weights
are refused, nothing is ever left at random values, and a merged export is the same model in one folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import FAMILIES, speech_like, tiny_blsp, tiny_tokenizer
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM, GPT2Config, GPTNeoXConfig, PhiConfig

import blsp
from blsp import cli
from blsp.distributed import find_runtime
from blsp.model.adapter import readout_rows
from blsp.model.checkpoint import CheckpointError, export_merged, load_blsp, new_blsp, save_adapter
from blsp.model.configuration_blsp import AUDIO_TOKEN
from blsp.model.modeling_blsp import BlspForConditionalGeneration, BlspModel
from blsp.model.processing_blsp import BlspProcessor
from blsp.weights.digest import Weights

ADAPTERS = ("conv", "stack", "grounded")
F32 = find_runtime("cpu", "float32")


@pytest.fixture
def saved(tiny_models_folder: Path, tmp_path: Path):
    """`saved(adapter, family)`: a float32 model, its processor, and the folder they were saved in."""

    def save(adapter: str = "conv", family: str = "llama"):
        model, processor = tiny_blsp(tiny_models_folder, family=family, adapter=adapter, runtime=F32)
        save_adapter(model, processor, tmp_path / "adapter", card="# A model")
        return model, processor, tmp_path / "adapter"

    return save


def _answer(model: torch.nn.Module, processor: BlspProcessor) -> torch.Tensor:
    inputs = processor(text=f"say{AUDIO_TOKEN} again", audio=speech_like(1.0), sampling_rate=16000)
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_exactly_the_adapters_tensors(saved, adapter: str) -> None:
    model, processor, folder = saved(adapter)
    stored = load_file(folder / "model.safetensors")
    expected = model.model.multi_modal_projector.state_dict(prefix="model.multi_modal_projector.")
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name]) for name in stored)
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "processor_config.json", "chat_template.jinja", "tokenizer.json", "README.md"} <= names
    assert "adapter_config.json" not in names  # would be taken for PEFT
    loaded, again = load_blsp(folder, F32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(_answer(loaded, again), _answer(model, processor))
    assert again.strides == processor.strides
    assert not any(p.requires_grad for p in loaded.model.audio_tower.parameters())
    assert not any(p.requires_grad for p in loaded.model.language_model.parameters())


def test_save_pretrained_of_the_class_saves_the_same(saved, tmp_path: Path) -> None:
    model, _, folder = saved()
    model.save_pretrained(tmp_path / "plain")
    assert load_file(tmp_path / "plain/model.safetensors").keys() == load_file(folder / "model.safetensors").keys()


@pytest.mark.parametrize(
    "load",
    [
        BlspForConditionalGeneration.from_pretrained,
        AutoModelForMultimodalLM.from_pretrained,
        lambda folder: BlspForConditionalGeneration.from_pretrained(str(folder), dtype="float32", device_map="cpu"),
    ],
)
def test_every_door_of_transformers_loads_the_frozen_parts(saved, load) -> None:
    model, processor, folder = saved("grounded")
    blsp.register()
    assert torch.equal(_answer(load(folder), processor), _answer(model, processor))


@pytest.mark.parametrize("load", [BlspModel.from_pretrained, AutoModel.from_pretrained])
def test_the_headless_model_is_not_random_either(saved, load) -> None:
    model, _, folder = saved()
    blsp.register()
    loaded = load(folder)
    assert type(loaded) is BlspModel
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("part", ["llama", "whisper"])
def test_other_frozen_weights_are_refused(tiny_models_folder: Path, tmp_path: Path, part: str) -> None:
    home = tmp_path / "parts"
    shutil.copytree(tiny_models_folder, home)
    model, processor = tiny_blsp(home, runtime=F32)
    save_adapter(model, processor, tmp_path / "adapter")
    weights = home / part / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in sorted(tensors) if "encoder.layers.0" in name or "layers.0.mlp" in name)
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, weights, metadata={"format": "pt"})
    for load in (lambda f: load_blsp(f, F32), BlspForConditionalGeneration.from_pretrained, BlspModel.from_pretrained):
        with pytest.raises(CheckpointError, match="other weights"):
            load(tmp_path / "adapter")


def _edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_a_folder_without_digests_is_refused(saved) -> None:
    _, _, folder = saved()
    _edit_config(folder, text_model_sha256=None)
    with pytest.raises(CheckpointError, match="other weights"):
        load_blsp(folder, F32)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_tensors_that_do_not_fit_are_refused(saved, change: str) -> None:
    _, _, folder = saved()
    tensors = load_file(folder / "model.safetensors")
    name = sorted(tensors)[0]
    if change == "missing":
        del tensors[name]
    elif change == "unknown":
        tensors["model.multi_modal_projector.other"] = torch.zeros(1)
    else:
        tensors[name] = tensors[name][:1].clone()
    save_file(tensors, folder / "model.safetensors")
    for load in (lambda f: load_blsp(f, F32), BlspForConditionalGeneration.from_pretrained):
        with pytest.raises(CheckpointError, match="do not fit"):
            load(folder)


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_blsp(tmp_path, F32)


def _as_written_before(folder: Path) -> None:
    """Store the read-out vocabulary as folders of before November 2026 do: in config.json alone."""
    tensors = load_file(folder / "model.safetensors")
    vocabulary = tensors.pop("model.multi_modal_projector.vocabulary")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("readout_size") == len(vocabulary)
    (folder / "config.json").write_text(json.dumps(config | {"readout_vocabulary": vocabulary.tolist()}))


def test_the_read_out_vocabulary_is_a_tensor(saved) -> None:
    model, _, folder = saved("grounded")
    stored = load_file(folder / "model.safetensors")["model.multi_modal_projector.vocabulary"]
    assert stored.dtype == torch.int32 and readout_rows(stored) == model.model.readout_vocabulary
    config = (folder / "config.json").read_text()
    assert "readout_vocabulary" not in config and len(config.splitlines()) < 200


@pytest.mark.parametrize("merged", [False, True])
def test_an_old_folder_with_its_read_out_vocabulary_in_the_configuration_loads(
    saved, tmp_path: Path, merged: bool
) -> None:
    model, processor, folder = saved("grounded")
    if merged:
        folder = tmp_path / "merged"
        export_merged(model, processor, folder)
    _as_written_before(folder)
    for loaded in (load_blsp(folder, F32)[0], BlspForConditionalGeneration.from_pretrained(folder)):
        assert loaded.model.readout_vocabulary == model.model.readout_vocabulary
        assert loaded.config.readout_vocabulary is None
        assert torch.equal(_answer(loaded, processor), _answer(model, processor))
    save_adapter(loaded, processor, tmp_path / "again")
    assert "model.multi_modal_projector.vocabulary" in load_file(tmp_path / "again" / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_export_is_the_same_model(saved, tmp_path: Path, family: str) -> None:
    model, processor, _ = saved("grounded", family)
    export_merged(model, processor, tmp_path / "merged")
    assert model.config.adapter_only
    loaded, again = load_blsp(tmp_path / "merged", F32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    found, expected = _answer(loaded, again), _answer(model, processor)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id
    tied = loaded.lm_head.weight.data_ptr() == loaded.get_input_embeddings().weight.data_ptr()
    assert tied == model.config.text_config.tie_word_embeddings


def test_a_merged_model_exported_again_stays_whole(saved, tmp_path: Path) -> None:
    model, processor, _ = saved()
    export_merged(model, processor, tmp_path / "merged")
    loaded, again = load_blsp(tmp_path / "merged", F32)
    export_merged(loaded, again, tmp_path / "twice")
    assert not loaded.config.adapter_only
    names = [load_file(tmp_path / folder / "model.safetensors").keys() for folder in ("merged", "twice")]
    assert names[0] == names[1]


def test_a_torn_export_is_refused(saved, tmp_path: Path) -> None:
    model, processor, _ = saved()
    export_merged(model, processor, tmp_path / "merged")
    tensors = load_file(tmp_path / "merged/model.safetensors")
    del tensors["model.language_model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "merged/model.safetensors", metadata={"format": "pt"})
    blsp.register()
    doors = (
        lambda f: load_blsp(f, F32),
        BlspForConditionalGeneration.from_pretrained,
        AutoModelForMultimodalLM.from_pretrained,
    )
    for load in doors:
        with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj"):
            load(tmp_path / "merged")


def test_saving_over_a_folder_replaces_it(saved) -> None:
    model, processor, folder = saved()
    (folder / "old.txt").write_text("old")
    save_adapter(model, processor, folder)
    assert not (folder / "old.txt").exists()
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_starts_at_the_size_of_the_llms_embeddings(pair_of, family: str) -> None:
    model, _ = pair_of("conv", family)
    embeddings = model.get_input_embeddings()(torch.arange(model.config.text_config.vocab_size))
    norm, mean = model.model.multi_modal_projector.norm, embeddings.mean(dim=0)
    torch.testing.assert_close(norm.weight[0], (embeddings - mean).std().to(norm.weight.dtype), rtol=1e-3, atol=0)
    torch.testing.assert_close(norm.bias, mean.to(norm.bias.dtype), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("config", [PhiConfig, GPT2Config, GPTNeoXConfig], ids=lambda config: config.model_type)
def test_other_families_merge_with_their_own_heads_and_tables(tmp_path: Path, config: type) -> None:
    """Phi's head has a bias; GPT-2 and GPT-NeoX call their embeddings otherwise."""
    sizes = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 64, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
    llm = AutoModelForCausalLM.from_config(config(**sizes))
    llm.save_pretrained(tmp_path / "llm")
    tiny_tokenizer().save_pretrained(tmp_path / "llm")
    model, processor = tiny_blsp(tmp_path, family="llm", runtime=F32)
    ids = torch.randint(3, 300, (2, 9))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, llm.eval()(input_ids=ids).logits)
    export_merged(model, processor, tmp_path / "merged")
    loaded, again = load_blsp(tmp_path / "merged", F32)
    assert torch.equal(_answer(loaded, again), _answer(model, processor))


def test_export_keeps_the_parts_type_or_takes_the_one_named(saved, tmp_path: Path) -> None:
    _, _, folder = saved()
    for dtype, expected in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        assert cli.main(["export", "--model", str(folder), "--out", str(tmp_path / dtype), "--dtype", dtype]) == 0
        stored = load_file(tmp_path / dtype / "model.safetensors")
        assert stored["model.language_model.layers.0.mlp.up_proj.weight"].dtype == expected
        load_blsp(tmp_path / dtype, F32)


def test_the_frozen_parts_are_named_as_they_were_asked_for(tiny_models_folder: Path, tmp_path: Path) -> None:
    tiny_blsp(tiny_models_folder)  # makes the parts
    parts = [Weights(f"embedded:{part}", str(tiny_models_folder / part)) for part in ("whisper", "llama")]
    save_adapter(*new_blsp(*parts, F32), tmp_path / "adapter")
    config = (tmp_path / "adapter" / "config.json").read_text()
    assert json.loads(config)["audio_config"]["_name_or_path"] == "embedded:whisper"
    assert str(tiny_models_folder) not in config


def test_a_folder_with_other_things_is_not_replaced(saved, tmp_path: Path) -> None:
    model, processor, _ = saved()
    (tmp_path / "home").mkdir()
    save_adapter(model, processor, tmp_path / "home")  # empty: taken
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers/thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        save_adapter(model, processor, tmp_path / "papers")
    assert (tmp_path / "papers/thesis.txt").exists()
