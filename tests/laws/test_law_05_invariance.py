"""Law 5: batch 8 x 1 equals 1 x 8 (accumulation), and one process equals two: through `train` itself, in
float64.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.training_examples import write_data

from blsp.settings import TrainSettings
from blsp.training import loop, reporting, run_state

WORKERS = multiprocessing.get_context("forkserver")
WORKERS.set_forkserver_preload(["blsp.training.loop", "support.training_examples"])


@pytest.fixture(autouse=True)
def no_picture(monkeypatch) -> None:
    monkeypatch.setattr(reporting, "draw", lambda *_: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = write_data(tmp_path_factory.mktemp("data"), rows=18, top_k=8)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[4] |= {"no_speech": True, "text": ""}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(params=["conv-ce-online", "stack-kl-stored", "grounded-kl-online", "grounded-ctc-online"])
def settings(request, data: Path, tmp_path: Path, tiny_llm, tiny_whisper) -> TrainSettings:
    adapter, loss, teacher = request.param.split("-")
    return TrainSettings(
        data=(str(data),),
        out=tmp_path / "whole",
        audio_model=tiny_whisper,
        llm=tiny_llm("llama"),
        adapter=adapter,
        loss=loss,
        teacher=teacher,
        batch_size=8,
        batch_tokens=100_000,
        steps=4,
        lr=1e-3,
        held_out=0,
        log_every=1,
        dtype="float64",
    )


def _weights(settings: TrainSettings) -> dict[str, torch.Tensor]:
    """The trained adapter in the type it was trained in (the final folder holds float32)."""
    newest = run_state.newest_complete(settings.out / "checkpoints")
    assert newest is not None
    return load_file(newest / "adapter.safetensors")


def _losses(settings: TrainSettings) -> list[float]:
    return [json.loads(line)["loss"] for line in (settings.out / "metrics.jsonl").read_text().splitlines()]


def _samples(settings: TrainSettings) -> list[int]:
    return [json.loads(line)["samples"] for line in (settings.out / "metrics.jsonl").read_text().splitlines()]


def _same(found: TrainSettings, expected: TrainSettings) -> None:
    assert _losses(found) == pytest.approx(_losses(expected), rel=0, abs=1e-9)
    assert _samples(found) == _samples(expected)  # a rank that learns all rows would count them again
    theirs = _weights(expected)
    for name, tensor in _weights(found).items():
        assert tensor.dtype == torch.float64 or name == "vocabulary"
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-9)


def test_eight_at_once_equal_one_by_one(settings: TrainSettings, tmp_path: Path) -> None:
    loop.train(settings)
    single = replace(settings, out=tmp_path / "single", batch_tokens=1)
    loop.train(single)
    _same(single, settings)


@pytest.mark.parametrize("settings", ["conv-ce-online", "grounded-kl-online"], indirect=True)
def test_one_process_equals_two(settings: TrainSettings, tmp_path: Path) -> None:
    _two_equal_one(settings, replace(settings, out=tmp_path / "pair", batch_tokens=120))


@pytest.mark.parametrize("settings", ["conv-ce-online", "stack-kl-stored"], indirect=True)
def test_two_that_share_a_sharded_llm_equal_one(settings: TrainSettings, tmp_path: Path) -> None:
    """Rank 1 gets fewer rows of the last step of an epoch than rank 0, and a step may give it none to answer."""
    settings = replace(settings, batch_size=5)
    _two_equal_one(settings, replace(settings, out=tmp_path / "pair", batch_tokens=60, shard_llm=True))


def _two_equal_one(settings: TrainSettings, pair: TrainSettings) -> None:
    loop.train(settings)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [WORKERS.Process(target=train_as_rank, args=(pair, rank, port)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=120)
    assert [process.exitcode for process in ranks] == [0, 0]
    _same(pair, settings)


def train_as_rank(settings: TrainSettings, rank: int, port: int) -> None:
    """Runs in a child, with what torchrun would have set."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    reporting.draw = lambda *_: None
    loop.train(settings)
