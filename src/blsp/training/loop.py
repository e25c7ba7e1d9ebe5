"""Step 2: train the adapter so that the LLM that listens behaves like the LLM that reads.

In:  `TrainSettings`: continuations (or manifests for ctc), a speech encoder, an LLM, an adapter, a loss.
Out: the run folder: settings.yaml, metrics.jsonl, checkpoints/step-N/, adapter/, curves.png.
Try: ``blsp train --data continued.jsonl --out runs/x --audio-model A --llm L --adapter conv --loss ce``
Flow: continuations -> features -> **loop.py** -> checkpoint -> inference

A step draws its rows from the plan, sums the losses of its micro-batches, each divided by the counts of the
whole step, and moves the adapter. The same command goes on after a kill, to the bit; SIGTERM saves and
leaves.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from blsp.model.checkpoint import save_adapter
from blsp.model.distributed import Place, find_place, leave, reduce_gradients, sum_across
from blsp.settings import TrainSettings
from blsp.training import probes, step
from blsp.training.batches import prefetch
from blsp.training.card import model_card
from blsp.training.curves import draw
from blsp.training.examples import Example
from blsp.training.preparation import Run, prepare, step_examples
from blsp.training.run_folder import (
    Leaving,
    begin_folder,
    deterministic,
    finish_stages,
    is_finished,
)
from blsp.training.run_state import (
    Progress,
    add_to_window,
    check_environment,
    cut_metrics,
    empty_window,
    environment,
    load_checkpoint,
    newest_complete,
    save_checkpoint,
)

AHEAD = 3  # steps whose examples are read before they are needed


class TrainingError(RuntimeError):
    """A run that cannot go on; the message names the step, the rows and the way out."""


def train(settings: TrainSettings) -> None:
    """`blsp train`: one run, or the stages of a recipe one after another."""
    place = find_place(settings.device, settings.dtype)
    with deterministic(), Leaving() as leaving:
        for stage in settings.stages or (settings,):
            if not is_finished(stage):
                train_stage(stage, place, leaving)
            if leaving.asked:
                break
        else:
            if settings.stages and place.rank == 0:
                finish_stages(settings)
    leave(place)
    leaving.raise_if_interrupted()


def train_stage(settings: TrainSettings, place: Place, leaving: Leaving) -> None:
    """One run from wherever it stands to its end, or until it is asked to leave."""
    begin_folder(settings, place)
    run = prepare(settings, place)
    state = begin_or_resume(run)
    bar = progress_bar(run, state.progress)
    with closing(prefetch(step_examples(run, state.progress.step), AHEAD)) as steps, bar:
        for number, batches in steps:
            learn(run, state, number, batches)
            report(run, state, bar)
            leaving.agree(place)
            if state.progress.step == run.steps or leaving.asked or time_to_save(run, state):
                save(run, state)
            if leaving.asked:
                break
    if state.progress.step == run.steps:
        finish(run, state)
    elif place.rank == 0:
        print(f"{settings.out}: saved at step {state.progress.step} of {run.steps}; the same command goes on")


# --- the state that moves ---------------------------------------------------------------------------------


@dataclass
class State:
    """What changes from step to step."""

    progress: Progress
    optimiser: torch.optim.Optimizer
    average: dict[str, Tensor]
    began: float  # time.monotonic() at which `progress.seconds` was 0
    saved: float  # time.monotonic() of the last checkpoint


def begin_or_resume(run: Run) -> State:
    """The state of step 0, or of the newest complete checkpoint; metrics.jsonl is cut back to it."""
    state = State(Progress(), new_optimiser(run), {}, time.monotonic(), time.monotonic())
    newest = newest_complete(run.settings.out / "checkpoints")
    if run.place.rank == 0:
        cut_metrics(run.settings.out / "metrics.jsonl", 0 if newest is None else int(newest.name[5:]))
    if newest is None:
        return state
    stored = load_checkpoint(newest)
    check_environment(stored.environment, environment_here(run), newest, run.settings.resume_inexact)
    run.model.model.multi_modal_projector.load_state_dict(stored.adapter)
    state.optimiser.load_state_dict(stored.optimiser)
    state.average = {name: tensor.to(run.place.device) for name, tensor in stored.average.items()}
    state.progress = stored.progress
    state.began -= stored.progress.seconds
    return state


def environment_here(run: Run) -> dict[str, object]:
    return environment(run.place.world, str(run.place.device.type))


def new_optimiser(run: Run) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices and kernels only, as in the paper's trainer."""
    decayed = [p for p in run.parameters if p.ndim > 1]
    level = [p for p in run.parameters if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": run.settings.weight_decay},
        {"params": level, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=run.settings.lr)


def learning_rate(settings: TrainSettings, step: int, steps: int) -> float:
    """The rate of step `step` (from 1): a linear warm-up, then a cosine to zero, or level."""
    warmup = min(settings.warmup_steps, steps // 10)
    if step <= warmup:
        return settings.lr * step / warmup
    if settings.schedule == "constant":
        return settings.lr
    done = (step - warmup) / (steps - warmup + 1)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * done))


# --- one step ---------------------------------------------------------------------------------------------


def learn(run: Run, state: State, number: int, batches: list[list[Example]]) -> None:
    """Forward and backward over the micro-batches of step `number` (from 0), then one move of the adapter."""
    rate = learning_rate(run.settings, number + 1, run.steps)
    torch.manual_seed(
        hash((run.settings.seed, number, run.place.rank)) & 0x7FFFFFFF
    )  # dropout, if there is any
    examples = [example for batch in batches for example in batch]
    counts, samples, seconds = count_across(run, examples)
    loss, positions, padding = 0.0, 0.0, 0.0
    for batch in batches:
        with autocast(run.place):
            sums = step.run(run.model, batch, run.objective, run.llm)
            share = step.objective_value(sums, counts, run.objective)
        if not torch.isfinite(share):
            raise TrainingError(bad_loss(run, number, share.item(), batch))
        share.backward()
        loss, positions, padding = loss + share.item(), positions + sums.positions, padding + sums.padding
    move(run, state, rate, number, examples)
    loss, positions, padding = across(run.place, loss, positions, padding)
    progress = add_to_window(state.progress, loss, int(positions), int(padding))
    state.progress = replace(
        progress,
        step=number + 1,
        samples=progress.samples + samples,
        audio_seconds=progress.audio_seconds + seconds,
        seconds=time.monotonic() - state.began,
    )


def move(run: Run, state: State, rate: float, number: int, examples: list[Example]) -> None:
    """Sum the gradients over the ranks, clip them, step, and keep the running average of the last steps."""
    reduce_gradients(run.parameters, run.place)
    length = torch.nn.utils.clip_grad_norm_(run.parameters, run.settings.clip)
    if not torch.isfinite(length):
        raise TrainingError(bad_loss(run, number, length.item(), examples))
    for group in state.optimiser.param_groups:
        group["lr"] = rate
    state.optimiser.step()
    state.optimiser.zero_grad()
    if number >= run.steps - run.settings.average_last:
        add_to_average(run, state)


def add_to_average(run: Run, state: State) -> None:
    """Running mean of the adapter's weights."""
    count = state.progress.averaged + 1
    for name, tensor in run.model.model.multi_modal_projector.state_dict().items():
        if name not in state.average:
            state.average[name] = tensor.clone()
        else:
            state.average[name] += (tensor - state.average[name]) / count
    state.progress = replace(state.progress, averaged=count)


def count_across(run: Run, examples: list[Example]) -> tuple[step.Counts, int, float]:
    """What the step's sums are divided by, its samples and seconds of speech: over all ranks."""
    mine = step.counts_of(examples, run.objective)
    spoken = sum(example.seconds for example in examples)
    responses, tokens, samples, seconds = across(
        run.place, mine.responses, mine.tokens, len(examples), spoken
    )
    return step.Counts(int(responses), int(tokens)), int(samples), seconds


def across(place: Place, *numbers: float) -> list[float]:
    """Sums over all ranks."""
    if place.world == 1:
        return list(numbers)
    return sum_across(torch.tensor(numbers, dtype=torch.float64), place).tolist()


def autocast(place: Place) -> torch.autocast:
    """The adapter's float32 weights compute in bfloat16 where the frozen parts do."""
    return torch.autocast(place.device.type, torch.bfloat16, enabled=place.dtype == torch.bfloat16)


def bad_loss(run: Run, number: int, value: float, examples: Iterable[Example]) -> str:
    ids = [example.id for example in examples]
    named = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
    return (
        f"{run.settings.out}: step {number + 1}: the loss or its gradient is {value}; it came from the rows "
        f"{named}. Look at them, or lower --lr"
    )


# --- what is seen and kept --------------------------------------------------------------------------------


def report(run: Run, state: State, bar: tqdm) -> None:
    """One line of metrics.jsonl every so many steps, with the probes every so many more."""
    now, settings = state.progress, run.settings
    last = now.step == run.steps
    bar.update()
    probing = now.step == 1 or now.step % settings.probe_every == 0 or last
    if not (probing or now.step % settings.log_every == 0):
        return
    state.progress = empty_window(now)
    row = {
        "step": now.step,
        "loss": now.window_loss / now.window_steps,
        "lr": learning_rate(settings, now.step, run.steps),
        "samples": now.samples,
        "audio_seconds": round(now.audio_seconds, 3),
        "seconds": round(now.seconds, 3),
        "padding": round(now.window_padding / max(1, now.window_positions), 4),
    }
    bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
    if run.place.rank != 0:
        return
    if probing:
        row |= measure(run)
        bar.write(", ".join(f"{name} {value:.4g}" for name, value in row.items()), file=sys.stderr)
    with open(settings.out / "metrics.jsonl", "a", encoding="utf-8") as out:
        out.write(json.dumps(row) + "\n")


def measure(run: Run) -> dict[str, float]:
    """The probes on held-out and training clips."""
    found: dict[str, float] = {}
    with autocast(run.place):
        for part, examples in run.probes.items():
            budget = run.settings.batch_tokens
            found |= probes.measure(part, examples, run.llm, run.processor.tokenizer, budget)
    return found


def progress_bar(run: Run, progress: Progress) -> tqdm:
    """Steps done and to do, with an estimate of the time left."""
    return tqdm(
        total=run.steps,
        initial=progress.step,
        desc=run.settings.out.name,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,
        disable=run.place.rank != 0,
    )


def time_to_save(run: Run, state: State) -> bool:
    """By steps, and by the clock: when a checkpoint is written changes nothing in it. All ranks agree by
    steps.
    """
    waited = time.monotonic() - state.saved > 60 * run.settings.save_minutes
    return state.progress.step % run.settings.save_every == 0 or (waited and run.place.rank == 0)


def save(run: Run, state: State) -> None:
    """Write a checkpoint (the first process does) and redraw the curves."""
    state.saved = time.monotonic()
    if run.place.rank != 0:
        return
    save_checkpoint(
        run.settings.out / "checkpoints",
        state.progress,
        run.model.model.multi_modal_projector.state_dict(),
        state.average,
        state.optimiser.state_dict(),
        environment_here(run),
        run.settings.keep,
    )


def finish(run: Run, state: State) -> None:
    """Write the adapter (or the average of its last steps), its card and the curves."""
    if run.place.rank != 0:
        return
    if state.average:
        run.model.model.multi_modal_projector.load_state_dict(state.average)
    out = run.settings.out
    draw(out / "metrics.jsonl", out / "curves.png")
    save_adapter(
        run.model, run.processor, out / "adapter", card=model_card(run.settings, out / "metrics.jsonl")
    )
    if run.skipped.count:
        print(f"{run.skipped.count} rows could not be learnt from: see {run.skipped.path}", file=sys.stderr)
    print(f"{out}: {state.progress.step} steps done; the adapter is {out / 'adapter'}")
