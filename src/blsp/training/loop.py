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

import sys
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace

import torch

from blsp.distributed import Runtime, find_runtime, keep_freed_memory, leave, reduce_gradients, sum_across
from blsp.model.checkpoint import save_adapter
from blsp.settings import TrainSettings
from blsp.training import step
from blsp.training import step as lockstep
from blsp.training.batches import prefetch
from blsp.training.examples import Example
from blsp.training.optimiser import (
    State,
    add_to_average,
    begin_or_resume,
    learning_rate,
    save,
    time_to_save,
)
from blsp.training.reporting import model_card, picture, progress_bar, report, say
from blsp.training.run import Run, check_adapter, prepare, step_examples
from blsp.training.run_state import (
    StopSignal,
    add_to_window,
    begin_folder,
    claimed,
    deterministic,
    finish_stages,
    is_finished,
)

AHEAD = 3  # steps whose examples are read before they are needed


class TrainingError(RuntimeError):
    """A run that cannot go on; the message names the step, the rows and the way out."""


def train(settings: TrainSettings) -> None:
    """`blsp train`: one run, or the stages of a recipe one after another."""
    runtime = find_runtime(settings.device, settings.dtype)
    if runtime.device.type == "cpu":
        keep_freed_memory()
    for stage in settings.stages or (settings,):
        check_adapter(stage)
    with deterministic(), StopSignal() as leaving:
        for stage in settings.stages or (settings,):
            if is_finished(stage):
                say(runtime, f"{stage.out}: is finished; the adapter is {stage.out / 'adapter'}")
                continue
            with claimed(stage.out, runtime):
                train_stage(stage, runtime, leaving)
            if leaving.asked:
                break
        else:
            if settings.stages and runtime.rank == 0:
                finish_stages(settings)
    leave(runtime)
    leaving.raise_if_interrupted()


def train_stage(settings: TrainSettings, runtime: Runtime, leaving: StopSignal) -> None:
    """One run from wherever it stands to its end, or until it is asked to leave."""
    begin_folder(settings, runtime)
    run = prepare(settings, runtime)
    state = begin_or_resume(run)
    bar = progress_bar(run, state.progress)
    with closing(prefetch(step_examples(run, state.progress.step), AHEAD)) as steps, bar:
        for number, batches in steps:
            learn(run, state, number, batches)
            report(run, state, bar)
            leaving.agree(runtime)
            if state.progress.step == run.steps or leaving.asked or time_to_save(run, state):
                save(run, state)
            if leaving.asked:
                break
    if state.progress.step == run.steps:
        finish(run, state)
    else:
        picture(run)
        say(
            runtime,
            f"{settings.out}: saved at step {state.progress.step} of {run.steps}; the same command goes on",
        )


# --- one step ---------------------------------------------------------------------------------------------


def learn(run: Run, state: State, number: int, batches: list[list[Example]]) -> None:
    """Forward and backward over the micro-batches of step `number` (from 0), then one move of the adapter."""
    rate = learning_rate(run.settings, number + 1, run.steps)
    torch.manual_seed(
        hash((run.settings.seed, number, run.runtime.rank)) & 0x7FFFFFFF
    )  # dropout, if there is any
    examples = [example for batch in batches for example in batch]
    counts, samples, seconds = count_across(run, examples)
    loss, positions, padding = 0.0, 0.0, 0.0
    together = run.settings.shard_llm and run.runtime.world > 1
    for batch in lockstep.slots(batches, run.runtime) if together else batches:
        if together and not any(example.response for example in batch):
            lockstep.idle(run.prefixes)
        if not batch:
            continue
        with step.autocast(run.runtime):
            sums = step.run(run.model, batch, run.objective, run.prefixes)
            share = step.objective_value(sums, counts, run.objective)
        if not torch.isfinite(share):
            raise TrainingError(bad_loss(run, number, share.item(), batch))
        share.backward()
        loss, positions, padding = loss + share.item(), positions + sums.positions, padding + sums.padding
    move(run, state, rate, number, examples)
    loss, positions, padding = across(run.runtime, loss, positions, padding)
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
    reduce_gradients(run.parameters, run.runtime)
    length = torch.nn.utils.clip_grad_norm_(run.parameters, run.settings.clip)
    if not torch.isfinite(length):
        raise TrainingError(bad_loss(run, number, length.item(), examples))
    for group in state.optimiser.param_groups:
        group["lr"] = rate
    state.optimiser.step()
    state.optimiser.zero_grad()
    if number >= run.steps - run.settings.average_last:
        add_to_average(run, state, number)


def count_across(run: Run, examples: list[Example]) -> tuple[step.Counts, int, float]:
    """What the step's sums are divided by, its samples and seconds of speech: over all ranks."""
    mine = step.counts_of(examples, run.objective)
    spoken = sum(example.seconds for example in examples)
    responses, tokens, samples, seconds = across(
        run.runtime, mine.responses, mine.tokens, len(examples), spoken
    )
    return step.Counts(int(responses), int(tokens)), int(samples), seconds


def across(runtime: Runtime, *numbers: float) -> list[float]:
    """Sums over all ranks."""
    if runtime.world == 1:
        return list(numbers)
    return sum_across(torch.tensor(numbers, dtype=torch.float64), runtime).tolist()


def bad_loss(run: Run, number: int, value: float, examples: Iterable[Example]) -> str:
    ids = [example.id for example in examples]
    named = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
    return (
        f"{run.settings.out}: step {number + 1}: the loss or its gradient is {value}; it came from the rows "
        f"{named}. Look at them, or lower --lr"
    )


# --- what is seen and kept --------------------------------------------------------------------------------


def finish(run: Run, state: State) -> None:
    """Write the adapter, its card and the curves."""
    if run.runtime.rank != 0:
        return
    out = run.settings.out
    picture(run)
    save_adapter(
        run.model, run.processor, out / "adapter", card=model_card(run.settings, out / "metrics.jsonl")
    )
    if run.skipped.count:
        print(f"{run.skipped.count} rows could not be learnt from: see {run.skipped.path}", file=sys.stderr)
    print(f"{out}: {state.progress.step} steps done; the adapter is {out / 'adapter'}")
