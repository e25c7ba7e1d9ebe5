"""Fetch the real recordings, pair them with their transcripts, write 16 kHz FLAC files and manifests.

In: Debian packages (downloaded with apt, checked by SHA-256) and the transcript lists under `texts/`.
Out, under `--root`: `audio/<source>/…flac`; `train_fotaq.jsonl` and `dev_fotaq.jsonl` (to learn from and to
choose recipes by); `eval_*.jsonl` (held out, never trained on); `music.jsonl` (for the no-speech class).
Where in the flow: first step of the recipe, before `synthesise.py`. Sources already written are not made
again.

Try: `python recipes/blsp-tiny/fetch.py --root /tmp/corpus` (`--source fillets_cs` or `--source all` for more)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from containers import RATE, decode, read_als, read_g722, read_queen, write_flac
from heldout import SHORTEST, TEXTS, HeldOut, read_list, words
from packages import file_digest, tree_digest, unpack_debian, verify
from rows import fraction, read_rows, summary, write_rows

QUEEN_SHA256 = "cc91960d133fcd4173eda4bac304e80d2bbdbaa085640287ab9e0507bd603f67"
DRASCULA_SHA256 = "4ad7c24b2e642e1406fddee729159c6dfc6b1563a33bd7e421f85c4a1bd567b8"
G722_SHA256 = {
    "en": "4e2275e9973ad8c8eb1f28345e5ce8ead49f1a7dc804ef8561d20f7e8100a827",
    "es": "697f2e59367dccd546c784310445583bfd88d77cd45783794eb634d284c80005",
    "fr": "89226a7aaf701235ee81c159fa66bad8de01dfcebf0b25ab67e438664c56114e",
    "it": "b35cc3abc7cc7ff1c10ffd095ee3d7da95bbd0a962f53123b675fa4c23f5ed55",
    "ru": "a256061baae5f19d0634083919246e1904609fbd63110009cd1a132a39a2a6c6",
}
FILLETS_SHA256 = {
    "cs": "4e81bcc791f856123aca8caae1bd7444a9cdd61d8bab2147bce0a199ac7085d7",
    "nl": "7007fa376e0ed18d86f917b2500eb29769fae3bdeed7f80b4619e5fe1cb26d54",
}
MUSIC_SHA256 = "4e49fab4b95952abc81a26749ecfc806ebaccaa71bb2a8b40ddd1f76429c990a"
EVAL_MUSIC = frozenset({"macroform-robot_dity", "reno_project-system"})  # for the judge; the other three to learn from
LICENCE = {
    "fotaq": "Flight-of-the-Amazon-Queen-License",
    "drascula": "Drascula-License",
    "asterisk_en": "CC-BY-SA-3.0",
    "asterisk_es": "CC-BY-SA-3.0",
    "asterisk_fr": "CC-BY-SA-3.0",
    "asterisk_it": "CC-BY-3.0",
    "asterisk_ru": "CC-BY-3.0",
    "fillets_cs": "GPL-2.0-or-later",
    "fillets_nl": "GPL-2.0-or-later",
    "music": "CC-BY-SA-3.0",
}
HERO = "JOE"  # speaks two fifths of fotaq; at most a third of what is trained on
DEV_SPEAKERS = frozenset({"IAN", "CHEF", "LOLA", "PRIN"})  # heard only when recipes are compared
DEV_SHARE = 0.015  # of the other speakers' lines, too


def fetch_fotaq(root: Path) -> list[dict]:
    folder = unpack_debian("flight-of-the-amazon-queen", root) / "usr/share/scummvm/flight-of-the-amazon-queen"
    verify("queen.1c", file_digest(folder / "queen.1c"), QUEEN_SHA256)
    clips = dict(read_queen(folder / "queen.1c"))
    rows = [
        _row("fotaq", Path(line["id"]).stem, line, decode(clips[line["id"]]), root) for line in read_list("fotaq_en")
    ]
    return assign_splits(rows, HeldOut.load())


def assign_splits(rows: list[dict], held_out: HeldOut) -> list[dict]:
    """Give each fotaq row a `split`: train, dev, or why it is neither (heldout-text, dev-text, hero)."""
    dev_texts = {words(row["text"]) for row in rows if _is_dev(row)}
    for row in rows:
        if held_out.touches(row["text"]):
            row["split"] = "heldout-text"
        elif _is_dev(row):
            row["split"] = "dev"
        elif len(words(row["text"])) >= SHORTEST and words(row["text"]) in dev_texts:
            row["split"] = "dev-text"
        else:
            row["split"] = "train"
    _sample_hero([row for row in rows if row["split"] == "train"])
    return rows


def _sample_hero(rows: list[dict]) -> None:
    """Leave the hero half as many seconds as all the others have together: a third."""
    left = sum(row["seconds"] for row in rows if row["speaker"] != HERO) / 2
    for row in sorted(rows, key=lambda row: fraction("hero", row["id"])):
        if row["speaker"] == HERO and left < row["seconds"]:
            row["split"] = "hero"
        elif row["speaker"] == HERO:
            left -= row["seconds"]


def _is_dev(row: dict) -> bool:
    return row["speaker"] in DEV_SPEAKERS or fraction("dev", *words(row["text"])) < DEV_SHARE


def fetch_asterisk(language: str, root: Path) -> list[dict]:
    source = f"asterisk_{language}"
    sounds = unpack_debian(f"asterisk-core-sounds-{language}-g722", root) / "usr/share/asterisk/sounds"
    (voice,) = sounds.iterdir()
    verify(f"{voice.name}/*.g722", tree_digest(voice, "*.g722"), G722_SHA256[language])
    evaluated = {line["id"] for line in read_list("asterisk_en_eval")}
    rows = []
    for line in read_list(source):
        if line["seconds"] == 0:  # Russian has no "is": the package holds an empty file
            continue
        row = _row(source, line["id"], line | {"speaker": voice.name}, read_g722(voice / f"{line['id']}.g722"), root)
        rows.append(row | {"language": language, "split": "eval" if line["id"] in evaluated else "look"})
    return rows


def fetch_drascula(root: Path) -> list[dict]:
    folder = unpack_debian("drascula", root) / "usr/share/scummvm/drascula/en"
    verify("drascula.dat", file_digest(folder / "drascula.dat"), DRASCULA_SHA256)
    rows = []
    for line in read_list("drascula_en"):
        samples = read_als(folder / line["id"])
        rows.append(_row("drascula", Path(line["id"]).stem, line, samples, root) | {"split": "eval"})
    return rows


def fetch_fillets(language: str, root: Path) -> list[dict]:
    sounds = unpack_debian(f"fillets-ng-data-{language}", root) / "usr/share/games/fillets-ng/sound"
    verify(f"fillets {language}", tree_digest(sounds, f"{language}/*.ogg"), FILLETS_SHA256[language])
    rows = []
    for line in read_list(f"fillets_{language}"):
        level, name = line["id"].split("/")
        row = _row(f"fillets_{language}", line["id"], line, decode(sounds / level / language / f"{name}.ogg"), root)
        rows.append(row | {"language": language, "reference": line["en"], "split": "eval"})
    return rows


def fetch_music(root: Path) -> list[dict]:
    folder = unpack_debian("asterisk-moh-opsound-wav", root) / "usr/share/asterisk/moh"
    verify("asterisk-moh/*.wav", tree_digest(folder, "*.wav"), MUSIC_SHA256)
    rows = []
    for path in sorted(folder.glob("*.wav")):
        row = _row("music", path.stem, {"text": "", "speaker": "music"}, decode(path), root)
        rows.append(row | {"no_speech": True, "split": "eval" if path.stem in EVAL_MUSIC else "train"})
    return rows


def _row(source: str, name: str, line: dict, samples: np.ndarray, root: Path) -> dict:
    audio = Path("audio") / source / f"{name}.flac"
    write_flac(root / audio, samples)
    return {
        "id": f"{source}/{name}",
        "audio": audio.as_posix(),
        "text": line["text"],
        "language": "en",
        "speaker": line["speaker"],
        "seconds": round(len(samples) / RATE, 3),
        "source": source,
        "licence": LICENCE[source],
    }


SOURCES: dict[str, Callable[[Path], list[dict]]] = {
    "fotaq": fetch_fotaq,
    "asterisk_en": lambda root: fetch_asterisk("en", root),
    "drascula": fetch_drascula,
    "music": fetch_music,
    "asterisk_es": lambda root: fetch_asterisk("es", root),
    "asterisk_fr": lambda root: fetch_asterisk("fr", root),
    "asterisk_it": lambda root: fetch_asterisk("it", root),
    "asterisk_ru": lambda root: fetch_asterisk("ru", root),
    "fillets_cs": lambda root: fetch_fillets("cs", root),
    "fillets_nl": lambda root: fetch_fillets("nl", root),
}
DEFAULT_SOURCES = ("fotaq", "asterisk_en", "drascula", "music")


def fetch(source: str, root: Path) -> list[dict]:
    """All rows of one source; `<root>/<source>.jsonl` exists only when every clip of it does.

    It is written again if a list of texts is newer: transcripts get corrected.
    """
    manifest = root / f"{source}.jsonl"
    corrected = max(path.stat().st_mtime for path in TEXTS.glob("*.gz"))
    if not manifest.exists() or manifest.stat().st_mtime < corrected:
        write_rows(manifest, SOURCES[source](root))
    rows = read_rows(manifest)
    return assign_splits(rows, HeldOut.load()) if source == "fotaq" else rows


def write_parts(source: str, rows: list[dict], root: Path) -> Iterator[str]:
    """The manifests that later steps read: what to train on, what to choose by, what is held out."""
    for split in ("train", "dev", "eval"):
        # music is used only in the clips without speech, so it gets no train_*.jsonl
        name = f"music_{split}" if source == "music" else f"{split}_{source}"
        part = [row for row in rows if row.get("split") == split]
        if part:
            write_rows(root / f"{name}.jsonl", part)
            yield summary(name, part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="the corpus folder; everything is written under it")
    parser.add_argument("--source", nargs="+", default=list(DEFAULT_SOURCES), choices=["all", *SOURCES])
    options = parser.parse_args()
    for source in SOURCES if "all" in options.source else options.source:
        rows = fetch(source, options.root)
        print(summary(source, rows), *write_parts(source, rows, options.root), sep="\n  ")


if __name__ == "__main__":
    main()
