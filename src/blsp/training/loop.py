"""Step 2, the training loop: train the adapter until the LLM answers speech as it answers the text.

In:  `TrainSettings`: data, a speech encoder, an LLM, an adapter, a loss.
Out: the run folder: settings.yaml, metrics.jsonl, checkpoints/step-N/, adapter/, curves.png.
Try: ``blsp train --data continued.jsonl --out runs/x --audio-model A --llm L --adapter conv --loss ce``
Flow: continuations -> features -> **loop.py** -> checkpoint -> inference

A step takes its rows from the order of the data, adds up the losses of its micro-batches, each divided by the counts of
the whole step, and updates the adapter. After a kill, the same command continues, with the same bits; SIGTERM saves and
exits.
"""

import math
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from blsp.data.jobs import lock_job
from blsp.distributed import (
    Runtime,
    barrier,
    find_runtime,
    from_first,
    keep_freed_memory,
    leave,
    reduce_gradients,
    sum_across,
)
from blsp.llm.sharding import dummy_pass
from blsp.model.checkpoint import save_adapter
from blsp.settings import TrainSettings
from blsp.training import run_state, step, verdict
from blsp.training.adapter_card import model_card
from blsp.training.batches import pad_micro_batches, step_examples
from blsp.training.examples import Example
from blsp.training.optimiser import State, add_to_average, begin_or_resume, learning_rate, save, time_to_save
from blsp.training.reporting import Reporter, draw_curves, finish_stages, print_once, progress_bar, report
from blsp.training.run import Run, check_loss, prepare
from blsp.training.tracking import Trackers, peak_memory, tracing

DRY_STEPS = 3


class TrainingError(RuntimeError):
    """A run that cannot continue; the message names the step, the rows and what to do."""


def train(settings: TrainSettings) -> None:
    """`blsp train`: one run, or the stages of a recipe one after another."""
    runtime = find_runtime(settings.device, settings.dtype, minutes=settings.collective_minutes)
    if runtime.device.type == "cpu":
        keep_freed_memory()
    for stage in settings.stages or (settings,):
        check_loss(stage)
    if settings.dry_run:
        dry_run(settings, runtime)
        leave(runtime)
        return
    stop = run_state.StopSignal()
    for stage in settings.stages or (settings,):
        if run_state.is_finished(stage):
            print_once(runtime, f"{stage.out}: is finished; the adapter is {stage.out / 'adapter'}")
            continue
        stage.out.mkdir(parents=True, exist_ok=True)
        with lock_job(stage.out, runtime.rank), run_state.deterministic(stage.deterministic):
            train_stage(stage, runtime, stop)
        if stop.requested:
            break
    else:
        if settings.stages and runtime.rank == 0:
            finish_stages(settings)
    leave(runtime)
    stop.raise_if_interrupted()


def dry_run(settings: TrainSettings, runtime: Runtime) -> None:
    """Prepare each stage in a temporary folder, run three steps, and print the time and memory that a run needs.

    With --cache, missing clips are encoded and kept. What an earlier stage would have trained begins as a new adapter.
    """
    home = next(folder for folder in settings.out.absolute().parents if folder.is_dir())  # all nodes can read it
    folder = Path(from_first(lambda: tempfile.mkdtemp(prefix=".dry-run-", dir=home)))
    made = {str(stage.out / "adapter") for stage in settings.stages}
    try:
        for stage in settings.stages or (settings,):
            start = tuple(name for name in stage.init_from if name not in made)
            told = dry_stage(replace(stage, out=folder / stage.out.name, init_from=start), runtime)
            print_once(runtime, f"{stage.out}: {told}")
        barrier(runtime)
    finally:
        if runtime.rank == 0:
            shutil.rmtree(folder)


def dry_stage(settings: TrainSettings, runtime: Runtime) -> str:
    """Three steps of one stage, and what they say about the whole of it."""
    settings.out.mkdir(exist_ok=True)
    run = prepare(settings, runtime)
    state, seconds = begin_or_resume(run), []
    with closing(step_examples(run, 0)) as steps:
        for number, batches in islice(steps, DRY_STEPS):
            began = time.monotonic()
            learn(run, state, number, batches)
            seconds.append(time.monotonic() - began)
    hours = min(seconds) * run.steps / 3600  # the first step is slower than the others
    return (
        f"{len(run.dataset.rows)} rows, {run.skipped.count} left out; {run.steps} steps of {min(seconds):.2f} s: "
        f"{hours:.2f} hours; {peak_memory() / 1e9:.2f} GB of memory in the first process"
    )


def train_stage(settings: TrainSettings, runtime: Runtime, stop: run_state.StopSignal) -> None:
    """One run from its newest checkpoint (or from the start) to its end, or until a signal asks it to stop."""
    run_state.begin_folder(settings, runtime)
    run = prepare(settings, runtime)
    state = begin_or_resume(run)
    with stop:  # not before: a signal while the run is prepared ends it at once, as there is nothing to save
        take_steps(run, state, stop)


def take_steps(run: Run, state: State, stop: run_state.StopSignal) -> None:
    """The steps that are left, with reports and checkpoints; after the last one the adapter is written."""
    settings, runtime = run.settings, run.runtime
    if runtime.rank == 0 and not state.progress.step:
        for warning in verdict.warnings(run):
            print(f"{settings.out}: {warning}", file=sys.stderr)
    bar = progress_bar(run, state.progress)
    trackers = Trackers(settings.log_to, settings.out, run_state.as_flags(settings), runtime)
    reporter = Reporter(run, state, trackers)
    examples = closing(step_examples(run, state.progress.step))
    with closing(trackers), examples as steps, bar, tracing(settings.profile, settings.out, runtime) as step_traced:
        for number, batches in steps:
            learn(run, state, number, batches)
            step_traced()
            report(reporter, bar)
            stop.sync(runtime)
            if state.progress.step == run.steps or stop.requested or time_to_save(run, state):
                save(run, state)
            if stop.requested:
                break
    if state.progress.step == run.steps:
        finish(run, state)
    else:
        draw_curves(run)
        print_once(
            runtime, f"{settings.out}: saved at step {state.progress.step} of {run.steps}; the same command continues"
        )


# --- one step ---------------------------------------------------------------------------------------------
def learn(run: Run, state: State, number: int, batches: list[list[Example]]) -> None:
    """Step `number` (from 0): forward and backward over this rank's micro-batches, then one update of the adapter."""
    examples = [example for batch in batches for example in batch]
    # Dropout, if the adapter has it, depends only on seed and step, so that a resumed run drops the same units
    torch.manual_seed(hash((run.settings.seed, number, run.runtime.rank)) & 0x7FFFFFFF)

    # Each loss is a mean over the whole step, so its divisor is summed over all micro-batches and ranks first
    counts = step.counts_of(examples, run.objective)
    spoken = sum(example.seconds for example in examples)
    *totals, samples, seconds = sum_over_ranks(run.runtime, *counts.values(), len(examples), spoken)
    counts = dict(zip(counts, map(int, totals), strict=True))

    # Gradients add up over the micro-batches; each is freed before the next one is computed. Their losses are looked
    # at when all are under way: a look waits for the device.
    learnt: list[tuple[torch.Tensor, list[Example]]] = []
    positions, padding = 0, 0
    for batch in micro_batches(run, batches):
        with step.autocast(run.runtime):
            sums = step.run(run.model, batch, run.objective, run.prefixes)
            share = step.objective_value(sums, counts, run.objective)
        share.backward()
        learnt.append((share.detach(), batch))
        positions, padding = positions + sums.positions, padding + sums.padding
    losses = torch.stack([share for share, _ in learnt]).tolist() if learnt else []
    for value, (_, batch) in zip(losses, learnt, strict=True):
        if not math.isfinite(value):
            raise TrainingError(bad_loss(run, number, value, batch))

    norm = move_adapter(run, state, number, examples)
    loss, total_positions, total_padding = sum_over_ranks(run.runtime, sum(losses), positions, padding)
    progress = run_state.add_to_window(state.progress, loss, int(total_positions), int(total_padding), norm)
    state.progress = replace(
        progress,
        step=number + 1,
        samples=progress.samples + int(samples),
        audio_seconds=progress.audio_seconds + seconds,
        seconds=time.monotonic() - state.began,
    )


def micro_batches(run: Run, batches: list[list[Example]]) -> Iterable[list[Example]]:
    """This rank's micro-batches. All ranks run a sharded LLM together, so one with fewer of them adds dummy passes."""
    together = run.settings.shard_llm and run.runtime.world > 1 and run.objective.runs_llm
    for batch in pad_micro_batches(batches, run.runtime) if together else batches:
        if together and not any(example.response for example in batch):
            dummy_pass(run.prefixes.llm)
        if batch:
            yield batch


def move_adapter(run: Run, state: State, number: int, examples: list[Example]) -> float:
    """Sum the gradients over the ranks, clip them, step, average the weights of the last steps; return the norm."""
    reduce_gradients(run.parameters, run.runtime)
    length = torch.nn.utils.clip_grad_norm_(run.parameters, run.settings.clip)
    if not torch.isfinite(length):
        raise TrainingError(bad_loss(run, number, length.item(), examples))
    for group in state.optimiser.param_groups:
        group["lr"] = learning_rate(run.settings, number + 1, run.steps)
    state.optimiser.step()
    state.optimiser.zero_grad()
    if number >= run.steps - run.settings.average_last:
        add_to_average(run, state, number)
    return length.item()


def sum_over_ranks(runtime: Runtime, *numbers: float) -> list[float]:
    """Each number summed over all ranks."""
    return sum_across(torch.tensor(numbers, dtype=torch.float64), runtime).tolist()


def bad_loss(run: Run, number: int, value: float, examples: Iterable[Example]) -> str:
    ids = [example.id for example in examples]
    named = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
    return (
        f"{run.settings.out}: step {number + 1}: the loss or its gradient is {value}; it came from the rows "
        f"{named}. Look at them, or lower --lr"
    )


# --- the end ----------------------------------------------------------------------------------------------
def finish(run: Run, state: State) -> None:
    """Write the verdict, the curves, the adapter and its card; print how many rows all ranks skipped."""
    barrier(run.runtime)  # every rank has written its skip list
    out = run.settings.out
    if run.runtime.rank == 0 or run.settings.shard_llm:  # all ranks run a sharded LLM, or none
        found = verdict.judge(run)
    if run.runtime.rank != 0:
        return
    found.write(out)
    verdict.write_held_out(run)
    draw_curves(run)
    card = model_card(run.model.config, run.settings, out / "metrics.jsonl", str(found))
    save_adapter(run.model, run.processor, out / "adapter", card=card)
    run_state.merge_skipped(run.skipped, out)
    if run.skipped.count:
        print(f"{run.skipped.count} rows could not be learnt from: see {run.skipped.path}", file=sys.stderr)
    print(f"{out}: {state.progress.step} steps done; the adapter is {out / 'adapter'}\n{found}")
