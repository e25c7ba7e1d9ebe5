"""Search for the token that an LLM should get at places without speech (`--filler` of `blsp train --loss embed-ctc`).

In: the LLM, and continuations that it wrote (`blsp continue`); no speech is needed.
Out: a line for each candidate, best first: how far the LLM's behaviour is from that on the plain transcript when its
tokens stand apart, as an adapter of 6.25 places a second would set them, with the candidate between them.
Where in the flow: before `blsp train --loss embed-ctc` with another LLM.

The gaps are drawn: as many places as 3.4 tokens a second leave free in English speech (Poisson, 0.84 after each token),
and a pause of two places at either end. `zeros` is a vector of zeros; `another transcript` is what an adapter that does
not listen can reach. A candidate must be one token.

Try: `python recipes/blsp-tiny/filler.py --llm embedded:smollm2-135m-instruct --data continued.jsonl`
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from rows import read_rows
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blsp.data.partners import partners
from blsp.distributed import find_runtime
from blsp.llm.decoding import Request, Result
from blsp.llm.language_model import embed
from blsp.llm.prefix import PrefixCache
from blsp.llm.prompt import prompt_template, text_ids, transcript_ids
from blsp.llm.teacher_forcing import answer_states, divergence
from blsp.model.loading import load_language_model
from blsp.weights.digest import find_weights

CANDIDATES = (" ", "\u00a0", "\n", " -", "...", ".", ",")
FREE_PLACES = 6.25 / 3.4 - 1  # after each token, on average
PAUSE = 2  # places before the first token and after the last


def spaced_out(tokens: Tensor, filler: Tensor, generator: np.random.Generator) -> Tensor:
    """Embeddings (U, D) at their places, the filler (D,) at the others: (S, D)."""
    gaps = generator.poisson(FREE_PLACES, len(tokens))
    gaps[-1] = PAUSE
    pieces = [filler.expand(PAUSE, -1)]
    for token, gap in zip(tokens, gaps.tolist(), strict=True):
        pieces += [token[None], filler.expand(gap, -1)]
    return torch.cat(pieces)


def measure(
    llm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict], candidates: Sequence[str]
) -> dict[str, float]:
    """Divergence from the text route in nats a token, by candidate, best first."""
    tokens = [embed(llm, transcript_ids(tokenizer, row["text"])) for row in rows]  # (U, D) each
    answers = [Result(row["continuation_ids"], row["finish"]) for row in rows]
    prefixes = PrefixCache(llm)

    def states(number: int, speech: Tensor) -> Tensor:
        frame = prompt_template(tokenizer, rows[number]["instruction"], rows[number]["order"])
        embeds = torch.cat([speech, embed(llm, list(frame.suffix_ids))])
        return answer_states(llm, [Request(number, embeds, prefixes.get(frame.prefix_ids))], [answers[number]])[0]

    text = [states(number, words) for number, words in enumerate(tokens)]

    def mean(speech_of: Callable[[int], Tensor]) -> float:
        nats = [divergence(llm, text[number], states(number, speech_of(number)))[0] for number in range(len(rows))]
        return float(np.mean(list(itertools.chain(*nats))))

    fillers = {"zeros": torch.zeros_like(tokens[0][0])}
    for candidate in candidates:
        ids = text_ids(tokenizer, candidate)
        if len(ids) == 1:
            fillers[repr(candidate)] = embed(llm, ids)[0]
        else:
            print(f"{candidate!r}: is {len(ids)} tokens of this LLM, left out")
    others = partners([row["text"] for row in rows])
    figures = {"another transcript": mean(lambda number: tokens[others[number]])}
    for name, filler in fillers.items():
        # every candidate gets the same gaps
        figures[name] = mean(lambda n, filler=filler: spaced_out(tokens[n], filler, np.random.default_rng(n)))
    return dict(sorted(figures.items(), key=lambda item: item[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--llm", required=True, help="folder, hub id or embedded:NAME")
    parser.add_argument("--data", type=Path, required=True, help="continuations that this LLM wrote")
    parser.add_argument("--limit", type=int, default=50, help="rows that are read")
    parser.add_argument("--candidates", nargs="+", default=CANDIDATES, help="texts of one token each")
    options = parser.parse_args()
    rows = [row for row in read_rows(options.data) if row.get("continuation_ids") and row["text"].strip()]
    rows = rows[: options.limit]
    if len({row["text"] for row in rows}) < 2:
        parser.error(f"--data {options.data}: needs two texts with continuation_ids (blsp continue --llm)")
    llm, tokenizer = load_language_model(find_weights(options.llm), find_runtime("auto", "auto"))
    with torch.no_grad():
        figures = measure(llm, tokenizer, rows, options.candidates)
    for name, nats in figures.items():
        print(f"{name:>20}  {nats:.3f} nats a token")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
