"""Synthesise the recipe's sentences with one engine, in parallel, and write the manifest of the finished clips.

In: the plan of `lines.py`. Out, under `--root`: `audio/<engine>/xx/….flac` (16 kHz) and
`train_<engine>.jsonl`.
Where in the flow: after `fetch.py`, before `blsp encode`. Kill it at any moment: a clip that exists is
whole, and the next run makes the others. The same seed gives the same lines, voices, tempos and pitches.

Try: `python recipes/blsp-tiny/synthesise.py --root /tmp/corpus --engine flite --hours 0.1`
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import soundfile
from containers import RATE, write_flac
from engines import SPEAK, fetch_voices
from lines import LICENCES, Line, plan
from rows import summary, write_rows
from tqdm import tqdm

CHUNK = 40  # lines a worker takes at a time: a Kokoro chunk is two minutes' work, a flite chunk two seconds'
SPEECH_RATE = 13.5  # characters a second: how many lines make the hours asked for
FESTVOX = "BSD-4-Clause-like (Festvox)"
VOICE_LICENCE = {
    "flite": FESTVOX, "words": FESTVOX, "quiz": FESTVOX, "piper": "CC0-1.0", "kokoro": "Apache-2.0",
    "kokoro_quiz": "Apache-2.0", "kokoro_romance": "Apache-2.0", "pico": "Apache-2.0",
}  # fmt: skip


def lines_for(engine: str, seed: int, hours: float) -> list[Line]:
    """The beginning of the engine's plan that fills `hours` at the usual rate of speech."""
    chosen, left = [], hours * 3600 * SPEECH_RATE
    for line in plan(engine, seed):
        if left <= 0:
            break
        chosen.append(line)
        left -= len(line.text) / line.tempo
    return chosen


def audio_path(root: Path, line: Line) -> Path:
    return root / "audio" / f"{line.id}.flac"


def speak_chunk(engine: str, root: Path, chunk: list[Line]) -> int:
    """Make the clips of `chunk`; returns how many lines it held."""
    for line, samples in SPEAK[engine](chunk, root):
        write_flac(audio_path(root, line), samples)
    return len(chunk)


def synthesise(engine: str, root: Path, lines: list[Line], jobs: int) -> None:
    """Make what is missing."""
    chunks = [lines[i : i + CHUNK] for i in range(0, len(lines), CHUNK)]
    chunks = [chunk for chunk in chunks if not all(audio_path(root, line).exists() for line in chunk)]
    fetch_voices(engine, root)
    with multiprocessing.get_context("spawn").Pool(jobs) as pool, tqdm(total=sum(map(len, chunks)), desc=engine) as bar:
        for count in pool.imap_unordered(partial(speak_chunk, engine, root), chunks):
            bar.update(count)


def finished_rows(engine: str, root: Path, lines: list[Line], shortest: float = 0.3) -> Iterator[dict]:
    """Rows of the clips that exist; what an engine could not say at all (under 0.3 s) is left out."""
    for line in lines:
        path = audio_path(root, line)
        if not path.exists():
            continue
        seconds = soundfile.info(path).frames / RATE
        if seconds >= shortest:
            yield {
                "id": line.id,
                "audio": path.relative_to(root).as_posix(),
                "text": line.text,
                "language": line.language,
                "speaker": f"{engine}-{line.voice}",
                "seconds": round(seconds, 3),
                "source": f"{engine}/{line.list_name}",
                "licence": f"voice {VOICE_LICENCE[engine]}; text {LICENCES[line.list_name]}",
                "tempo": line.tempo,
                "pitch": line.pitch,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="the corpus folder")
    parser.add_argument("--engine", choices=sorted(SPEAK), required=True)
    parser.add_argument("--hours", type=float, required=True, help="about how much speech to make")
    parser.add_argument("--jobs", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--manifest-only", action="store_true", help="write the manifest of what is there, and leave")
    options = parser.parse_args()
    lines = lines_for(options.engine, options.seed, options.hours)
    if not options.manifest_only:
        synthesise(options.engine, options.root, lines, options.jobs)
    rows = list(finished_rows(options.engine, options.root, lines))
    write_rows(options.root / f"train_{options.engine}.jsonl", rows)
    print(summary(f"train_{options.engine}", rows))


if __name__ == "__main__":
    main()
