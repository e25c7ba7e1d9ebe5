"""Device, number format and rank of this process, and the collective operations of the ranks.

`torchrun` or `accelerate launch` start the processes and set each one's rank in its environment; without them there is
one process. Ranks share work by row and exchange a few sums.

In:    the names of a device and a number format, or "auto"; the launcher's environment variables.
Out:   a `Runtime`, which every function that computes gets as an argument.
Try:   torchrun --nproc-per-node 2 -m blsp encode --manifest in.jsonl --audio-model A --cache DIR
Flow:  each command calls `find_runtime` first, then loads models onto its device.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, reduce
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Ranks may finish their shares hours apart, so a barrier waits long. In a training step they are never far apart.
PATIENCE = timedelta(days=1)
COLLECTIVE_MINUTES = 30.0
WEIGHTS = ("bfloat16", "int8", "int4")  # formats of the LLM's weights (llm/quantise.py)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class Runtime:
    """Device, number format of frozen weights, and the rank, which decides this process's share of the work."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world: int = 1
    weights: str | None = None  # of the LLM, one of WEIGHTS; None: as `dtype`
    shard_llm: bool = False  # its layers are spread over the ranks (llm/sharding.py)
    attention: str | None = None  # of the LLM, as transformers names it


def find_runtime(
    device: str = "auto",
    dtype: str = "auto",
    weights: str | None = None,
    minutes: float = COLLECTIVE_MINUTES,
    *,
    shard_llm: bool = False,
    attention: str | None = None,
) -> Runtime:
    """This process's runtime; joins the other ranks when a launcher started several.

    `device`: "auto" (CUDA if there is one, otherwise CPU), or any torch device. `dtype`: "auto" is bfloat16 on a CUDA
    device that computes in it, otherwise float32 (float16, which overflows in some LLMs, must be named); "fastest" is
    bfloat16 also on a CPU that computes in it, so that results depend on the CPU. `weights`: the format of the LLM's
    weights, one of WEIGHTS, if not `dtype`. `minutes`: how long a rank waits for the others in a sum before it fails.
    `shard_llm`: split the LLM's layers over the ranks, if there are several. `attention`: see `Runtime`.
    """
    if weights not in (None, *WEIGHTS):
        raise ValueError(f"weights {weights!r} are not known; choose one of {', '.join(WEIGHTS)}")
    rank, world, local = (
        _from_environment(name, default) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    own_device = _find_device(device, local)
    if dtype in ("auto", "fastest"):
        allowed = dtype == "fastest" or own_device.type != "cpu"
        dtype = "bfloat16" if allowed and computes_bfloat16(own_device) else "float32"
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not known; choose auto, fastest or one of {', '.join(DTYPES)}")
    if own_device.type == "cuda":
        torch.cuda.set_device(own_device)
    if world > 1 and not dist.is_initialized():
        _join(own_device, timedelta(minutes=minutes))
    if shard_llm and weights:
        raise ValueError(f"--weights {weights}: an LLM that is spread over processes keeps its format; leave one out")
    return Runtime(own_device, DTYPES[dtype], rank, world, weights, shard_llm and world > 1, attention)


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the device computes bfloat16 in hardware: CUDA from Ampere on, CPUs with AVX-512 BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    instructions = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(instructions.get("avx512_bf16") or instructions.get("amx_bf16"))


def _from_environment(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise ValueError(f"the environment variable {name} is {value!r}; the launcher sets it to a whole number")
    return int(value)


def _find_device(name: str, local: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is not one of torch's; try cpu, cuda or cuda:0") from error
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: this machine or this torch build has no CUDA; take cpu")
    device = torch.device("cuda", local if device.index is None else device.index)
    if device.index >= torch.cuda.device_count():
        raise ValueError(f"{device} is asked for, but only {torch.cuda.device_count()} are here; start fewer processes")
    return device


def _join(device: torch.device, timeout: timedelta) -> None:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(f"WORLD_SIZE is set but {' and '.join(missing)} not; start the ranks with torchrun")
    if device.type == "cuda":  # gloo beside nccl, for tensors on the CPU
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=timeout)


def send(values: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; to a GPU from pinned memory, without waiting for what the GPU has to do before."""
    if device.type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def leave(runtime: Runtime) -> None:
    """Destroy the process group, at the end of the program."""
    if runtime.world > 1 and dist.is_initialized():
        run_empty_passes()
        _empty_passes.clear()
        _patient_group.cache_clear()
        dist.destroy_process_group()


def shard_rows(n: int, runtime: Runtime) -> range:
    """This rank's share of the rows 0..n-1: every world-th one, so that a sorted file is divided evenly."""
    return range(runtime.rank, n, runtime.world)


def barrier(runtime: Runtime) -> None:
    """Wait until all ranks have called it."""
    if runtime.world > 1:
        run_empty_passes()
        dist.barrier(group=_patient_group())


@cache
def _patient_group() -> Any:
    """A group of all ranks whose time-out is `PATIENCE`, made at the first barrier."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def gathered(value: T) -> list[T]:
    """The values of all ranks, in order, on each rank; without a launcher, only this process's."""
    if not dist.is_initialized():
        return [value]
    run_empty_passes()
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_first(make: Callable[[], T]) -> T:
    """The result of the first rank's `make`, on each rank; the other ranks do not call it."""
    if not dist.is_initialized():
        return make()
    made = [make() if dist.get_rank() == 0 else None]
    run_empty_passes()
    dist.broadcast_object_list(made)
    return cast(T, made[0])


def shared(items: Sequence[S], work: Callable[[S], T]) -> Iterator[T]:
    """The result of `work` for each item, in order, on each rank; each rank computes every world-th of them."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for start in range(0, len(items), world):
        mine = start + rank
        results = gathered(work(items[mine]) if mine < len(items) else None)
        yield from cast(list[T], results[: len(items) - start])


_empty_passes: list[Callable[[], object]] = []  # for each model that all ranks must run together


def announce_pass(working: bool = True) -> bool:
    """Tell the ranks that this one is about to run such a model, or waits for them; whether any of them runs it."""
    busy = torch.tensor(int(working))
    dist.all_reduce(busy, group=_patient_group())
    return bool(busy)


def share_passes(empty_pass: Callable[[], object]) -> None:
    """From here on, a rank that waits for the others calls `empty_pass` as often as they run the model.

    Each pass of the model must be announced (`announce_pass`). All ranks call this at the same place.
    """
    _empty_passes.append(empty_pass)


def run_empty_passes() -> None:
    """Run the empty passes until every rank waits; called wherever ranks wait for each other."""
    for empty_pass in _empty_passes:
        while announce_pass(working=False):
            empty_pass()


def sum_across(tensor: Tensor, runtime: Runtime) -> Tensor:
    """The sum over all ranks of a tensor with the same shape on each; the argument does not change."""
    if runtime.world == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def reduce_gradients(params: Iterable[nn.Parameter], runtime: Runtime) -> None:
    """Replace each gradient by its sum over the ranks, in one message.

    The loss was divided by the count over all ranks, so the sum equals the gradient of one process. A parameter that
    has no gradient on any rank keeps none; a gradient that is missing on some ranks counts as zero there.
    """
    if runtime.world == 1:
        return
    trained = [p for p in params if p.requires_grad]
    if not trained:
        return
    # One flat message: a 1 for each parameter that has a gradient here, then all gradients one after another.
    dtype = reduce(torch.promote_types, (p.dtype for p in trained))
    flat = torch.zeros(len(trained) + sum(p.numel() for p in trained), dtype=dtype, device=trained[0].device)
    has_gradient, *gradients = flat.split([len(trained), *(p.numel() for p in trained)])
    for i, (p, piece) in enumerate(zip(trained, gradients, strict=True)):
        if p.grad is not None:
            has_gradient[i] = 1
            piece.copy_(p.grad.flatten())
    dist.all_reduce(flat)
    for ranks, p, piece in zip(has_gradient.tolist(), trained, gradients, strict=True):
        p.grad = piece.view_as(p).to(p.dtype, copy=True) if ranks else None


# mallopt's parameters (malloc.h of glibc): blocks up to 1 GiB come from the heap; the heap never shrinks by itself;
# it grows by 64 MiB at least.
MALLOC_OPTIONS = {-3: 2**30, -1: 2**31 - 1, -2: 2**26}  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD


def keep_freed_memory() -> bool:
    """Keep freed CPU memory in the process (glibc) and let torch ask for huge pages; False where there is no glibc.

    It saves a sixth of a training step on the CPU. Call it before the first tensor, as torch reads the variable once.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    libc = ctypes.CDLL(None)
    return all([libc.mallopt(option, value) == 1 for option, value in MALLOC_OPTIONS.items()])


def give_back_freed_memory() -> bool:
    """Return freed pages to the system, also those between used pages (glibc); False without glibc."""
    if platform.libc_ver()[0] != "glibc":
        return False
    ctypes.CDLL(None).malloc_trim(0)
    return True
