"""Speak the tour's five questions: of the evaluation half, in voices that no adapter of ours is trained on.

In: the corpus folder (the Kokoro voices are fetched into it). Out: `questions/*.opus` and
`questions.jsonl`, whose rows have the expected answer in `reference` and every accepted spelling in
`references`.
Where in the flow: beside `make_clips.py`, once; the clips are committed.

Try: `python recipes/blsp-tiny/make_questions.py --root /tmp/corpus`
"""

from __future__ import annotations

import argparse
from pathlib import Path

import soundfile
from containers import RATE
from engines import speak_kokoro
from lines import Line
from make_clips import COMPRESSION
from rows import write_rows

SPEECH = Path(__file__).parents[2] / "examples" / "speech"
QUESTIONS = (
    ("capital-of-canada", "What is the capital of Canada?", ("Ottawa",), "af_nova"),
    ("month-after-april", "What month comes after April?", ("May",), "am_eric"),
    ("opposite-of-fast", "What is the opposite of fast?", ("slow",), "bf_lily"),
    ("language-of-mexico", "What language do people speak in Mexico?", ("Spanish",), "bm_fable"),
    ("pull-to-the-ground", "What force pulls things to the ground?", ("gravity",), "af_sky"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="the corpus folder; the voices are fetched into it")
    options = parser.parse_args()
    lines = [Line(name, text, "tour", voice, 1.0, 1.0, 0.0) for name, text, _, voice in QUESTIONS]
    rows = []
    (SPEECH / "questions").mkdir(exist_ok=True)
    for (name, text, answers, voice), (_, samples) in zip(QUESTIONS, speak_kokoro(lines, options.root), strict=True):
        audio = f"questions/{name}.opus"
        soundfile.write(
            SPEECH / audio, samples, RATE, format="OGG", subtype="OPUS", compression_level=COMPRESSION
        )  # fmt: skip
        row = {"id": f"questions/{name}", "audio": audio, "text": text, "language": "en", "speaker": f"kokoro-{voice}"}
        row |= {"seconds": round(len(samples) / RATE, 3), "source": "kokoro/tour", "licence": "voice Apache-2.0"}
        rows.append(row | {"reference": answers[0], "references": list(answers)})
    write_rows(SPEECH / "questions.jsonl", rows)


if __name__ == "__main__":
    main()
