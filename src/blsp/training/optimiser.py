"""AdamW, learning-rate schedules, the running average of the weights; and the state in which they are saved.

In:  a prepared run, and its newest complete checkpoint if there is one.
Out: `State`, which changes in each step and is saved as often as the settings say.
Try: `state = begin_or_resume(run)`
Flow: training/run.py -> **optimiser.py** (run_state.py) -> training/loop.py
"""

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from blsp.model.lora import load_lora, lora_weights
from blsp.settings import TrainSettings
from blsp.training import run_state
from blsp.training.run import Run


@dataclass
class State:
    """The part of a run that changes in each step."""

    progress: run_state.Progress
    optimiser: torch.optim.Optimizer
    average: dict[str, Tensor]
    began: float  # time.monotonic() at which `progress.seconds` was 0
    saved: float  # time.monotonic() of the last checkpoint
    drawn: float  # and of the last picture


def begin_or_resume(run: Run) -> State:
    """The state of step 0, or of the newest complete checkpoint; metrics.jsonl is cut back to it."""
    now = time.monotonic()
    state = State(run_state.Progress(), new_optimiser(run), {}, began=now, saved=now, drawn=now)
    newest = run_state.newest_complete(run.settings.out / "checkpoints")
    if run.runtime.rank == 0:
        run_state.cut_metrics(run.settings.out / "metrics.jsonl", 0 if newest is None else int(newest.name[5:]))
    if newest is None:
        return state
    stored = run_state.load_checkpoint(newest)
    here = run_state.environment(run.runtime)
    run_state.check_environment(stored.environment, here, newest, run.settings.resume_inexact)
    adapter, lora = run.model.model.multi_modal_projector, lora_weights(run.model)
    # older checkpoints have no read-out vocabulary; it was already read from vocabulary.json
    vocabulary = {name: tensor for name, tensor in adapter.named_buffers() if name == "vocabulary"}
    adapter.load_state_dict({**vocabulary, **{name: t for name, t in stored.adapter.items() if name not in lora}})
    load_lora(lora, stored.adapter)
    state.optimiser.load_state_dict(stored.optimiser)
    state.average = {name: tensor.to(run.runtime.device) for name, tensor in stored.average.items()}
    state.progress = stored.progress
    state.began -= stored.progress.seconds
    return state


def new_optimiser(run: Run) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices and kernels only, as in the paper's trainer: not on biases and norms."""
    matrices = [p for p in run.parameters if p.ndim > 1]
    vectors = [p for p in run.parameters if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": run.settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=run.settings.lr, fused=True)


def learning_rate(settings: TrainSettings, step: int, steps: int) -> float:
    """The rate of step `step` (from 1): a linear warm-up, then a cosine or a line down to zero, or constant."""
    warmup = min(settings.warmup_steps, steps // 10)
    if step <= warmup:
        return settings.lr * step / warmup
    if settings.schedule == "constant":
        return settings.lr
    done = (step - warmup) / (steps - warmup + 1)  # 0 at the end of the warm-up, below 1 in the last step
    if settings.schedule == "linear":
        return settings.lr * (1 - done)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * done))


def add_to_average(run: Run, state: State, number: int) -> None:
    """Add the trained weights to their running mean; after the last step they become that mean."""
    count, weights = state.progress.averaged + 1, run.weights
    for name, weight in weights.items():
        if name not in state.average:
            state.average[name] = weight.detach().clone()
        else:
            state.average[name] += (weight.detach() - state.average[name]) / count
    state.progress = replace(state.progress, averaged=count)
    if number == run.steps - 1:  # the mean is then measured and saved
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(state.average[name])


def time_to_save(run: Run, state: State) -> bool:
    """Whether to save now: every `--save-every` steps, and after `--save-minutes`.

    Only the first rank saves, so only its clock counts; the time of a checkpoint does not change its content.
    """
    waited = time.monotonic() - state.saved > 60 * run.settings.save_minutes
    return state.progress.step % run.settings.save_every == 0 or (waited and run.runtime.rank == 0)


def save(run: Run, state: State) -> None:
    """Write a checkpoint (the first process does) and redraw the curves."""
    state.saved = time.monotonic()
    if run.runtime.rank != 0:
        return
    checkpoint = run_state.Checkpoint(
        state.progress,
        run_state.environment(run.runtime),
        run.model.model.multi_modal_projector.state_dict() | lora_weights(run.model),
        state.average,
        state.optimiser.state_dict(),
    )
    run_state.save_checkpoint(run.settings.out / "checkpoints", checkpoint, run.settings.keep)
