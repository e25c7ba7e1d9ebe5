"""Trackers, speed, memory, and a trace of some steps of a run.

In:  lines of metrics.jsonl; the model; `--log-to`, `--profile`.
Out: the same figures in TensorBoard, trackio or Weights & Biases; OUT/trace.json, to be opened in a trace viewer.
Try: `speed(llm_weights, before, now, 1e12)`
Flow: training/loop.py and reporting.py → **tracking.py** → accelerate's trackers, torch.profiler
"""

import sys
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile, schedule

from blsp.distributed import Runtime
from blsp.settings import SettingsError
from blsp.training.run_state import Progress

PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192}  # of the square matrices that measure the device
# figures that differ between two runs of the same command
CLOCKED = ("seconds", "positions_per_second", "audio_hours_per_hour", "memory_gb", "flops", "flops_fraction")
SKIPPED_STEPS = 2  # before the traced ones: the first steps are slower than the others


# --- trackers ---------------------------------------------------------------------------------------------
class Trackers:
    """The trackers of --log-to, in the first process only."""

    def __init__(self, names: Sequence[str], out: Path, settings: Mapping[str, Any], runtime: Runtime) -> None:
        self._trackers = [_open_tracker(name, out) for name in names] if runtime.rank == 0 else []
        plain = {name: v if isinstance(v, bool | int | float | str) else str(v) for name, v in settings.items()}
        for tracker in self._trackers:
            tracker.store_init_configuration(plain)

    def log(self, row: Mapping[str, float]) -> None:
        """One line of metrics.jsonl."""
        for tracker in self._trackers:
            tracker.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.finish()


def _open_tracker(name: str, out: Path) -> Any:
    from accelerate import PartialState, tracking

    PartialState(cpu=not torch.cuda.is_available())  # the trackers read their rank from it
    try:
        kind = tracking.LOGGER_TYPE_TO_CLASS[name]
        tracker = kind(out.name, logging_dir=out) if kind.requires_logging_directory else kind(out.name)
        if hasattr(tracker, "start"):
            tracker.start()
    except (ImportError, NameError) as error:  # accelerate imports only what is installed
        raise SettingsError(f"--log-to {name}: it is not installed: pip install {name}") from error
    return tracker


# --- speed and memory -------------------------------------------------------------------------------------
def layer_weights(llm: torch.nn.Module) -> int:
    """Number of weights in the decoder's layers: each costs four operations for each position in a step."""
    layers = getattr(llm, "layers", None)
    return 0 if layers is None else sum(parameter.numel() for parameter in layers.parameters())


def speed(weights: int, before: Progress, now: Progress, device_flops: float) -> dict[str, float]:
    """Speed since the last line of metrics.jsonl, or since the checkpoint, over all processes.

    flops: of the LLM's layers on positions that are not padding, 2 for each weight forward and 2 backward. Encoder,
    adapter, head and a teacher beside the student are not counted. weights: 0 if the LLM is not run.
    """
    seconds = max(1e-9, now.seconds - before.seconds)
    # a checkpoint may lie within a window: its part of the work was done before its seconds
    positions = now.window_positions - before.window_positions - (now.window_padding - before.window_padding)
    figures = {
        "positions_per_second": round(positions / seconds, 1),
        "audio_hours_per_hour": round((now.audio_seconds - before.audio_seconds) / seconds, 2),
        "memory_gb": round(peak_memory() / 1e9, 3),
    }
    if weights:
        flops = 4 * weights * positions / seconds
        figures |= {"flops": float(f"{flops:.4g}"), "flops_fraction": round(flops / device_flops, 4)}
    return figures


def peak_memory() -> int:
    """The peak memory of this process in bytes; on the GPU if it has one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        import psutil  # accelerate needs it, too

        return int(psutil.Process().memory_info().peak_wset)
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def product_flops(runtime: Runtime) -> float:
    """Operations per second of a matrix product on the device, in the frozen weights' number format; best of 3."""
    size = PRODUCT_SIZE.get(runtime.device.type, 1024)
    matrix = torch.ones(size, size, dtype=runtime.dtype, device=runtime.device)

    def multiply() -> None:
        matrix @ matrix
        if runtime.device.type == "cuda":
            torch.cuda.synchronize()

    return 2 * size**3 / min(timeit.repeat(multiply, number=1, repeat=3)) * runtime.world


# --- a trace ----------------------------------------------------------------------------------------------
@contextmanager
def tracing(steps: int, out: Path, runtime: Runtime) -> Iterator[Callable[[], None]]:
    """A function to call after each step; `steps` steps are written to OUT/trace.json. 0: no trace."""
    if not steps or runtime.rank != 0:
        yield lambda: None
        return
    plan = schedule(wait=SKIPPED_STEPS - 1, warmup=1, active=steps, repeat=1)
    path = str(out / "trace.json")
    with profile(schedule=plan, on_trace_ready=lambda p: p.export_chrome_trace(path)) as tracer:
        yield tracer.step
