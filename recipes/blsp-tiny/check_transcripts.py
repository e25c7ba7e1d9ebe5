"""Comparison of each transcript with a recogniser's output, to find clips with a wrong transcript.

In: a manifest of the recipe and the weights of a small Whisper (faster-whisper). Out: `agreement.jsonl` in
the corpus folder: id, wer (Whisper's English normaliser), heard. Resumable: clips that are in the file are
not heard again.
Where in the flow: a side path after `fetch.py`; `recipes/blsp-tiny/make_clips.py` picks clips by it. A high
figure may be the recogniser's fault (accents, shouting): it says "look here", not "wrong".

Try: `python recipes/blsp-tiny/check_transcripts.py --root /tmp/corpus --manifest dev_fotaq.jsonl --model FOLDER`
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jiwer
import soundfile
from rows import read_rows
from tqdm import tqdm
from whisper_normalizer.english import EnglishTextNormalizer

AGREEMENT = "agreement.jsonl"


def read_agreement(root: Path) -> dict[str, float]:
    """Word error rate by clip id, of the clips that were heard."""
    path = root / AGREEMENT
    return {row["id"]: row["wer"] for row in read_rows(path)} if path.exists() else {}


def check(root: Path, rows: list[dict], model: str) -> None:
    from faster_whisper import WhisperModel

    recogniser = WhisperModel(model, device="cpu", compute_type="float32", cpu_threads=1)
    normalise = EnglishTextNormalizer()
    done = read_agreement(root)
    with (root / AGREEMENT).open("a", encoding="utf-8") as out:
        for row in tqdm([row for row in rows if row["id"] not in done]):
            samples, _ = soundfile.read(root / row["audio"], dtype="float32")
            segments, _ = recogniser.transcribe(samples, beam_size=1, without_timestamps=True, language="en")
            heard = " ".join(segment.text.strip() for segment in segments)
            wer = jiwer.wer(normalise(row["text"]) or "-", normalise(heard))
            out.write(json.dumps({"id": row["id"], "wer": round(wer, 4), "heard": heard}, ensure_ascii=False) + "\n")
            out.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="the corpus folder")
    parser.add_argument("--manifest", required=True, help="a manifest in it, e.g. train_fotaq.jsonl")
    parser.add_argument("--model", required=True, help="folder of a Whisper in CTranslate2's format")
    options = parser.parse_args()
    check(options.root, read_rows(options.root / options.manifest), options.model)


if __name__ == "__main__":
    main()
