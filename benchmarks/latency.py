"""Latency of an answer to a spoken question: by the adapter, through a cascade, and padded to 30 s.

In:  an adapter folder (default: the shipped one), real recordings joined to 1, 3, 10 and 30 s.
Out: one JSON object on the last line: seconds to the first token and to the whole answer, and ratios.
Try: `python -m benchmarks.latency --rounds 5` (some minutes on two quiet cores)
Flow: benchmarks/ — `make bench` gathers it into results/bench.json.

Time runs from the end of the question, with the samples in memory, to the LLM's first token. The cascade is
faster-whisper with the same Whisper on all cores (beam 1, no timestamps; int8 and float32, the faster one) and then
the same LLM with the same prompt and the same cached prefix. `padded` is the speech route with Whisper's default input:
silence up to 30 s, through the encoder and the adapter. `padded_encoder` cuts the encoder's output back to the clip, so
that the adapter does not compute the silence. All routes take turns on each clip, with the frozen weights in the same
format, by default that of `blsp chat`; medians are reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from faster_whisper import WhisperModel

from benchmarks.support.serving import SPEECH
from blsp.data.audio import SAMPLE_RATE, load_audio
from blsp.evaluation.recogniser import COMPUTE_TYPES, recogniser_of
from blsp.inference.listener import Listener, Question, decode_alone, load
from blsp.llm.decoding import Decoder
from blsp.model.adapter_parts import AudioEmbeds
from blsp.settings import DEFAULT_MODEL
from blsp.weights.embedded import resolve_weights

SECONDS = (1, 3, 10, 30)
INSTRUCTION = "Answer the following question in one short sentence:"
NEW_TOKENS = 32
Waits = tuple[float, float]  # seconds to the first token, to the last
Ask = Callable[[np.ndarray], Waits]


def clip_of(seconds: int) -> np.ndarray:
    """Real speech of exactly this length."""
    lines = (SPEECH / "train.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    speech = np.concatenate([load_audio(SPEECH / json.loads(line)["audio"]) for line in lines])
    return speech[: seconds * SAMPLE_RATE]


def answer(listener: Listener, question: Question, audio_embeds: AudioEmbeds | None, start: float) -> Waits:
    """Seconds since `start` at the first token and at the last; the prompt's prefix is cached."""
    request = listener.request(0, question, audio_embeds, replace(listener.decoding, max_new_tokens=NEW_TOKENS))
    times = [time.monotonic() - start for _ in decode_alone(Decoder(listener.model), request)]
    return times[0], times[-1]


def by_speech(listener: Listener, *, window: int = 0, full_window: bool = False) -> Ask:
    """window: pad every clip with silence to so many samples. full_window: pad the encoder's input alone."""

    def ask(clip: np.ndarray) -> Waits:
        start = time.monotonic()
        listener.model.config.full_window = full_window
        (clip_embeds,) = listener.embed_audio([np.pad(clip, (0, max(window - len(clip), 0)))])
        listener.model.config.full_window = False
        return answer(listener, Question(instruction=INSTRUCTION), clip_embeds, start)

    return ask


def by_cascade(listener: Listener, folder: str, compute: str, threads: int) -> Ask:
    recogniser = WhisperModel(folder, device="cpu", compute_type=compute, cpu_threads=threads)
    options = {"language": "en", "beam_size": 1, "temperature": 0.0, "without_timestamps": True}

    def ask(clip: np.ndarray) -> Waits:
        start = time.monotonic()
        segments, _ = recogniser.transcribe(clip, condition_on_previous_text=False, **options)
        text = " ".join(segment.text.strip() for segment in segments).strip()
        torch.set_num_threads(threads)
        return answer(listener, Question(instruction=INSTRUCTION, text=text or "."), None, start)

    return ask


def measure(model: str, dtype: str, rounds: int, lengths: Sequence[int]) -> dict[str, Any]:
    threads = torch.get_num_threads()  # before CTranslate2 sets this thread's own
    listener = load(model, dtype=dtype)
    folder = resolve_weights(recogniser_of(listener.model.config.audio_model_id))
    routes: dict[str, Ask] = {
        "speech": by_speech(listener),
        "padded": by_speech(listener, window=30 * SAMPLE_RATE),
        "padded_encoder": by_speech(listener, full_window=True),
    }
    routes |= {f"cascade_{kind}": by_cascade(listener, folder, kind, threads) for kind in COMPUTE_TYPES}
    torch.set_num_threads(threads)
    by_length = {f"{seconds}s": measure_length(routes, clip_of(seconds), rounds) for seconds in lengths}
    ratios = ("first_token_vs_cascade", "first_token_vs_padded", "first_token_vs_padded_encoder")
    return {f"{name}_{length}": figures[name] for length, figures in by_length.items() for name in ratios} | {
        "by_length": by_length,
        "rounds": rounds,
        "threads": threads,
        "dtype": str(listener.model.lm_head.weight.dtype).removeprefix("torch."),
    }


def measure_length(routes: dict[str, Ask], clip: np.ndarray, rounds: int) -> dict[str, Any]:
    """Median seconds of every route on one clip, and how many times faster the speech route is."""
    for ask in routes.values():
        ask(clip)  # the warm-up
    waits: dict[str, list[Waits]] = {name: [] for name in routes}
    for _ in range(rounds):
        for name, ask in routes.items():
            waits[name].append(ask(clip))
    medians = {
        name: [round(statistics.median(times), 3) for times in zip(*pairs, strict=True)]
        for name, pairs in waits.items()
    }
    first = {name: times[0] for name, times in medians.items()}
    cascade = min(first[f"cascade_{kind}"] for kind in COMPUTE_TYPES)
    return {
        "first_token_s": first,
        "whole_answer_s": {name: times[1] for name, times in medians.items()},
        "first_token_vs_cascade": round(cascade / first["speech"], 2),
        "first_token_vs_padded": round(first["padded"] / first["speech"], 2),
        "first_token_vs_padded_encoder": round(first["padded_encoder"] / first["speech"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default="fastest", help="of the frozen weights, on all routes")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=int, nargs="*", default=SECONDS, help="of speech")
    options = parser.parse_args()
    print(json.dumps(measure(options.model, options.dtype, options.rounds, options.seconds)))


if __name__ == "__main__":
    main()
