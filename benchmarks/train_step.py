"""Speed of training, compared with a plain implementation, and the effect of each saving.

In:  the embedded default; real recordings cut to 2 to 4 s (3 on average), 24 to 40 response tokens (32). No file is
     written.
Out: one JSON object on the last line: samples a second of every way, ratios, the share of the machine's own
     matrix-product speed that the step reaches in float32 and in bfloat16, padding, what the processor can do.
Try: `python -m benchmarks.train_step --ways cached online` (two minutes on two quiet cores; all: seven)
Flow: benchmarks/ — `make bench` gathers it into results/bench.json.

Ways, each with all savings of the ones above it switched off too: cached features (`cached_kl`: with a stored teacher);
speech encoded in the step on its true length; clips padded to 30 s; the prompt's prefix in every row; logits at every
position; batches in random order. `cached_bf16`, beside them, holds the frozen weights in bfloat16.
The baseline is none of our code but the convolutions: transformers' own modules, whole sequences, batches of eight.
All learn from the same samples: steps that the loop's own plan has drawn from 4,096 rows, rows of like length in each.
Every round runs all ways and 2048³ matrix products between them, in the way's number format, so that noise falls on
all; medians are reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import WhisperModel

from benchmarks.support.serving import SPEECH
from blsp.data.audio import SAMPLE_RATE, load_audio
from blsp.distributed import Runtime, keep_freed_memory
from blsp.llm.instructions import instruction_for
from blsp.llm.prefix import Prefix, PrefixCache, run_after_prefix
from blsp.llm.prompt import Order, prompt_template, transcript_ids
from blsp.model.adapter_parts import num_audio_tokens
from blsp.model.checkpoint import new_blsp
from blsp.model.modeling_blsp import BlspForConditionalGeneration
from blsp.model.speech_encoder import encode_speech, encoder_frames, mel_features, mel_frames
from blsp.training import step
from blsp.training.batches import DataFile, DataOrder
from blsp.training.examples import Example
from blsp.weights.digest import find_weights

ENCODER, LLM = "embedded:whisper-tiny.en", "embedded:smollm2-135m-instruct"
POPULATION = 4096  # rows that the plan sorts
STEPS, BATCH = 2, 16  # steps learnt from, and rows in each: one pass of about 1,000 positions
BASELINE_BATCH = 8
Result = TypeVar("Result")
ORDER: Order = "instruction-first"
FLOAT32 = Runtime(torch.device("cpu"), torch.float32)
BFLOAT16 = Runtime(torch.device("cpu"), torch.bfloat16)
RECORDINGS = 40
TOP_K = 20
MATRIX = 2048


def plan_steps(processor: Any, strides: Sequence[int], steps: int) -> list[list[tuple[int, int]]]:
    """(samples of the clip, tokens of the response) of each row of `steps` steps, from short ones to long ones."""
    draw = np.random.default_rng(0)
    clip = draw.integers(2 * SAMPLE_RATE, 4 * SAMPLE_RATE, POPULATION, endpoint=True)
    response = draw.integers(24, 40, POPULATION, endpoint=True)
    frames = np.array([encoder_frames(mel_frames(int(size))) for size in clip])
    speech = num_audio_tokens(frames, strides)
    tail = len(prompt_template(processor.tokenizer, instruction_for("continue"), ORDER).suffix_ids) - 1
    lengths = speech + tail + response
    plan = DataOrder((DataFile(0, POPULATION),), BATCH, seed=0)
    epoch = list(islice(plan.steps(0, lambda rows: lengths[rows]), plan.steps_per_epoch))
    epoch.sort(key=lambda rows: int(lengths[rows].sum()))
    chosen = [epoch[len(epoch) * (2 * number + 1) // (2 * steps)] for number in range(steps)]
    return [[(int(clip[row]), int(response[row])) for row in rows] for rows in chosen]


def examples(model: BlspForConditionalGeneration, processor: Any, sizes: Sequence[tuple[int, int]]) -> list[Example]:
    """Rows as the loop sees them, with the features, the mel, and a stored teacher: real speech, cut to size."""
    draw = np.random.default_rng(0)
    frame = prompt_template(processor.tokenizer, instruction_for("continue"), ORDER)
    text = transcript_ids(processor.tokenizer, "I have come to see the old man who lives by the river.")
    vocabulary = model.config.text_config.vocab_size
    lines = (SPEECH / "train.jsonl").read_text(encoding="utf-8").splitlines()[:RECORDINGS]
    sound = np.concatenate([load_audio(SPEECH / json.loads(line)["audio"]) for line in lines])
    made = []
    for number, (size, tokens) in enumerate(sizes):
        start = draw.integers(0, len(sound) - size)
        mel, mask = mel_features(processor.feature_extractor, [sound[start : start + size]])
        states, lengths = encode_speech(model.model.audio_tower, mel, mask)
        response = draw.integers(0, vocabulary, tokens).tolist()
        top = np.stack([draw.choice(vocabulary, TOP_K, replace=False) for _ in response]).astype(np.uint32)
        logp = np.log(np.full((len(response), TOP_K), 0.9 / TOP_K, np.float16))
        example = Example(f"{number}", size / SAMPLE_RATE, frame, text, response, False, teacher=(top, logp))
        features = states[0, : int(lengths[0])].half().numpy()
        made.append(replace(example, features=features, mel=mel[0].numpy(), mel_frames=mel_frames(size)))
    return made


def padded_to_30s(each: Example) -> Example:
    mel = np.zeros((each.mel.shape[0], 3000), np.float32)  # type: ignore[union-attr]
    mel[:, : each.mel.shape[1]] = each.mel  # type: ignore[union-attr]
    return replace(each, mel=mel)


def with_all_logits(model: BlspForConditionalGeneration, prefix: Prefix | None, embeds: Tensor) -> Any:
    """`run_after_prefix`, and the head at every position; the mean of its logits stands for a loss on them."""
    output = run_after_prefix(model, prefix, embeds)
    hidden = output.last_hidden_state
    extra = nn.functional.cross_entropy(
        model.lm_head(hidden).flatten(0, 1), torch.zeros(hidden.shape[:2], dtype=torch.long).flatten()
    )
    output.last_hidden_state = hidden + 0 * extra
    return output


@dataclass
class Way:
    """One way to learn from the same samples: `learn(steps)` runs forward and backward on each, and moves once."""

    model: BlspForConditionalGeneration
    loss: str = "ce"
    reuse: bool = True  # of the prefix's key/values
    all_logits: bool = False
    of: Callable[[Example], Example] = lambda each: each
    full_window: bool = False
    ordered: bool = True
    runtime: Runtime = FLOAT32

    def __post_init__(self) -> None:
        self.prefixes = PrefixCache(self.model, reuse=self.reuse)
        self.optimiser = torch.optim.AdamW(self.model.model.multi_modal_projector.parameters(), lr=1e-5)

    def learn(self, steps: Sequence[Sequence[Example]]) -> tuple[int, int]:
        """(positions, padding) of its passes."""
        self.model.config.full_window = self.full_window
        step.run_after_prefix = with_all_logits if self.all_logits else run_after_prefix
        objective = step.Objective({self.loss: 1.0}, stored_teacher=self.loss == "kl")
        rows = [each for part in steps for each in part]
        counts = step.counts_of(rows, objective)
        positions = padding = 0
        for part in steps if self.ordered else in_random_order(rows, BATCH):
            with step.autocast(self.runtime):
                sums = step.run(self.model, [self.of(each) for each in part], objective, self.prefixes)
                share = step.objective_value(sums, counts, objective)
            share.backward()
            positions, padding = positions + sums.positions, padding + sums.padding
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.model.config.full_window = False
        return positions, padding


def in_random_order(rows: Sequence[Example], batch: int) -> list[list[Example]]:
    """Batches as they come when nothing sorts them."""
    order = np.random.default_rng(0).permutation(len(rows))
    return [[rows[i] for i in order[begin : begin + batch]] for begin in range(0, len(rows), batch)]


class Plain:
    """The obvious training step: everything as transformers gives it, batches of eight padded to the longest."""

    def __init__(self, model: BlspForConditionalGeneration) -> None:
        self.encoder = WhisperModel(model.config.audio_config).encoder.eval().requires_grad_(False)
        self.encoder.load_state_dict(model.model.audio_tower.state_dict(), strict=False)
        self.adapter, self.decoder, self.head = (
            model.model.multi_modal_projector,
            model.model.language_model,
            model.lm_head,
        )
        self.optimiser = torch.optim.AdamW(self.adapter.parameters(), lr=1e-5)

    def learn(self, rows: Sequence[Example]) -> None:
        for part in in_random_order(rows, BASELINE_BATCH):
            self._loss(part).backward()
            self.optimiser.step()
            self.optimiser.zero_grad()

    def _loss(self, part: Sequence[Example]) -> Tensor:
        mels = torch.stack([torch.from_numpy(each.mel) for each in part])
        with torch.no_grad():
            states = self.encoder(mels).last_hidden_state  # (B, 1500, E): thirty seconds of everything
        frames = torch.tensor([min(1500, (each.mel_frames + 1) // 2) for each in part])
        states = states[:, : int(frames.max())]
        heard = self.adapter(states, frames)
        table = self.decoder.get_input_embeddings()
        width = max(len(each.response) for each in part)
        before = table(torch.tensor([each.template.prefix_ids for each in part]))
        after = torch.tensor([[*e.template.suffix_ids, *e.response, *[0] * (width - len(e.response))] for e in part])
        labels = torch.tensor([[*e.response, *[-100] * (width - len(e.response))] for e in part])
        embeds = torch.cat([before, heard.vectors, table(after)], dim=1)
        kept = torch.ones(before.shape[:2], dtype=torch.long)
        mask = torch.cat([kept, heard.valid.long(), torch.ones_like(after)], dim=1)
        hidden = self.decoder(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
        logits = self.head(hidden)  # (B, L, V)
        ignored = torch.full((len(part), logits.shape[1] - width), -100)
        targets = torch.cat([ignored, labels], dim=1)[:, 1:]
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)


def timed(task: Callable[[], Result]) -> tuple[float, Result]:
    began = time.monotonic()
    result = task()
    return time.monotonic() - began, result


def time_product(dtype: torch.dtype) -> float:
    """Seconds of one matrix product."""
    matrix = torch.randn(MATRIX, MATRIX).to(dtype)
    return timed(lambda: matrix @ matrix)[0]


def useful_flop(model: BlspForConditionalGeneration, positions: int, responses: int) -> float:
    """4 x parameters a position after the prefix (forward, and backward to the activations), head where needed."""
    body = sum(p.numel() for p in model.model.language_model.layers.parameters())
    head = model.config.text_config.vocab_size * model.config.text_config.hidden_size
    return 4.0 * (body * positions + head * responses)


def ways_of(model: BlspForConditionalGeneration, processor: Any) -> dict[str, Callable[[], Way]]:
    """Every way, made when it is asked for."""
    online = lambda each: replace(each, features=None)  # noqa: E731
    long = lambda each: padded_to_30s(online(each))  # noqa: E731
    padded = partial(Way, model, of=long, full_window=True)
    return {
        "cached": lambda: Way(model),
        "cached_kl": lambda: Way(model, loss="kl"),
        "cached_bf16": lambda: Way(trainable(BFLOAT16)[0], runtime=BFLOAT16),
        "online": lambda: Way(model, of=online),
        "padded_to_30s": padded,
        "no_prefix_reuse": lambda: padded(reuse=False),
        "all_logits": lambda: padded(reuse=False, all_logits=True),
        "unsorted": lambda: padded(reuse=False, all_logits=True, ordered=False),
    }


def trainable(runtime: Runtime) -> tuple[BlspForConditionalGeneration, Any]:
    model, processor = new_blsp(find_weights(ENCODER), find_weights(LLM), runtime, adapter="conv")
    model.model.multi_modal_projector.requires_grad_(True).train()
    return model, processor


def measure(rounds: int, steps: int, names: Sequence[str]) -> dict[str, Any]:
    """The ways of these names and the baseline, interleaved, on the same samples."""
    model, processor = trainable(FLOAT32)
    sizes = plan_steps(processor, model.model.multi_modal_projector.strides, steps)
    parts = [examples(model, processor, each) for each in sizes]
    rows = [each for part in parts for each in part]
    every = ways_of(model, processor)
    ways = {name: every[name]() for name in names or every}
    plain, thirty = Plain(model), [padded_to_30s(each) for each in rows]
    took: dict[str, list[float]] = {name: [] for name in [*ways, "plain"]}
    products: dict[torch.dtype, list[float]] = {way.runtime.dtype: [] for way in ways.values()}
    plain.learn(thirty[:BASELINE_BATCH])  # the warm-up
    found = {name: way.learn(parts[-1:]) for name, way in ways.items()}
    for _ in range(rounds):
        for name, way in ways.items():
            product = products[way.runtime.dtype]
            product.append(time_product(way.runtime.dtype))
            seconds, found[name] = timed(partial(way.learn, parts))
            took[name].append(seconds)
            product.append(time_product(way.runtime.dtype))
        took["plain"].append(timed(partial(plain.learn, thirty))[0])
    speed = {name: len(rows) / statistics.median(times) for name, times in took.items()}
    peaks = {dtype: 2 * MATRIX**3 / statistics.median(times) for dtype, times in products.items()}
    responses = sum(len(each.response) for each in rows)
    useful = {
        name: useful_flop(model, positions - padding, responses)
        * speed[name]
        / len(rows)
        / peaks[ways[name].runtime.dtype]
        for name, (positions, padding) in found.items()
    }
    return ratios(speed, useful, found) | {
        "matmul_gflops": {str(dtype).removeprefix("torch."): round(peak / 1e9, 1) for dtype, peak in peaks.items()},
        "processor": sorted(name for name, has in torch.cpu.get_capabilities().items() if has is True),
        "samples_per_second": {name: round(each, 2) for name, each in speed.items()},
        "seconds": {name: [round(each, 2) for each in took[name]] for name in speed},
        "samples": len(rows),
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "encoder": find_weights(ENCODER).sha256[:12],
    }


def ratios(speed: dict[str, float], useful: dict[str, float], found: dict[str, tuple[int, int]]) -> dict[str, float]:
    """The figures that others read; those of ways that were not run are left out."""
    figures = {
        f"ratio_{name}": speed[name] / speed["plain"] for name in ("cached", "online", "cached_bf16") if name in speed
    }
    if "cached_bf16" in speed:
        figures["matmul_fraction_bf16"] = useful["cached_bf16"]
    if "cached" in speed:
        figures["matmul_fraction"] = useful["cached"]
        figures["padding_share"] = found["cached"][1] / found["cached"][0]
        if "cached_kl" in speed:
            figures["topk_over_ce"] = speed["cached_kl"] / speed["cached"]
    return {name: round(value, 4) for name, value in figures.items()}


def main() -> None:
    keep_freed_memory()  # as the training loop does; the baseline profits too
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of {BATCH} samples")
    parser.add_argument("--ways", nargs="*", default=[], help="names, beside the baseline; none: all")
    options = parser.parse_args()
    print(json.dumps(measure(options.rounds, options.steps, options.ways)))


if __name__ == "__main__":
    main()
