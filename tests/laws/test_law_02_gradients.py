"""Law 2: gradients reach the adapter and nothing else; frozen weights are bit-identical after training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_models import runtime_of, save_language_model, save_whisper
from support.training_examples import make_examples, write_data

from blsp.distributed import find_runtime
from blsp.llm.prefix import PrefixCache
from blsp.model.loading import load_language_model, load_speech_encoder
from blsp.settings import TrainSettings
from blsp.training import loop, step
from blsp.training import run as opening
from blsp.training import run as preparation
from blsp.training.step import Objective
from blsp.weights.digest import find_weights

ADAPTER = "model.multi_modal_projector."


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(
    ("adapter", "loss"),
    [(a, loss) for a in ("conv", "stack", "grounded") for loss in ("ce", "kl")]
    + [("grounded", "ctc")]
    + [(a, loss) for a in ("conv", "stack") for loss in ("embed", "embed-ctc")],
)
def test_gradients_reach_every_tensor_of_the_adapter_and_no_other(
    pair_of, family: str, adapter: str, loss: str
) -> None:
    model, processor = pair_of(adapter, family)
    objective = Objective({loss: 1.0} | ({"ctc": 1.0} if adapter == "grounded" else {}))
    examples = make_examples(processor, 4)
    examples = [replace(e, places=np.arange(1), transcript=e.transcript[:1], fits=True) for e in examples]
    sums = step.run(model, examples, objective, PrefixCache(model))
    step.objective_value(sums, step.counts_of(examples, objective), objective).backward()
    reached = {name for name, tensor in model.named_parameters() if tensor.grad is not None}
    moved = {name for name in reached if model.get_parameter(name).grad.abs().sum() > 0}
    model.zero_grad()
    assert reached == moved == {name for name, _ in model.named_parameters() if name.startswith(ADAPTER)}


@pytest.mark.parametrize(
    ("adapter", "loss"), [("conv", "ce"), ("stack", "kl"), ("grounded", "ctc"), ("grounded", "kl")]
)
def test_frozen_weights_are_bit_identical_after_training(
    tmp_path: Path, tiny_llm, tiny_whisper, monkeypatch, adapter: str, loss: str
) -> None:
    settings = TrainSettings(
        data=(str(write_data(tmp_path / "data", rows=10)),),
        out=tmp_path / "run",
        audio_model=tiny_whisper,
        llm=tiny_llm("llama"),
        adapter=adapter,
        loss=loss,
        batch_size=4,
        steps=3,
        lr=0.1,
        held_out=2,
    )
    runs = []

    def prepare(*arguments):
        runs.append(preparation.prepare(*arguments))
        return runs[-1]

    monkeypatch.setattr(loop, "prepare", prepare)
    loop.train(settings)
    fresh, _ = opening.open_model(settings, find_runtime("cpu"), runs[0].dataset.sources)
    trained, moved = runs[0].model.state_dict(), set()
    for name, tensor in fresh.state_dict().items():
        if not torch.equal(tensor, trained[name]):
            moved.add(name)
    assert moved and all(name.startswith(ADAPTER) for name in moved)


def test_frozen_parts_are_not_in_training_mode(tmp_path: Path, tiny_llm, tiny_whisper, monkeypatch) -> None:
    """An LLM with dropout would otherwise answer differently in every step."""
    modes: list[tuple[bool, bool]] = []
    learn = loop.learn

    def watched(run, *arguments) -> None:
        adapter = set(run.model.model.multi_modal_projector.modules())
        frozen = [part for part in run.model.modules() if part not in adapter]
        modes.append((any(part.training for part in frozen), all(part.training for part in adapter)))
        learn(run, *arguments)

    monkeypatch.setattr(loop, "learn", watched)
    settings = TrainSettings(
        data=(str(write_data(tmp_path / "data", rows=6)),),
        out=tmp_path / "run",
        audio_model=tiny_whisper,
        llm=tiny_llm("llama"),
        adapter="conv",
        loss="ce",
        batch_size=2,
        steps=3,
        probe_every=1,  # a probe puts the adapter back into training mode
        held_out=2,
    )
    loop.train(settings)
    assert modes == [(False, True)] * 3


def test_frozen_parts_are_loaded_without_dropout_or_gradients(tmp_path: Path) -> None:
    """Also where no model is built around them, as in `blsp continue` and `blsp encode`."""
    llm = find_weights(save_language_model(tmp_path / "llm", "llama"))
    whisper, runtime = find_weights(save_whisper(tmp_path / "whisper")), runtime_of("llama")
    for module, _ in (load_language_model(llm, runtime), load_speech_encoder(whisper, runtime)):
        assert not any(part.training for part in module.modules())
        assert not any(weight.requires_grad for weight in module.parameters())
