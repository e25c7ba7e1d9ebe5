"""Make the clips of examples/speech: real recordings for the tour, as 16 kHz Ogg Opus, from the recipe's corpus
folder.

In: a corpus folder that `python recipes/blsp-tiny/fetch.py --root C` has filled. Out, in examples/speech:
`fotaq/*.opus`, `asterisk/*.opus` and the manifests `train.jsonl`, `heldout.jsonl`, `asterisk.jsonl`.
Where in the flow: before everything, once; the clips are committed, so that the tour needs no download.

    python recipes/blsp-tiny/make_clips.py --root C            # the audio of the manifests as they are
    python recipes/blsp-tiny/make_clips.py --root C --choose   # choose anew first (needs C/agreement.jsonl)
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import soundfile
from check_transcripts import read_agreement
from rows import fraction, read_rows, write_rows

SPEECH = Path(__file__).parents[2] / "examples" / "speech"
SECONDS = (1.5, 8.0)
PROMPT_SECONDS = (0.8, 8.0)  # the telephone prompts outside the judged part are short
SIZES = {"train": 130, "heldout": 30, "asterisk": 40}
AGREES = 0.15  # word error rate of Whisper tiny.en up to which a script counts as what is said
HERO_SHARE = 1 / 3
COMPRESSION = 0.93  # libsndfile's scale for Opus; about 30 kbit/s here
READABLE = re.compile(r"[\w ,.'?-]+").fullmatch  # no "press * to": is it said "star" or "asterisk"?
KEPT = ("id", "audio", "text", "language", "speaker", "seconds", "source", "licence")


def choose(root: Path) -> Iterator[tuple[str, list[dict]]]:
    """The three lists: fotaq's training and development parts, prompts other than the judged ones."""
    heard = read_agreement(root)
    for name, manifest in (("train", "train_fotaq"), ("heldout", "dev_fotaq")):
        rows = [row for row in read_rows(root / f"{manifest}.jsonl") if heard.get(row["id"], 1.0) <= AGREES]
        yield name, spread(suitable(rows), SIZES[name])
    prompts = [row for row in read_rows(root / "asterisk_en.jsonl") if row["split"] == "look" and READABLE(row["text"])]
    yield "asterisk", spread(suitable(prompts, PROMPT_SECONDS, fewest_words=2), SIZES["asterisk"])


def suitable(rows: Iterable[dict], seconds: tuple[float, float] = SECONDS, fewest_words: int = 4) -> list[dict]:
    """Neither very short nor long, every text once."""
    unique = {row["text"].lower(): row for row in rows if seconds[0] <= row["seconds"] <= seconds[1]}
    return [row for row in unique.values() if len(row["text"].split()) >= fewest_words]


def spread(rows: list[dict], size: int) -> list[dict]:
    """`size` rows in a fixed random order; no speaker of several has more than a third."""
    one_speaker = len({row["speaker"] for row in rows}) == 1
    taken: list[dict] = []
    count: Counter[str] = Counter()
    for row in sorted(rows, key=lambda row: fraction("clip", row["id"])):
        if len(taken) < size and (one_speaker or count[row["speaker"]] + 1 <= size * HERO_SHARE):
            taken.append(row)
            count[row["speaker"]] += 1
    if len(taken) < size:
        raise SystemExit(f"only {len(taken)} of {size} clips: hear more of the corpus with check_transcripts.py")
    return sorted(taken, key=lambda row: row["id"])


def write_manifest(name: str, rows: list[dict]) -> None:
    folder = "asterisk" if name == "asterisk" else "fotaq"
    named = [row | {"audio": f"{folder}/{row['id'].split('/')[-1]}.opus"} for row in rows]
    write_rows(SPEECH / f"{name}.jsonl", ({key: row[key] for key in KEPT} for row in named))


def encode(root: Path, name: str) -> int:
    """Encode the clips of one manifest; returns the bytes written."""
    size = 0
    for row in read_rows(SPEECH / f"{name}.jsonl"):
        samples, rate = soundfile.read(root / "audio" / f"{row['id']}.flac")
        target = SPEECH / row["audio"]
        target.parent.mkdir(exist_ok=True)
        soundfile.write(target, samples, rate, format="OGG", subtype="OPUS", compression_level=COMPRESSION)
        size += target.stat().st_size
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--root", type=Path, required=True, help="the corpus folder that recipes/blsp-tiny/fetch.py filled"
    )
    parser.add_argument("--choose", action="store_true", help="choose the clips anew instead of taking the manifests")
    options = parser.parse_args()
    for name, rows in choose(options.root) if options.choose else ():
        write_manifest(name, rows)
    for name in SIZES:
        rows = read_rows(SPEECH / f"{name}.jsonl")
        size = encode(options.root, name)
        speakers = len({row["speaker"] for row in rows})
        minutes = sum(row["seconds"] for row in rows) / 60
        print(f"{name}: {len(rows)} clips, {minutes:.1f} min, {speakers} speakers, {size} B")


if __name__ == "__main__":
    main()
