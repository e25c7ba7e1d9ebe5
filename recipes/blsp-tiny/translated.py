"""Sentences in French, Spanish and Italian, for a model that hears these languages.

In:  Debian's translated package descriptions and handbooks, ChatterBot's conversations, numbers in words.
Out: `texts/sentences_{fr,es,it}.txt.gz`, what may be spoken for training.
Where in the flow: run by maintainers when the texts change; everybody else uses the lists as they are. Nothing that
touches a held-out text (the asterisk prompts in any language among them) is kept.

Try: `python recipes/blsp-tiny/translated.py --root /tmp/corpus` (needs: pip install pyyaml num2words)
"""

from __future__ import annotations

import argparse
import bz2
import html
import re
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from random import Random

from build_texts import CHATTERBOT, rare_words_first, write_gzip
from heldout import TEXTS, HeldOut
from lines import CULTURES
from packages import download_wheel, unpack_debian

from blsp.data.files import write_atomically
from blsp.evaluation.scoring import is_in_other_language

MIRROR = "http://deb.debian.org/debian/dists/bookworm/main/i18n"
TALK = {"es": "spanish", "it": "italian"}  # ChatterBot's French has no accents
SENTENCES = 7_000  # a language at most, so that none outweighs the others
NUMBERS = 500
LETTERS = "a-zàâäáãæçéèêëíìîïñóòôöœúùûüÿ"
PLAIN = re.compile(f"[{LETTERS} ,.'’?!;:¿¡-]+", re.IGNORECASE).fullmatch
END = re.compile(r"(?<=[.?!])\s+")


def descriptions(language: str, root: Path) -> Iterator[str]:
    """The paragraphs of Debian's package descriptions, as far as they are translated."""
    path = root / "packages" / f"Translation-{language}.bz2"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(path) as partial:  # a download that breaks off is begun again
            urllib.request.urlretrieve(f"{MIRROR}/Translation-{language}.bz2", partial)
    for entry in bz2.decompress(path.read_bytes()).decode("utf-8").split("\n\n"):
        body = entry.split(f"Description-{language}: ", 1)[-1].split("\n", 1)
        if len(body) == 2:
            for paragraph in body[1].split("\n .\n"):
                yield " ".join(paragraph.split())


def handbook(language: str, root: Path) -> Iterator[str]:
    """The paragraphs of the Debian handbook."""
    folder = unpack_debian("debian-handbook", root) / "usr/share/doc/debian-handbook/html" / CULTURES[language]
    for page in sorted(folder.glob("*.html")):
        for paragraph in re.findall(r'<div class="para">(.*?)</div>', page.read_text(encoding="utf-8"), re.DOTALL):
            yield " ".join(html.unescape(re.sub(r"<[^>]+>", "", paragraph)).split())


def conversations(language: str, root: Path) -> Iterator[str]:
    """What is said in ChatterBot's conversations."""
    import yaml

    with zipfile.ZipFile(download_wheel(*CHATTERBOT, root)) as wheel:
        for name in sorted(wheel.namelist()):
            if f"/{TALK.get(language)}/" in name:
                for turns in yaml.safe_load(wheel.read(name))["conversations"]:
                    yield from (" ".join(str(turn).split()) for turn in turns)


def numbers(language: str) -> Iterator[str]:
    """Numbers in words: single ones, and digits one after another."""
    from num2words import num2words

    random = Random(f"numbers {language}")
    for count in range(NUMBERS):
        if count % 2:
            values = [random.randrange(10) for _ in range(random.randint(3, 7))]
        else:
            values = [random.randrange(10 ** random.randint(1, 6)) for _ in range(random.randint(1, 3))]
        text = ", ".join(num2words(value, lang=language) for value in values)
        yield text[0].upper() + text[1:] + "."


def sentences(paragraphs: Iterator[str], shortest: int) -> Iterator[str]:
    """The whole sentences of up to 22 words that hold words and ordinary punctuation only."""
    for paragraph in paragraphs:
        for text in END.split(paragraph.replace("’", "'")):
            if text and shortest <= len(text.split()) <= 22 and _is_sentence(text):
                yield text


def _is_sentence(text: str) -> bool:
    """From a capital letter to a full stop, with ordinary punctuation, few names and no file names."""
    whole = (text[0].isupper() or text[0] in "¿¡") and text[-1] in ".?!"
    names = sum(letter.isupper() for letter in text) > 2 or re.search(r"\w[.:]\w|\.\.", text)
    return whole and not names and PLAIN(text) is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="the corpus folder; packages are fetched into it")
    root = parser.parse_args().root
    held_out = HeldOut.load()
    for language in CULTURES:
        talk = [*sentences(conversations(language, root), 1), *numbers(language)]
        prose = dict.fromkeys([*sentences(handbook(language, root), 4), *sentences(descriptions(language, root), 4)])
        prose = [text for text in prose if not is_in_other_language(text, language)]  # paragraphs left in English
        chosen = rare_words_first(prose, SENTENCES - len(talk))
        texts = [text for text in dict.fromkeys([*talk, *chosen]) if not held_out.touches(text)]
        write_gzip(TEXTS / f"sentences_{language}.txt.gz", texts)
        print(f"{language}: {len(texts):,} of {len(prose) + len(talk):,}, {sum(map(len, texts)) / 13.5 / 3600:.1f} h")


if __name__ == "__main__":
    main()
