"""The shipped adapter: the mean of the named stages, with the logs of all stages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from ship import _stages, card, stages_of, write_weights
from support.tiny_models import tiny_blsp

from blsp.distributed import find_runtime
from blsp.model.checkpoint import CheckpointError, load_blsp, save_adapter

PLACE = find_runtime("cpu", "float32")


@pytest.fixture
def run(tmp_path: Path, tiny_models_folder: Path) -> Path:
    """A run of two stages whose adapters are all 1 and all 3."""
    for name, value in (("first", 1.0), ("second", 3.0)):
        stage = tmp_path / "run" / "stages" / name
        model, processor = tiny_blsp(tiny_models_folder, adapter="grounded", runtime=PLACE)
        for weight in model.model.multi_modal_projector.parameters():
            torch.nn.init.constant_(weight, value)
        save_adapter(model, processor, stage / "adapter")
        for log in ("settings.yaml", "metrics.jsonl", "curves.png"):
            (stage / log).write_text(name)
    return tmp_path / "run"


@pytest.mark.parametrize(("stages", "value"), [(["second"], 3.0), (["first", "second"], 2.0)])
def test_the_mean_of_the_stages_is_shipped(run: Path, tmp_path: Path, stages: list[str], value: float) -> None:
    write_weights(run, tmp_path / "out", [run / "stages" / name / "adapter" for name in stages])
    model, _ = load_blsp(tmp_path / "out", PLACE)
    assert all((weight == value).all() for weight in model.model.multi_modal_projector.parameters())
    assert (tmp_path / "out" / "training" / "first" / "metrics.jsonl").read_text() == "first"


def test_a_run_without_stages_is_shipped_with_its_own_logs(run: Path, tmp_path: Path) -> None:
    plain = run / "stages" / "first"
    write_weights(plain, tmp_path / "out", [plain / "adapter"])
    assert (tmp_path / "out" / "training" / "first" / "metrics.jsonl").read_text() == "first"


def test_only_folders_are_stages(run: Path) -> None:
    for name in ("first.skipped.jsonl", ".second.lock"):
        (run / "stages" / name).touch()
    assert [stage.name for stage in stages_of(run)] == ["first", "second"]


def test_an_old_adapter_gets_the_names_of_its_parts(run: Path, tmp_path: Path) -> None:
    adapter = run / "stages" / "first" / "adapter"
    written = json.loads((adapter / "config.json").read_text())
    written["text_config"]["_name_or_path"] = "/home/maker/llm"
    (adapter / "config.json").write_text(json.dumps(written))
    write_weights(run, tmp_path / "out", [adapter])
    shipped = json.loads((tmp_path / "out" / "config.json").read_text())
    assert shipped["text_config"]["_name_or_path"] == shipped["text_model_id"]


def test_adapters_that_read_out_other_tokens_have_no_mean(run: Path, tmp_path: Path) -> None:
    adapters = [run / "stages" / name / "adapter" for name in ("first", "second")]
    tensors = load_file(adapters[1] / "model.safetensors")
    name = "model.multi_modal_projector.vocabulary"
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, adapters[1] / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="cannot be averaged with"):
        write_weights(run, tmp_path / "out", adapters)


def test_the_card_says_what_each_loss_trained_and_what_it_changed(tmp_path: Path) -> None:
    for name, loss, samples, probes in (
        ("grounding", "ctc", 900, [{"held_out_wer": 2.0}, {"held_out_wer": 0.5}]),
        ("alignment", "kl", 100, [{"held_out_wer": 0.5, "held_out_kl": 0.31}, {"held_out_kl": 0.3}]),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings.yaml").write_text(f"loss: {loss}\n")
        rows = [
            {"step": 1, "samples": samples, "audio_seconds": 1.0, "seconds": 1.0, "loss": 1.0} | row for row in probes
        ]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    card = _stages(tmp_path, ())
    assert "2.000 → 0.500" in card and "0.310 → 0.300" in card
    assert "`ctc` (the read-out, on transcripts, without the LLM): 900, 90.0%" in card and "100, 10.0%" in card
    assert card.index("grounding") < card.index("alignment")


def test_a_moved_adapter_is_shipped_without_a_run(run: Path, tmp_path: Path) -> None:
    write_weights(None, tmp_path / "out", [run / "stages" / "first" / "adapter"])
    text = card(tmp_path / "out", "", None, origin="blsp-tiny")
    assert "blsp move --model blsp-tiny" in text and not (tmp_path / "out" / "training").exists()
