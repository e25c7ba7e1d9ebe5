"""Benchmark of the server under load: throughput, waiting, mixed-up answers, refusals, memory.

In:  an adapter folder (default: the shipped one) and the recordings in `examples/speech`.
Out: one JSON object on the last line.
Try: `python -m benchmarks.serve_load --share 0.05` (a twentieth); `make bench-serve` runs it whole.
Flow: support/serving.py (server and clients) → **serve_load.py**

Every question is first asked alone, by the library, which also gives the margin between the best two tokens of each
step. In a batch the answer must be the same, up to the first step with a margin below 1e-3: other batch shapes round
differently there, and greedy decoding may take either token. Any other answer counts as `crossed`. There are more
than twice as many questions as the server keeps key/values of, so that no answer comes from its cache.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.support.serving import Served, Server, crowd, recordings, serving, spoken_question
from blsp.inference.conversation import Memory, lay_out, request_for, user_turn
from blsp.inference.listener import Listener, decode_alone, load
from blsp.llm.decoding import Decoder, answer_text
from blsp.settings import DEFAULT_MODEL

INSTRUCTIONS = ("Please repeat the following words:", "Answer the following:", "Continue the following text:")
QUESTIONS = 70
NEW_TOKENS = (8, 16, 24, 32)  # of the questions, in rotation: rows join and leave at different times
CLIENTS = (1, 4, 16, 64)
TIE = 1e-3  # nats between the best two tokens


@dataclass(frozen=True)
class Alone:
    """An answer without a batch: its text, and the part of it before the first tie."""

    text: str
    decided: str

    def agrees(self, text: str) -> bool:
        return text == self.text or (self.decided != self.text and text.startswith(self.decided))


def answer_alone(listener: Listener, wav: bytes, instruction: str, new_tokens: int) -> Alone:
    """One answer by the library, greedily, with the margins of its steps."""
    (embeds,) = listener.embed_audio([wav])
    if not embeds.speech:
        sentence = listener.model.config.no_speech_sentence
        return Alone(sentence, sentence)
    laid = lay_out(listener, [user_turn([f"{instruction}\n", embeds])])
    decoding = replace(listener.decoding, max_new_tokens=new_tokens, top_k_logprobs=2)
    request = request_for(listener, 0, laid, decoding, Memory(1))
    ids: list[int] = []
    decided: int | None = None
    for event in decode_alone(Decoder(listener.model), request):
        assert event.top_logp is not None
        if decided is None and float(event.top_logp[0] - event.top_logp[1]) < TIE:
            decided = len(ids)
        if event.finish != "stop":
            ids.append(event.token)
    whole = answer_text(listener.tokenizer, ids).strip()
    return Alone(whole, whole if decided is None else answer_text(listener.tokenizer, ids[:decided]).strip())


def throughput(
    server: Server, questions: Sequence[Any], clients: int, requests: int
) -> tuple[dict[str, Any], list[Served]]:
    """Requests and tokens per second, and the time to the first token."""
    began = time.monotonic()
    served = asyncio.run(crowd(server.url, questions, clients, requests, NEW_TOKENS))
    seconds = time.monotonic() - began
    good = [answer for answer in served if answer.status == 200]
    waits = sorted(answer.first for answer in good)
    figures = {
        "requests_per_second": round(len(good) / seconds, 3),
        "tokens_per_second": round(sum(answer.tokens for answer in good) / seconds, 1),
        "first_token_median_s": round(statistics.median(waits), 3),
        "first_token_p95_s": round(waits[int(0.95 * (len(waits) - 1))], 3),
        "requests": requests,
        "failed": len(served) - len(good),
    }
    return figures, good


def refusals(model: str, questions: Sequence[Any]) -> dict[str, Any]:
    """48 requests where 4 run and 8 may wait: the others get status 429 and a time to try again."""
    with serving(["--model", model, "--max-batch", "4", "--queue", "8"]) as server:
        served = asyncio.run(crowd(server.url, questions, 48, 48, NEW_TOKENS))
    refused = [answer for answer in served if answer.status == 429]
    return {
        "answered": sum(answer.status == 200 for answer in served),
        "turned_away": len(refused),
        "with_retry_after": sum(answer.retry_after for answer in refused),
        "other": sum(answer.status not in (200, 429) for answer in served),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--share", type=float, default=1.0, help="the part of the requests to send")
    options = parser.parse_args()
    clips = recordings(QUESTIONS)
    wordings = [INSTRUCTIONS[number % len(INSTRUCTIONS)] for number in range(QUESTIONS)]
    questions = [spoken_question(clip, words) for clip, words in zip(clips, wordings, strict=True)]
    listener = load(options.model)
    alone = [
        answer_alone(listener, clip, words, NEW_TOKENS[number % len(NEW_TOKENS)])
        for number, (clip, words) in enumerate(zip(clips, wordings, strict=True))
    ]
    del listener
    figures: dict[str, Any] = {"clients": {}}
    good: list[Served] = []
    with serving(["--model", options.model]) as server:
        for clients in CLIENTS:
            requests = max(clients, round(options.share * (48 if clients == 1 else 200)))
            figures["clients"][clients], more = throughput(server, questions, clients, requests)
            good += more
            print(clients, json.dumps(figures["clients"][clients]), flush=True)
        half, resident = round(options.share * 1000), [server.memory_mb()]
        for _ in range(2):
            _, more = throughput(server, questions, 16, half)
            good += more
            resident.append(server.memory_mb())
        figures["memory"] = {"requests": 2 * half, "resident_mb": [round(megabytes, 1) for megabytes in resident]}
    one = figures["clients"][1]["requests_per_second"]
    figures["ratio"] = {
        n: round(measured["requests_per_second"] / one, 2) for n, measured in figures["clients"].items()
    }
    figures["compared"] = len(good)
    other = [answer for answer in good if answer.text.strip() != alone[answer.question].text]
    figures["crossed"] = sum(not alone[answer.question].agrees(answer.text.strip()) for answer in other)
    figures["diverged_at_a_tie"] = len(other) - figures["crossed"]
    figures["past_the_queue"] = refusals(options.model, questions)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
