"""How long a spoken question waits for its answer: by the adapter, through a cascade, and padded to 30 s.

In:  an adapter folder (default: the shipped one), real recordings joined to 1, 3, 10 and 30 s.
Out: one JSON object on the last line: seconds to the first token and to the whole answer, and ratios.
Try: `python -m benchmarks.latency --rounds 5` (some minutes on two quiet cores)
Flow: benchmarks/ — `make bench` gathers it into results/bench.json.

Time runs from the end of the question, with samples in memory, to the first token of the LLM. The cascade is
faster-whisper with the same Whisper on all cores (beam 1, no timestamps; int8 and float32, the faster one) and then
the same LLM with the same prompt and the same kept prefix. `padded` is the speech route as Whisper's feature extractor
feeds it unless told otherwise: silence up to 30 s, through the encoder and the adapter. `padded_encoder` cuts the
encoder's output back to the clip, so that the adapter is spared. All routes take turns on each clip, with the frozen
weights in the same format, by default that of `blsp chat`; medians are reported.
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
from blsp.inference.listener import Listener, Question, load, written
from blsp.llm.decoding import Decoder
from blsp.model.adapter_parts import AudioEmbeds
from blsp.settings import DEFAULT_MODEL
from blsp.weights.embedded import resolve_weights

SECONDS = (1, 3, 10, 30)
INSTRUCTION = "Answer the following question in one short sentence:"
NEW_TOKENS = 32
Ask = Callable[[np.ndarray], "Waited"]
Waited = tuple[float, float]  # seconds to the first token, to the last


def clip_of(seconds: int) -> np.ndarray:
    """Real speech of exactly this length."""
    lines = (SPEECH / "train.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    sound = np.concatenate([load_audio(SPEECH / json.loads(line)["audio"]) for line in lines])
    return sound[: seconds * SAMPLE_RATE]


def answer(listener: Listener, question: Question, heard: AudioEmbeds | None, began: float) -> Waited:
    """Seconds since `began` at the first token and at the last; the prompt's prefix is kept from before."""
    request = listener.request(0, question, heard, replace(listener.decoding, max_new_tokens=NEW_TOKENS))
    times = [time.monotonic() - began for _ in written(Decoder(listener.model), request)]
    return times[0], times[-1]


def by_speech(listener: Listener, *, window: int = 0, full_window: bool = False) -> Ask:
    """window: samples that a clip is filled up to with silence; full_window: the encoder's input alone is."""

    def ask(clip: np.ndarray) -> Waited:
        began = time.monotonic()
        listener.model.config.full_window = full_window
        (heard,) = listener.embed_audio([np.pad(clip, (0, max(window - len(clip), 0)))])
        listener.model.config.full_window = False
        return answer(listener, Question(instruction=INSTRUCTION), heard, began)

    return ask


def by_cascade(listener: Listener, folder: str, compute: str, threads: int) -> Ask:
    recogniser = WhisperModel(folder, device="cpu", compute_type=compute, cpu_threads=threads)
    options = {"language": "en", "beam_size": 1, "temperature": 0.0, "without_timestamps": True}

    def ask(clip: np.ndarray) -> Waited:
        began = time.monotonic()
        segments, _ = recogniser.transcribe(clip, condition_on_previous_text=False, **options)
        text = " ".join(segment.text.strip() for segment in segments).strip()
        torch.set_num_threads(threads)
        return answer(listener, Question(instruction=INSTRUCTION, text=text or "."), None, began)

    return ask


def measure(model: str, dtype: str, rounds: int, lengths: Sequence[int]) -> dict[str, Any]:
    threads = torch.get_num_threads()  # before CTranslate2 sets this thread's own
    listener = load(model, dtype=dtype)
    folder = resolve_weights(recogniser_of(listener.model.config.audio_model_id))
    ways: dict[str, Ask] = {
        "speech": by_speech(listener),
        "padded": by_speech(listener, window=30 * SAMPLE_RATE),
        "padded_encoder": by_speech(listener, full_window=True),
    }
    ways |= {f"cascade_{kind}": by_cascade(listener, folder, kind, threads) for kind in COMPUTE_TYPES}
    torch.set_num_threads(threads)
    found: dict[str, Any] = {}
    for seconds in lengths:
        clip = clip_of(seconds)
        waits: dict[str, list[Waited]] = {name: [] for name in ways}
        for ask in ways.values():
            ask(clip)  # the warm-up
        for _ in range(rounds):
            for name, ask in ways.items():
                waits[name].append(ask(clip))
        medians = {
            name: [round(statistics.median(each), 3) for each in zip(*w, strict=True)]
            for name, w in waits.items()
        }
        cascade = min((medians[f"cascade_{kind}"] for kind in COMPUTE_TYPES), key=lambda each: each[0])
        found[f"{seconds}s"] = {
            "first_token_s": {name: each[0] for name, each in medians.items()},
            "whole_answer_s": {name: each[1] for name, each in medians.items()},
            "first_token_vs_cascade": round(cascade[0] / medians["speech"][0], 2),
            "first_token_vs_padded": round(medians["padded"][0] / medians["speech"][0], 2),
            "first_token_vs_padded_encoder": round(medians["padded_encoder"][0] / medians["speech"][0], 2),
        }
    other = ("first_token_vs_cascade", "first_token_vs_padded", "first_token_vs_padded_encoder")
    return {f"{name}_{length}": each[name] for length, each in found.items() for name in other} | {
        "by_length": found,
        "rounds": rounds,
        "threads": threads,
        "dtype": str(listener.model.lm_head.weight.dtype).removeprefix("torch."),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default="fastest", help="of the frozen weights, on all routes")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=int, nargs="*", default=SECONDS, help="of speech")
    options = parser.parse_args()
    print(json.dumps(measure(options.model, options.dtype, options.rounds, options.seconds)))


if __name__ == "__main__":
    main()
