"""How much memory a process needs for its part of an LLM that is spread over several (`--shard-llm`).

In:  an LLM of random weights that is mostly layers (Llama's shape, about 1 GB), in several safetensors files.
Out: one JSON object on the last line: peak megabytes of one process and of each of two, above what torch and this
     script take, their ratio, and the largest difference between their losses.
Try: `python -m benchmarks.sharding` (a minute on two quiet cores; Linux)
Flow: benchmarks/ — `make bench` gathers it into results/bench.json.

Each process loads its part and runs forward and backward over some embeddings, as a training step does.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.memory import memory_status
from blsp.distributed import barrier, find_runtime, leave
from blsp.llm.prefix import run_after_prefix
from blsp.llm.sharding import load_sharded

POSITIONS = 16


def write_llm(folder: Path, layers: int, width: int) -> None:
    """Random weights in files of at most 50 MB."""
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        vocab_size=1000,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="50MB")


def train_as_rank(folder: Path, rank: int, world: int, port: int, found: Any) -> None:
    """Load this rank's part, make a step, report the memory that it took and the loss."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    torch.set_num_threads(1)
    runtime = find_runtime("cpu", "float32", shard_llm=True)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM begins anew
    before = memory_status("VmHWM")
    config = LlamaConfig.from_pretrained(folder)
    if runtime.shard_llm:
        llm = load_sharded(folder, config, runtime)
    else:
        llm = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    torch.manual_seed(0)
    embeds = torch.randn(2, POSITIONS, config.hidden_size, requires_grad=True)
    loss = run_after_prefix(llm, None, embeds).last_hidden_state.square().mean()
    loss.backward()
    found.put((world, rank, memory_status("VmHWM") - before, loss.item() + embeds.grad.abs().sum().item()))
    barrier(runtime)
    leave(runtime)


def measure(folder: Path, world: int) -> list[tuple[float, float]]:
    """(megabytes, loss and gradient) of each of so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)  # freed memory goes back at once: count what is in use
    spawn = multiprocessing.get_context("spawn")
    found = spawn.Queue()
    ranks = [spawn.Process(target=train_as_rank, args=(folder, rank, world, port, found)) for rank in range(world)]
    for process in ranks:
        process.start()
    figures = sorted(found.get(timeout=1800) for _ in ranks)
    for process in ranks:
        process.join()
    return [(megabytes, loss) for _, _, megabytes, loss in figures]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--width", type=int, default=640)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_llm(folder, options.layers, options.width)
        files = sorted(folder.glob("*.safetensors"))
        ((one, expected),) = measure(folder, 1)
        two = measure(folder, 2)
        figures = {
            "weights_mb": round(sum(file.stat().st_size for file in files) / 1e6, 1),
            "files": len(files),
            "one_process_mb": round(one, 1),
            "each_of_two_mb": [round(megabytes, 1) for megabytes, _ in two],
            "ratio": round(max(megabytes for megabytes, _ in two) / one, 3),
            "largest_difference": max(abs(loss / expected - 1) for _, loss in two),
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
