"""Error of word times and of subtitle borders, against speech whose word times are known.

In:  an adapter that reads out (default: the shipped one); transcripts of examples/speech; flite (Debian: apt install
     flite), which says when each of its phones ends.
Out: one JSON object on the last line: seconds between what was found and what is true, medians and 90th percentiles.
Try: `python -m benchmarks.word_times`
Flow: benchmarks/ — `make bench` gathers it into results/bench.json.

flite prints phones, not words: a word has as many phones as it has when it is spoken alone. Sentences in which that
does not come out (a word is reduced) are left out. The sentences are joined, with pauses of 0.3 to 1.5 s, to recordings
of about a minute, which are transcribed as `blsp transcribe` does. A found word counts where it stands in the longest
common part of what was said and what was heard. A cue's borders are compared with the beginning of its first word and
the end of its last. `noise`: the same with white noise, 10 dB below the speech.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.support.serving import SPEECH
from blsp.data.audio import SAMPLE_RATE, load_audio
from blsp.inference.listener import Listener, load
from blsp.inference.transcript import Transcript, transcripts
from blsp.inference.word_times import Word
from blsp.settings import DEFAULT_MODEL

VOICES = ("slt", "rms", "awb", "kal16")
MANIFESTS = ("asterisk.jsonl", "heldout.jsonl")  # not learnt from by the shipped adapter
SENTENCES = 12  # in a recording
NOISE_DB = 10


@functools.cache
def phones_of(voice: str, word: str) -> int:
    return sum(phone != "pau" for phone in flite("-voice", voice, "-ps", "-t", word, "-o", "none"))


def flite(*arguments: str) -> list[str]:
    return subprocess.run(["flite", *arguments], check=True, capture_output=True, text=True).stdout.split()


def speak(voice: str, text: str) -> tuple[np.ndarray, list[Word]] | None:
    """The samples of a sentence and its words; None where phones and words do not come out."""
    with tempfile.TemporaryDirectory() as folder:
        wav = Path(folder) / "spoken.wav"
        printed = [entry.rsplit(":", 1) for entry in flite("-voice", voice, "-psdur", "-t", text, "-o", str(wav))]
        audio = load_audio(wav)
    ends = [float(end) for _, end in printed]
    phones = [(start, end) for (name, _), start, end in zip(printed, [0.0, *ends], ends, strict=False) if name != "pau"]
    words = []
    for word in text.split():
        own, phones = phones[: (count := phones_of(voice, re.sub(r"[^\w']", "", word)))], phones[count:]
        if not own:
            return None
        words.append(Word(word, own[0][0], own[-1][1]))
    return None if phones else (audio, words)


def sentences() -> list[str]:
    rows = [json.loads(line) for name in MANIFESTS for line in (SPEECH / name).read_text().splitlines()]
    return [row["text"] for row in rows if 4 <= len(row["text"].split()) <= 25 and not re.search(r"\d", row["text"])]


def recordings(most: int) -> list[tuple[np.ndarray, list[Word]]]:
    """Sentences joined with pauses, and their words in the time of the whole."""
    pauses = np.random.default_rng(0)
    made: list[tuple[np.ndarray, list[Word]]] = []
    for number, text in enumerate(sentences()[:most]):
        spoken = speak(VOICES[number % len(VOICES)], text)
        if spoken is None:
            continue
        if number % SENTENCES == 0 or not made:
            made.append((np.zeros(0, np.float32), []))
        audio, words = made[-1]
        offset = len(audio) / SAMPLE_RATE
        words += [Word(word.text, offset + word.start, offset + word.end) for word in spoken[1]]
        silence = np.zeros(int(pauses.uniform(0.3, 1.5) * SAMPLE_RATE), np.float32)
        made[-1] = (np.concatenate([audio, spoken[0], silence]), words)
    return made


def errors(found: Transcript, words: list[Word]) -> dict[str, list[float]]:
    """Seconds between the times of words and cues, and the true ones."""
    heard = [word for segment in found.segments for word in segment.words]
    matcher = difflib.SequenceMatcher(None, [plain(word) for word in words], [plain(word) for word in heard], False)
    true = {id(heard[b + i]): words[a + i] for a, b, size in matcher.get_matching_blocks() for i in range(size)}
    cues = [(segment.words[0], segment.words[-1]) for segment in found.segments]
    return {
        "word_start": [abs(word.start - true[id(word)].start) for word in heard if id(word) in true],
        "word_end": [abs(word.end - true[id(word)].end) for word in heard if id(word) in true],
        "cue_border": [abs(first.start - true[id(first)].start) for first, _ in cues if id(first) in true]
        + [abs(last.end - true[id(last)].end) for _, last in cues if id(last) in true],
    }


def plain(word: Word) -> str:
    return re.sub(r"\W", "", word.text).casefold()


def measure(model: str, most: int) -> dict[str, Any]:
    listener = load(model)
    made = recordings(most)
    figures = figures_of(listener, made)
    generator = np.random.default_rng(1)
    noisy = []
    for audio, words in made:
        scale = np.sqrt(np.square(audio).mean()) * 10 ** (-NOISE_DB / 20)
        noisy.append((audio + generator.normal(scale=scale, size=len(audio)).astype(np.float32), words))
    return figures | {"noise": figures_of(listener, noisy)}


def figures_of(listener: Listener, made: list[tuple[np.ndarray, list[Word]]]) -> dict[str, Any]:
    gathered: dict[str, list[float]] = {}
    for found, (_, words) in zip(
        transcripts(listener, [audio for audio, _ in made], timestamps=True), made, strict=True
    ):
        for name, values in errors(found, words).items():
            gathered.setdefault(name, []).extend(values)
    figures: dict[str, Any] = {"seconds": round(sum(len(audio) for audio, _ in made) / SAMPLE_RATE, 1)}
    figures["words"] = sum(len(words) for _, words in made)
    for name, values in gathered.items():
        figures |= {
            f"{name}_n": len(values),
            f"{name}_median_s": round(float(np.median(values)), 3),
            f"{name}_p90_s": round(float(np.percentile(values, 90)), 3),
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--most", type=int, default=1000, help="sentences")
    options = parser.parse_args()
    print(json.dumps(measure(options.model, options.most)))


if __name__ == "__main__":
    main()
