"""An adapter, a loss, a corpus and a task from outside the package, as docs/extending.md shows them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from support.tiny_models import speech_like, tiny_blsp
from support.training_examples import write_data

from blsp.data.audio import write_wav
from blsp.data.manifest import Manifest, write_manifest
from blsp.model.checkpoint import save_adapter

RunPage = Callable[..., str]


def _metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_an_adapter_in_one_file(run_page: RunPage, tmp_path: Path) -> None:
    write_data(tmp_path, rows=12)
    write_wav(tmp_path / "question.wav", speech_like(1.0))
    printed = run_page("mean_adapter.py")
    names = load_file(tmp_path / "runs/mean/adapter/model.safetensors")
    assert {name.rpartition("multi_modal_projector.")[2] for name in names} == {
        f"{layer}.{kind}" for layer in ("project", "norm") for kind in ("weight", "bias")
    }
    config = json.loads((tmp_path / "runs/mean/adapter/config.json").read_text())
    assert config["adapter"] == "mean" and config["adapter_options"]["frames"] == 4
    assert json.loads(printed.splitlines()[-1])["audio"] == "question.wav"


def test_a_loss_in_one_file(run_page: RunPage, tmp_path: Path) -> None:
    write_data(tmp_path, rows=12)
    run_page("smooth_loss.py")
    losses = [row["loss"] for row in _metrics(tmp_path / "runs/smooth")]
    assert torch.isfinite(torch.tensor(losses)).all() and (tmp_path / "runs/smooth/adapter").is_dir()


def test_a_corpus_in_one_file(run_page: RunPage, tmp_path: Path) -> None:
    clips = tmp_path / "recordings" / "clips"
    clips.mkdir(parents=True)
    for number in range(3):
        write_wav(clips / f"{number}.wav", speech_like(0.5, number))
    index = "".join(f"{number}.wav\tclip number {number}\n" for number in range(3))
    (tmp_path / "recordings" / "index.tsv").write_text(index)
    run_page("lines_corpus.py")
    rows = list(Manifest(str(tmp_path / "recordings.jsonl")))
    assert [(row.id, row.text, row.language) for row in rows] == [
        (f"{number}.wav", f"clip number {number}", "en") for number in range(3)
    ]


def test_a_task_in_yaml_alone(run_page: RunPage, tmp_path: Path, tiny_models_folder: Path) -> None:
    save_adapter(*tiny_blsp(tiny_models_folder, adapter="conv"), tmp_path / "tiny")
    options = ["lights on", "lights off", "brighter", "darker"]
    for number in range(4):
        write_wav(tmp_path / f"{number}.wav", speech_like(0.5, number))
    rows = [
        {"id": str(n), "audio": f"{n}.wav", "text": options[n], "reference": options[n], "options": options}
        for n in range(4)
    ]
    write_manifest(tmp_path / "lights.jsonl", rows)
    run_page("lights.yaml", "--model", "tiny", "--bootstrap", "20")
    results = json.loads((tmp_path / "results/lights/results.json").read_text())
    assert results["tasks"]["slu-lights"]["speech"]["n"] == 4
