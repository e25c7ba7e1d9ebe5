"""Law 4: a run that was killed and started again ends with the same bits as one that never was; so does its
curve.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
from training_examples import write_data

from blsp.settings import TrainSettings
from blsp.training import loop, run_state

WORKERS = multiprocessing.get_context("forkserver")  # imports torch once, then every start is a fork
WORKERS.set_forkserver_preload(["blsp.training.loop", "training_examples"])
KILLS = 10


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), rows=14)


@pytest.fixture(params=["conv-ce", "grounded-kl"])
def settings(request, data: Path, tmp_path: Path, tiny_llm, tiny_whisper) -> TrainSettings:
    """A small run with everything on that is drawn at random: order, augmentation, dropout, silence."""
    adapter, loss = request.param.split("-")
    options = {
        "conv": ("bottleneck=8",),
        "grounded": ("bottleneck=8", "layers=1", "dropout=0.2", "hidden=16"),
    }
    return TrainSettings(
        data=(str(data),),
        out=tmp_path / "run",
        audio_model=tiny_whisper,
        llm=tiny_llm("llama"),
        adapter=adapter,
        loss=loss,
        adapter_options=options[adapter],
        batch_size=4,
        batch_tokens=150,
        steps=16,
        lr=1e-2,
        augment=("speed", "noise", "volume"),
        no_speech=0.2 if adapter == "grounded" else 0.0,
        held_out=2,
        log_every=3,
        probe_every=8,
        save_every=2,
        average_last=5,
    )


def _in(settings: TrainSettings, out: Path) -> TrainSettings:
    from dataclasses import replace

    return replace(settings, out=out)


def _results(out: Path) -> tuple[bytes, list[dict]]:
    """The final weights, and the curve without the wall clock."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    curve = [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
    return (out / "adapter" / "model.safetensors").read_bytes(), curve


def _start(settings: TrainSettings, die_at: int | None = None) -> multiprocessing.process.BaseProcess:
    process = WORKERS.Process(target=train_and_die, args=(settings, die_at))
    process.start()
    return process


def train_and_die(settings: TrainSettings, die_at: int | None) -> None:
    """In the child: train, and kill this process at the `die_at`-th write to the run folder."""
    writes = 0
    whole = run_state.write_text

    def counted(path: Path, text: str) -> None:
        nonlocal writes
        writes += 1
        if writes == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        whole(path, text)

    run_state.write_text = counted
    loop.train(settings)


def test_killed_ten_times_at_random_moments(settings: TrainSettings, tmp_path: Path) -> None:
    began = time.monotonic()
    uninterrupted = _start(_in(settings, tmp_path / "whole"))
    uninterrupted.join()
    assert uninterrupted.exitcode == 0
    duration, moments = time.monotonic() - began, random.Random(7)
    killed = 0
    for _ in range(KILLS):
        child = _start(settings)
        child.join(timeout=moments.uniform(0.1, 0.6) * duration)
        child.kill()
        child.join()
        killed += child.exitcode == -signal.SIGKILL
    last = _start(settings)
    last.join()
    assert last.exitcode == 0 and killed >= 1
    assert _results(settings.out) == _results(tmp_path / "whole")


@pytest.mark.parametrize("settings", ["conv-ce"], indirect=True)
def test_killed_at_every_checkpoint_just_before_it_counts(settings: TrainSettings, tmp_path: Path) -> None:
    whole = _start(_in(settings, tmp_path / "whole"))
    whole.join()
    for _ in range(5):  # each start gets one checkpoint further, and dies inside the next
        child = _start(settings, die_at=2)
        child.join()
        assert child.exitcode == -signal.SIGKILL
    last = _start(settings)
    last.join()
    assert _results(settings.out) == _results(tmp_path / "whole")


@pytest.mark.parametrize("settings", ["conv-ce"], indirect=True)
def test_sigterm_saves_and_leaves_with_0_and_the_seed_decides_the_curve(settings, tmp_path: Path) -> None:
    child = _start(settings)
    while not (settings.out / "metrics.jsonl").exists():
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGTERM)
    child.join()
    assert child.exitcode == 0
    assert run_state.newest_complete(settings.out / "checkpoints") is not None
    assert not (settings.out / "adapter").exists()
    for out in (settings.out, tmp_path / "whole"):
        process = _start(_in(settings, out))
        process.join()
    assert _results(settings.out) == _results(tmp_path / "whole")
