"""Cards as huggingface_hub reads them: of shipped adapters, of exports, of a trained adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from support.tiny_models import tiny_blsp

from blsp.distributed import find_runtime
from blsp.model.card_parts import card_head, card_of, measured
from blsp.model.checkpoint import export, save_adapter
from blsp.model.configuration_blsp import BlspConfig, CheckpointError
from blsp.settings import ExportSettings, TrainSettings
from blsp.training.adapter_card import model_card

MODELS = sorted((Path(__file__).parents[2] / "models").glob("blsp-*"))
FIGURES = {
    "tasks": {
        "asr": {
            "text": {"wer": 0.9, "n": 4},
            "speech": {"wer": 0.25, "wer_ci": [0.1, 0.4], "cer": 0.1, "n": 4},
            "readout": {"wer": 0.2, "n": 4},
            "cascade": {"n": 0, "unavailable": "no recogniser"},
        },
        "st": {"speech": {"bleu": 21.456, "n": 4}},
    }
}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(FIGURES))
    return path


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_a_shipped_card_claims_what_stands_in_it(folder: Path) -> None:
    card = ModelCard.load(folder / "README.md")
    assert len(card.data.base_model) == 2 and card.data.model_name == folder.name
    assert set(card.data.metrics) == {result.metric_type for result in card.data.eval_results}
    for result in card.data.eval_results:
        assert str(result.metric_value) in card.text, result


def test_figures_of_an_evaluation(results: Path) -> None:
    found = [(each.dataset_type, each.metric_name, each.metric_value) for each in measured(results)]
    wer = [("asr", "WER, the LLM's answer", 25.0), ("asr", "WER, what was read out", 20.0)]
    assert found == [*wer, ("st", "BLEU, the LLM's answer", 21.5)]
    results.write_text("[]")
    with pytest.raises(CheckpointError, match=r"results\.json: cannot be read"):
        measured(results)


def test_an_export_repeats_the_adapters_metadata(tiny_models_folder: Path, tmp_path: Path, results: Path) -> None:
    model, processor = tiny_blsp(tiny_models_folder, runtime=find_runtime("cpu", "float32"))
    name = "embedded:smollm2-135m-instruct"
    named = BlspConfig(text_model_id=name, audio_model_id="openai/whisper-small")
    head = card_head(named, "adapter", [], "mine", measured(results)[:1], datasets=["clips"], license="mit")
    save_adapter(model, processor, tmp_path / "adapter", card=f"{head}\n# Mine")
    export(ExportSettings(model=str(tmp_path / "adapter"), out=tmp_path / "merged"))
    data = ModelCard.load(tmp_path / "merged" / "README.md").data
    assert (data.datasets, data.metrics, data.model_name) == (["clips"], ["wer"], "merged")
    assert data.license is None  # those of the LLM and the encoder hold too
    export(ExportSettings(model=str(tmp_path / "adapter"), out=tmp_path / "again", results=results))
    assert len(ModelCard.load(tmp_path / "again" / "README.md").data.eval_results) == 3
    (tmp_path / "adapter" / "README.md").write_text("---\nmodel-index: 3\n  - : [\n---\n# Broken")
    with pytest.raises(CheckpointError, match=r"README\.md: its metadata cannot be read"):
        card_of(tmp_path / "adapter")


def test_a_trained_adapters_card(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    last = {"step": 3, "samples": 9, "audio_seconds": 9.0, "seconds": 6.0, "loss": 1.5, "held_out_kl": 0.25}
    metrics.write_text(json.dumps(last | {"held_out_wer": 0.5}) + "\n")
    parts = {"audio_model": "openai/whisper-small", "llm": "me/llm", "adapter": "conv", "loss": "ce"}
    settings = TrainSettings(data=("a/said.jsonl",), out=tmp_path / "run", **parts)
    config = BlspConfig(text_model_id="me/llm", audio_model_id="openai/whisper-small")
    data = ModelCard(model_card(config, settings, metrics, "It listens.")).data
    assert data.base_model == ["me/llm", "openai/whisper-small"] and data.datasets == ["said"]
    assert [(each.metric_type, each.metric_value) for each in data.eval_results] == [
        ("kl_divergence", 0.25),
        ("wer", 0.5),
    ]
