"""How fast the adapter trains, against the obvious way, and what each saving is worth.

In:  the embedded default; real recordings cut to about 3 s, 32 response tokens. No file is written.
Out: one JSON object on the last line: samples a second of every way, ratios, the share of the machine's own
     matrix-product speed that the step reaches, padding.
Try: `python -m benchmarks.train_step --rounds 3` (about five minutes on two quiet cores)
Flow: benchmarks/ — `make bench` gathers it into results/bench.json.

Ways, each with all savings of the ones below it switched off too: cached features; speech encoded in the step on its
true length; clips padded to 30 s; the prompt's prefix in every row; logits at every position; batches in random order.
The baseline is none of our code but the convolutions: transformers' own modules, whole sequences, batches of eight.
Every round runs all ways and a 2048³ matrix product, so that noise falls on all of them; medians are reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import WhisperModel

from benchmarks.serving import SPEECH
from blsp.continuation.prompts import instruction_for
from blsp.data.audio import SAMPLE_RATE, load_audio
from blsp.model.checkpoint import new_blsp
from blsp.model.digest import tensor_digest
from blsp.model.distributed import Place
from blsp.model.embedded import resolve_weights
from blsp.model.language_model import embed
from blsp.model.modeling_blsp import BlspForConditionalGeneration
from blsp.model.prompt import frame_prompt, transcript_ids
from blsp.model.speech_encoder import encode_speech, mel_features, mel_frames
from blsp.training import step
from blsp.training.examples import Example
from blsp.training.prompted_llm import PromptedLLM

ENCODER, LLM = "embedded:whisper-tiny.en", "embedded:smollm2-135m-instruct"
SAMPLES = 32
BASELINE_BATCH = 8
TOP_K = 20
MATRIX = 2048


def clips(count: int, seed: int = 0) -> list[np.ndarray]:
    """Real speech, one recording after another, cut into 2 to 4 s."""
    lines = (SPEECH / "train.jsonl").read_text(encoding="utf-8").splitlines()
    draw = np.random.default_rng(seed)
    sound = np.concatenate([load_audio(SPEECH / json.loads(line)["audio"]) for line in lines[:count]])
    sizes = draw.integers(2 * SAMPLE_RATE, 4 * SAMPLE_RATE, count)
    starts = draw.integers(0, len(sound) - 4 * SAMPLE_RATE, count)
    return [sound[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def examples(model: BlspForConditionalGeneration, processor: Any, count: int, seed: int = 0) -> list[Example]:
    """Rows as the loop sees them, with the features, the mel, and a stored teacher."""
    draw = np.random.default_rng(seed)
    frame = frame_prompt(processor.tokenizer, instruction_for("continue"), "instruction-first")
    text = transcript_ids(processor.tokenizer, "I have come to see the old man who lives by the river.")
    vocabulary = model.config.text_config.vocab_size
    made = []
    for number, clip in enumerate(clips(count, seed)):
        mel, _ = mel_features(processor.feature_extractor, [clip])
        response = draw.integers(0, vocabulary, draw.integers(24, 41)).tolist()
        top = np.stack([draw.choice(vocabulary, TOP_K, replace=False) for _ in response]).astype(np.uint32)
        logp = np.log(np.full((len(response), TOP_K), 0.9 / TOP_K, np.float16))
        example = Example(
            f"{number}", len(clip) / SAMPLE_RATE, frame, text, response, False, teacher=(top, logp)
        )
        states, lengths = encode_speech(
            model.model.audio_tower, mel, torch.arange(mel.shape[2])[None] < mel_frames(len(clip))
        )
        features = states[0, : int(lengths[0])].half().numpy()
        made.append(replace(example, features=features, mel=mel[0].numpy(), mel_frames=mel_frames(len(clip))))
    return made


def padded_to_30s(processor: Any, each: Example) -> Example:
    mel = np.zeros((each.mel.shape[0], 3000), np.float32)  # type: ignore[union-attr]
    mel[:, : each.mel.shape[1]] = each.mel  # type: ignore[union-attr]
    return replace(each, mel=mel)


class WithoutPrefixReuse(PromptedLLM):
    """The prefix stands in every row and is run every time."""

    def states(self, prefix_ids: tuple[int, ...], embeds: Tensor) -> Tensor:
        whole = torch.cat([embed(self.model, prefix_ids).expand(len(embeds), -1, -1), embeds], dim=1)
        output = self.model.model.language_model(inputs_embeds=whole, use_cache=False)
        return output.last_hidden_state[:, len(prefix_ids) :]


class WithAllLogits(WithoutPrefixReuse):
    """Also runs the vocabulary head at every position; the sum of the logits stands for a loss on them."""

    extra: Tensor | None = None

    def states(self, prefix_ids: tuple[int, ...], embeds: Tensor) -> Tensor:
        hidden = super().states(prefix_ids, embeds)
        self.extra = nn.functional.cross_entropy(
            self.model.lm_head(hidden).flatten(0, 1),
            torch.zeros(hidden.shape[:2], dtype=torch.long).flatten(),
        )
        return hidden + 0 * self.extra


@dataclass
class Way:
    """One way to learn from the same samples: `learn(samples)` runs forward and backward on all of them."""

    model: BlspForConditionalGeneration
    loss: step.Loss = "ce"
    llm: type[PromptedLLM] = PromptedLLM
    of: Callable[[Example], Example] = lambda each: each
    full_window: bool = False
    ordered: bool = True

    def __post_init__(self) -> None:
        self.prompted = self.llm(self.model)
        self.optimiser = torch.optim.AdamW(self.model.model.multi_modal_projector.parameters(), lr=1e-5)

    def learn(self, samples: Sequence[Example], batch: int) -> tuple[int, int]:
        """One optimiser step; (positions, padding) of its passes."""
        self.model.config.full_window = self.full_window
        objective = step.Objective(self.loss, stored_teacher=self.loss == "kl")
        chosen = sorted(samples, key=lambda each: len(each.response)) if self.ordered else list(samples)
        counts = step.counts_of(samples, objective)
        positions = padding = 0
        for begin in range(0, len(chosen), batch):
            part = [self.of(each) for each in chosen[begin : begin + batch]]
            sums = step.run(self.model, part, objective, self.prompted)
            step.objective_value(sums, counts, objective).backward()
            positions, padding = positions + sums.positions, padding + sums.padding
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.model.config.full_window = False
        return positions, padding


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

    def learn(self, samples: Sequence[Example], batch: int) -> None:
        for begin in range(0, len(samples), batch):
            part = samples[begin : begin + batch]
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
        before = table(torch.tensor([each.frame.prefix_ids for each in part]))
        after = torch.tensor(
            [[*e.frame.suffix_ids, *e.response, *[0] * (width - len(e.response))] for e in part]
        )
        labels = torch.tensor([[*e.response, *[-100] * (width - len(e.response))] for e in part])
        embeds = torch.cat([before, heard.vectors, table(after)], dim=1)
        kept = torch.ones(before.shape[:2], dtype=torch.long)
        mask = torch.cat([kept, heard.valid.long(), torch.ones_like(after)], dim=1)
        hidden = self.decoder(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
        logits = self.head(hidden)  # (B, L, V)
        ignored = torch.full((len(part), logits.shape[1] - width), -100)
        targets = torch.cat([ignored, labels], dim=1)[:, 1:]
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)


def seconds_of(task: Callable[[], Any]) -> float:
    began = time.monotonic()
    task()
    return time.monotonic() - began


def useful_flop(model: BlspForConditionalGeneration, positions: int, responses: int) -> float:
    """4 x parameters a position after the prefix (forward, and backward to the activations), head where needed."""
    body = sum(p.numel() for p in model.model.language_model.layers.parameters())
    head = model.config.text_config.vocab_size * model.config.text_config.hidden_size
    return 4.0 * (body * positions + head * responses)


def measure(rounds: int, samples: int) -> dict[str, Any]:
    """All ways, interleaved, on the same samples."""
    place = Place(torch.device("cpu"), torch.float32)
    model, processor = new_blsp(ENCODER, LLM, place, adapter="conv")
    model.model.multi_modal_projector.requires_grad_(True).train()
    rows = examples(model, processor, samples)
    online = lambda each: replace(each, features=None)  # noqa: E731
    long = lambda each: padded_to_30s(processor, online(each))  # noqa: E731
    ways = {
        "cached": Way(model),
        "cached_kl": Way(model, loss="kl"),
        "online": Way(model, of=online),
        "padded_to_30s": Way(model, of=long, full_window=True),
        "no_prefix_reuse": Way(model, of=long, full_window=True, llm=WithoutPrefixReuse),
        "all_logits": Way(model, of=long, full_window=True, llm=WithAllLogits),
        "unsorted": Way(model, of=long, full_window=True, llm=WithAllLogits, ordered=False),
    }
    plain, thirty = Plain(model), [long(each) for each in rows]
    left, right = torch.randn(MATRIX, MATRIX), torch.randn(MATRIX, MATRIX)
    took: dict[str, list[float]] = {name: [] for name in [*ways, "plain", "product"]}
    found = {name: way.learn(rows, samples) for name, way in ways.items()}  # also the warm-up
    plain.learn(thirty, BASELINE_BATCH)
    for _ in range(rounds):
        for name, way in ways.items():
            took["product"].append(seconds_of(lambda: left @ right))
            took[name].append(seconds_of(lambda way=way: way.learn(rows, samples)))  # type: ignore[misc]
        took["plain"].append(seconds_of(lambda: plain.learn(thirty, BASELINE_BATCH)))
    speed = {name: samples / statistics.median(took[name]) for name in took if name != "product"}
    positions, padding = found["cached"]
    peak = 2 * MATRIX**3 / statistics.median(took["product"])
    useful = useful_flop(model, positions - padding, sum(len(each.response) for each in rows))
    return {
        "ratio_cached": round(speed["cached"] / speed["plain"], 2),
        "ratio_online": round(speed["online"] / speed["plain"], 2),
        "matmul_fraction": round(useful / statistics.median(took["cached"]) / peak, 3),
        "topk_over_ce": round(speed["cached_kl"] / speed["cached"], 3),
        "padding_share": round(padding / positions, 4),
        "matmul_gflops": round(peak / 1e9, 1),
        "samples_per_second": {name: round(each, 2) for name, each in speed.items()},
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "encoder": tensor_digest(resolve_weights(ENCODER))[:12],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    options = parser.parse_args()
    print(json.dumps(measure(options.rounds, options.samples)))


if __name__ == "__main__":
    main()
