"""Benchmark of the LLM's weights in fewer bits: tokens per second of one answer, and how far the answers move.

In:  an LLM (default: Qwen), transcripts of `examples/speech` as text prompts.
Out: one JSON object on the last line: for each format seconds to the first token, tokens/s at batch 1 (medians), and
     the divergence from the first format in nats a token, with its 95 % interval over prompts.
Try: `python -m benchmarks.weights --formats float32 int4 --prompts 16`
Flow: benchmarks/ — `make bench` gathers it into results/bench.json. All formats are held at once (Qwen: 13 GB).

The formats take turns on each prompt. The divergence is KL(first || format) along the first format's greedy answers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from benchmarks.support.serving import SPEECH
from blsp.distributed import WEIGHTS, find_runtime
from blsp.evaluation.bootstrap import Figure, draws, interval, ratio
from blsp.inference.listener import decode_alone
from blsp.llm.decoding import Decoder, Decoding, Request, Result, decode
from blsp.llm.language_model import embed, kl_divergence, log_probabilities, stop_ids
from blsp.llm.prompt import prompt_template, transcript_ids
from blsp.llm.teacher_forcing import answer_states
from blsp.model.loading import load_language_model
from blsp.weights.digest import find_weights

FORMATS = ("float32", *WEIGHTS)
INSTRUCTION = "Continue the following text:"
NEW_TOKENS = 24


class Asked:
    """The LLM in one format, and its requests to continue the first `count` transcripts."""

    def __init__(self, llm: str, name: str, count: int) -> None:
        runtime = find_runtime("auto", "float32", name if name in WEIGHTS else None)
        self.llm, tokenizer = load_language_model(find_weights(llm), runtime)
        lines = (SPEECH / "train.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        template = prompt_template(tokenizer, INSTRUCTION, "instruction-first")
        decoding = Decoding(max_new_tokens=NEW_TOKENS, stop_ids=stop_ids(self.llm))
        ids = [transcript_ids(tokenizer, json.loads(line)["text"]) for line in lines]
        embeds = [embed(self.llm, [*template.prefix_ids, *text, *template.suffix_ids]) for text in ids]  # (L, D) each
        self.requests = [Request(number, each, decoding=decoding) for number, each in enumerate(embeds)]

    def log_probs(self, request: Request, answer: Result) -> Tensor:
        """(N, V) at the positions that predict the answer's tokens."""
        return log_probabilities(self.llm, answer_states(self.llm, [request], [answer])[0])


def times_of(llm: PreTrainedModel, request: Request) -> tuple[float, float]:
    """Seconds to the first token of an answer, and tokens per second after it."""
    start = time.monotonic()
    times = [time.monotonic() - start for _ in decode_alone(Decoder(llm), request)]
    return times[0], (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else float("nan")


@torch.no_grad()
def divergence(first: Asked, other: Asked, answers: Sequence[Result]) -> Figure:
    """KL(first || other) summed over each answer's tokens, and their number: one row a prompt."""
    sums = []
    for one, two, answer in zip(tqdm(first.requests, unit="prompt"), other.requests, answers, strict=True):
        reference, moved = first.log_probs(one, answer), other.log_probs(two, answer)
        sums.append([float(kl_divergence(reference, moved).sum()), len(reference)])
    return Figure(np.array(sums), ratio)


def measure(name: str, formats: Sequence[str], count: int, rounds: int) -> dict[str, Any]:
    loaded = {each: Asked(name, each, count) for each in formats}
    times: dict[str, list[tuple[float, float]]] = {each: [] for each in formats}
    for number in tqdm(range(-1, rounds), unit="round"):  # the first warms up
        for each, asked in loaded.items():
            taken = times_of(asked.llm, asked.requests[max(0, number) % count])
            times[each] += [taken] if number >= 0 else []
    figures: dict[str, Any] = {"threads": torch.get_num_threads()}
    for each, found in times.items():
        waits, speeds = zip(*found, strict=True)
        wait, speed = round(statistics.median(waits), 3), round(float(np.nanmedian(speeds)), 2)
        figures[each] = {"first_token_s": wait, "tokens_per_s": speed}
        print(each, figures[each], flush=True)

    first = loaded[formats[0]]
    written = decode(first.llm, first.requests, batch_size=8)
    answers = [written[number] for number in range(count)]
    for each, asked in loaded.items():
        moved = divergence(first, asked, answers)
        low, high = interval(moved, draws(count, samples=2000, seed=0))
        figures[each]["divergence"] = [round(value, 5) for value in (moved.point(), low, high)]
        print(each, figures[each], flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", default="embedded:qwen2.5-coder-1.5b-instruct")
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS, help="the first is the reference")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.llm, arguments.formats, arguments.prompts, arguments.rounds)))


if __name__ == "__main__":
    main()
