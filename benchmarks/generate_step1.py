"""Speed of step 1, compared with plain `generate`.

In:  real transcripts and an LLM.
Out: one JSON object on the last line: tokens a second of both, their ratio, how often they wrote the same.
Try: `python benchmarks/generate_step1.py` (about four minutes on two quiet cores)
Flow: benchmarks/ — `make bench` gathers it into results/bench.json.

The baseline is the usual first version: batches of eight in input order, left-padded, the whole prompt in each
row, every row kept until the last one has ended. Ours is the engine of `blsp continue` with its plan: sorted,
batches of 64, the prefix's key/values shared, finished rows leave. Both take turns; medians are reported.
Tokens are those of the answers (the end included), not what is computed in rows that have ended.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import statistics
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blsp.continuation.engines import Prompt, TransformersEngine
from blsp.distributed import find_runtime
from blsp.llm.decoding import Decoding
from blsp.llm.instructions import instruction_for
from blsp.llm.language_model import stop_ids
from blsp.llm.prompt import prompt_template, transcript_ids
from blsp.model.loading import load_language_model
from blsp.weights.digest import find_weights

TEXTS = Path(__file__).parents[1] / "recipes" / "blsp-tiny" / "texts" / "fotaq_en.jsonl.gz"
ORDER = "instruction-first"
BASELINE_BATCH = 8


def transcripts(count: int, seed: int = 0) -> list[str]:
    """Game lines of at least four words, in random order: what a corpus looks like before it is sorted."""
    with gzip.open(TEXTS, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    return random.Random(seed).sample([text for text in texts if len(text.split()) >= 4], count)


@torch.no_grad()
def write_plainly(llm: PreTrainedModel, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Hugging Face `generate` on left-padded batches of eight, in the order given."""
    stops, answers = set(stop_ids(llm)), []
    for begin in range(0, len(prompts), BASELINE_BATCH):
        batch = prompts[begin : begin + BASELINE_BATCH]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in batch])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch])
        written = llm.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
        )
        for row in written[:, width:].tolist():
            end = next((step for step, token in enumerate(row) if token in stops), len(row))
            answers.append(row[:end])
    return answers


def tokens_of(answers: list[list[int]], new_tokens: int) -> int:
    """Tokens written, the end-of-sequence included."""
    return sum(len(answer) + (len(answer) < new_tokens) for answer in answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llm", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--dtype", default="float32", help="of the LLM: float32 or bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64, help="of step 1: the default of blsp continue")
    parser.add_argument("--prompts", type=int, default=64, help="a round of step 1")
    parser.add_argument("--baseline-prompts", type=int, default=16, help="a round of plain generate")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    settings = parser.parse_args()
    llm, tokenizer = load_language_model(find_weights(settings.llm), find_runtime("cpu", settings.dtype))
    report = measure(llm, tokenizer, settings)
    print(json.dumps(report))


def measure(llm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: argparse.Namespace) -> dict:
    """Both ways in turn, on fresh transcripts each round."""
    instruction = instruction_for("continue")
    template = prompt_template(tokenizer, instruction, ORDER)
    decoding = Decoding(max_new_tokens=settings.max_new_tokens)
    speeds: dict[str, list[float]] = {"ours": [], "baseline": []}
    same = compared = 0
    for number in range(settings.rounds):
        texts = transcripts(settings.prompts, seed=number)
        ids = [[*template.prefix_ids, *transcript_ids(tokenizer, text), *template.suffix_ids] for text in texts]

        begun = time.perf_counter()
        plain = write_plainly(llm, ids[: settings.baseline_prompts], settings.max_new_tokens)
        seconds = time.perf_counter() - begun
        speeds["baseline"].append(tokens_of(plain, settings.max_new_tokens) / seconds)

        begun = time.perf_counter()
        longest_first = sorted(range(len(texts)), key=lambda i: (-len(ids[i]), i))
        prompts = [Prompt(i, instruction, ORDER, texts[i]) for i in longest_first]
        batches = [prompts[i : i + settings.batch_size] for i in range(0, len(prompts), settings.batch_size)]
        written = {
            w.key: w.ids or [] for batch in TransformersEngine(llm, tokenizer, decoding).write(batches) for w in batch
        }
        seconds = time.perf_counter() - begun
        speeds["ours"].append(tokens_of(list(written.values()), settings.max_new_tokens) / seconds)

        same += sum(written[i] == plain[i] for i in range(len(plain)))
        compared += len(plain)
    ours, baseline = (statistics.median(speeds[name]) for name in ("ours", "baseline"))
    return {
        "ratio": round(ours / baseline, 2),
        "tokens_per_second": round(ours, 1),
        "baseline_tokens_per_second": round(baseline, 1),
        "same_answers": round(same / compared, 3),
        "rounds": {name: [round(speed, 1) for speed in of_rounds] for name, of_rounds in speeds.items()},
        "batch_size": settings.batch_size,
        "threads": torch.get_num_threads(),
        "dtype": settings.dtype,
    }


if __name__ == "__main__":
    main()
