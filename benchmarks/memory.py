"""Memory that training a given pair of models needs, estimated before a run.

In:  names of a speech encoder and an LLM (their configurations are enough: no weights are read for the estimate).
Out: one JSON object on the last line: megabytes by purpose; without options also what a step really took.
Try: `python -m benchmarks.memory --llm Qwen/Qwen3-8B --audio-model openai/whisper-small --dtype bfloat16`
Flow: benchmarks/ — `make bench` gathers the default's figures into results/bench.json.

Frozen weights are held once in `--dtype`; the adapter in float32 with gradient, two AdamW moments and the running
mean of its last weights. Frozen linear layers keep no inputs, so a decoder layer keeps about 6 h + 2 kv + 4 m numbers a
position (h hidden, kv key/value and m feed-forward width; norms, q, k, v, attention, gate, up and their products), or h
with --activation-checkpointing. The head runs in chunks of bounded size whatever the vocabulary is.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from blsp.llm.language_model import rows_per_chunk
from blsp.model.adapter import ADAPTERS
from blsp.weights.embedded import resolve_weights

ENCODER, LLM = "embedded:whisper-tiny.en", "embedded:smollm2-135m-instruct"
BYTES = {"float32": 4, "bfloat16": 2}
MEGA = 1e6


def parameters(config: PreTrainedConfig) -> int:
    """Of a decoder, or of the encoder half of a Whisper: the other half is not loaded."""
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    return sum(each.numel() for each in getattr(model, "encoder", model).parameters())


def estimate(
    audio_model: str, llm: str, adapter: str, dtype: str, batch_tokens: int, activation_checkpointing: bool
) -> dict[str, float]:
    """Megabytes by purpose."""
    audio, text = (AutoConfig.from_pretrained(resolve_weights(name)) for name in (audio_model, llm))
    width = text.hidden_size
    with torch.device("meta"):
        options = {"classes": text.vocab_size} if ADAPTERS[adapter].reads_out else {}
        module = ADAPTERS[adapter](audio.d_model, width, **options)
    learnt = sum(each.numel() for each in module.parameters())
    head = 0 if text.tie_word_embeddings else text.vocab_size * width
    values = 2 * text.num_key_value_heads * (getattr(text, "head_dim", None) or width // text.num_attention_heads)
    layer = width if activation_checkpointing else 6 * width + values + 4 * text.intermediate_size
    chunk = rows_per_chunk(text.vocab_size) * text.vocab_size
    parts = {
        "frozen_llm": (parameters(text) + head) * BYTES[dtype],
        "frozen_encoder": parameters(audio) * BYTES[dtype],
        "adapter_and_optimiser": learnt * 4 * 5,
        "activations": batch_tokens * layer * text.num_hidden_layers * BYTES[dtype],
        "head_chunk": chunk * 4 * 3,  # logits, their softmax, their gradient
    }
    figures = {name: round(size / MEGA, 1) for name, size in parts.items()}
    return figures | {"total": round(sum(parts.values()) / MEGA, 1)}


def measured(positions: tuple[int, ...]) -> list[float]:
    """Peak megabytes of a step with the embedded default, by positions in its pass; in a fresh process."""
    from benchmarks.train_step import FLOAT32, Way, examples, plan_steps, trainable

    model, processor = trainable(FLOAT32)
    sizes = plan_steps(processor, model.model.multi_modal_projector.strides, steps=1)
    rows = examples(model, processor, sizes[0])
    way = Way(model)
    way.learn([rows[:2]])  # what is made once: prefix, optimiser
    each = way.learn([rows[:2]])[0] / 2
    peaks = []
    for wanted in positions:
        count = max(1, round(wanted / each))
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM begins anew
        way.learn([(rows * -(-count // len(rows)))[:count]])
        peaks.append(memory_status("VmHWM"))
    return peaks


def memory_status(name: str) -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split(f"{name}:")[1].split()[0]) * 1024 / MEGA


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--audio-model", default=ENCODER)
    parser.add_argument("--llm", default=LLM)
    parser.add_argument("--adapter", choices=sorted(ADAPTERS), default="conv")
    parser.add_argument("--dtype", choices=sorted(BYTES), default="float32")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--activation-checkpointing", action="store_true")
    options = parser.parse_args()
    figures: dict[str, Any] = {"estimate_mb": estimate(**vars(options))}
    default = all(getattr(options, name) == parser.get_default(name) for name in vars(options))
    if default and Path("/proc/self/clear_refs").exists():
        sizes = (512, 1024)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            small, large = pool.apply(measured, (sizes,))
        activations = figures["estimate_mb"]["activations"] / options.batch_tokens
        figures["measured_mb_a_position"] = round((large - small) / (sizes[1] - sizes[0]), 3)
        figures["estimated_mb_a_position"] = round(activations, 3)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
