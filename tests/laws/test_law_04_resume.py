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
from dataclasses import replace
from pathlib import Path

import pytest
from support.training_examples import write_data

from blsp.settings import TrainSettings
from blsp.training import loop, reporting, run_state
from blsp.training.tracking import CLOCKED

WORKERS = multiprocessing.get_context("forkserver")  # imports torch once, then every start is a fork
WORKERS.set_forkserver_preload(["blsp.training.loop", "support.training_examples"])
KILLS = 10

Results = tuple[bytes, list[dict]]  # the final weights, and the curve without the wall clock


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), rows=14)


@pytest.fixture(scope="module")
def settings(data: Path, tmp_path_factory, tiny_llm, tiny_whisper) -> TrainSettings:
    """A small run with everything on that is drawn at random: order, augmentation, dropout, silence."""
    return TrainSettings(
        data=(str(data),),
        out=tmp_path_factory.mktemp("runs") / "whole",
        audio_model=tiny_whisper,
        llm=tiny_llm("llama"),
        adapter="grounded",
        loss="kl",
        adapter_options=("bottleneck=8", "layers=1", "dropout=0.2", "hidden=16"),
        batch_size=4,
        batch_tokens=150,
        steps=12,
        lr=1e-2,
        augment=("speed", "noise", "volume"),
        no_speech=0.2,
        held_out=2,
        log_every=3,
        probe_every=6,
        save_every=2,
        average_last=5,
    )


@pytest.fixture(scope="module")
def whole(settings: TrainSettings) -> tuple[Results, float]:
    """What the run comes to when nobody kills it, and how long it takes."""
    _start(None).join()  # the server of forks has imported everything now
    began = time.monotonic()
    process = _start(settings)
    process.join()
    assert process.exitcode == 0
    return _results(settings.out), time.monotonic() - began


def _results(out: Path) -> Results:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    curve = [{name: value for name, value in row.items() if name not in CLOCKED} for row in rows]
    return (out / "adapter" / "model.safetensors").read_bytes(), curve


def _start(settings: TrainSettings | None, die_at: int | None = None) -> multiprocessing.process.BaseProcess:
    process = WORKERS.Process(target=train_and_die, args=(settings, die_at))
    process.start()
    return process


def train_and_die(settings: TrainSettings | None, die_at: int | None) -> None:
    """In the child: train, and kill this process at the `die_at`-th write of a checkpoint or of the cut metrics."""
    reporting.draw = lambda *_: None  # the picture is made of metrics.jsonl, which is compared
    writes = 0
    rename = os.replace

    def counted(partial: Path, path: Path) -> None:
        nonlocal writes
        writes += path.name.startswith(("step-", "metrics.jsonl"))
        if writes == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(partial, path)

    os.replace = counted
    if settings is not None:
        loop.train(settings)


def _finish(settings: TrainSettings) -> Results:
    last = _start(settings)
    last.join()
    assert last.exitcode == 0
    return _results(settings.out)


def test_killed_ten_times_at_random_moments(settings: TrainSettings, whole, tmp_path: Path) -> None:
    """A run that gets through between two kills is compared, and the next one begun."""
    expected, duration = whole
    moments, killed, runs = random.Random(7), 0, 0
    run = replace(settings, out=tmp_path / "0")
    while killed < KILLS:
        child = _start(run)
        child.join(timeout=moments.uniform(0.1, 0.6) * duration)
        child.kill()
        child.join()
        killed += child.exitcode == -signal.SIGKILL
        if child.exitcode == 0:
            assert _results(run.out) == expected
            runs += 1
            run = replace(settings, out=tmp_path / str(runs))
    assert _finish(run) == expected


def test_killed_at_every_checkpoint_just_before_it_counts(settings, whole, tmp_path: Path) -> None:
    run = replace(settings, out=tmp_path / "run")
    for _ in range(3):  # each start gets a checkpoint or two further, and dies inside the next
        child = _start(run, die_at=3)
        child.join()
        assert child.exitcode == -signal.SIGKILL
    assert run_state.newest_complete(run.out / "checkpoints").name == "step-10"
    assert _finish(run) == whole[0]


def test_sigterm_saves_and_leaves_with_0(settings, whole, tmp_path: Path) -> None:
    run = replace(settings, out=tmp_path / "run")
    child = _start(run)
    while not (run.out / "metrics.jsonl").exists():
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGTERM)
    child.join()
    assert child.exitcode == 0
    assert run_state.newest_complete(run.out / "checkpoints") is not None
    assert not (run.out / "adapter").exists()
    assert _finish(run) == whole[0]


@pytest.mark.parametrize("readers", [1, 3])
def test_any_number_of_readers_gives_the_same_bits_also_when_it_changes(
    settings: TrainSettings, whole, tmp_path: Path, readers: int
) -> None:
    run = replace(settings, out=tmp_path / "run", readers=readers)
    child = _start(run, die_at=4)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert _finish(replace(run, readers=4 - readers)) == whole[0]


def test_another_seed_gives_another_curve_and_the_same_one_the_same(settings, whole, tmp_path: Path) -> None:
    assert _finish(replace(settings, out=tmp_path / "again")) == whole[0]
    assert _finish(replace(settings, out=tmp_path / "other", seed=1))[1] != whole[0][1]
