"""Whisper's text normaliser, with the vowel signs of every script.

In:  a transcript and its language (ISO 639-1).
Out: the text in lower case, without punctuation and brackets; for English, with numbers as digits.
Try: `normaliser("hi")("आज का दिन!")` is "आज का दिन"
Flow: used where texts are compared (evaluation/scoring.py, training/probes.py) and by `blsp continue --normalise`.

Whisper's normaliser for languages other than English (Radford et al. 2022, appendix C) replaces every combining mark
by a blank. In Hindi, Bengali, Tamil, Thai and many other scripts, vowels are such marks: दिन (day) and दान (gift) would
be equal. Here marks are kept, with three exceptions: invisible marks, marks without a letter, and the vowel points of
Arabic and Hebrew script, which are usually not written.
"""

import re
import unicodedata
from collections.abc import Callable
from functools import cache

# no spaces between words: letters are counted (Radford et al. 2022, §4.3: zh, ja, th, lo, my)
UNSPACED = frozenset({"zh", "yue", "ja", "th", "lo", "my", "km"})
POINTED = frozenset({"ar", "fa", "he", "ps", "sd", "ur"})  # vowel points are optional
POINTS = re.compile(
    "[\u0610-\u061a\u0640\u064b-\u0652\u0670\u06d6-\u06dc\u06df-\u06e4\u06e7\u06e8\u06ea-\u06ed"  # Arabic, tatweel
    "\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7]"  # Hebrew
)
DOTTED = frozenset({"tr", "az"})  # I is the capital of ı, and İ the capital of i
INVISIBLE = re.compile("[\u180b-\u180d\u180f\ufe00-\ufe0f]")  # variation selectors
ZERO_WIDTH_SPACE = "\u200b"  # marks the end of a word in Khmer, Thai, Lao and Burmese
# NFKC splits the Thai and Lao vowel AM into two characters around a tone sign; they are joined again.
THAI_AM = re.compile("\u0e4d([\u0e48-\u0e4b]?)\u0e32|([\u0e48-\u0e4b])\u0e4d\u0e32")
LAO_AM = re.compile("\u0ecd([\u0ec8-\u0ecb]?)\u0eb2|([\u0ec8-\u0ecb])\u0ecd\u0eb2")


@cache
def normaliser(language: str, split_letters: bool = False) -> Callable[[str], str]:
    """The normaliser of a language. split_letters: put blanks between letters if words have none between them."""
    if language == "en":
        from whisper_normalizer.english import EnglishTextNormalizer

        return EnglishTextNormalizer()
    return basic_normaliser(language, split_letters and language in UNSPACED)


def basic_normaliser(language: str = "", split_letters: bool = False) -> Callable[[str], str]:
    """The normaliser without rules for the words of a language. split_letters: put blanks between letters."""
    from whisper_normalizer.basic import BasicTextNormalizer

    whisper = BasicTextNormalizer(split_letters=split_letters)
    whisper.clean = without_symbols  # it is called after brackets are removed and before letters are split

    def normalise(text: str) -> str:
        if language in POINTED:
            text = POINTS.sub("", text)
        if language in DOTTED:
            text = text.replace("I\u0307", "İ").replace("I", "ı").replace("İ", "i")
        return whisper(text)

    return normalise


def without_symbols(text: str) -> str:
    """The text in NFKC, with a blank for each symbol and punctuation mark; combining marks are kept."""
    letters: list[str] = []
    for letter in unicodedata.normalize("NFKC", INVISIBLE.sub("", text)):
        category = unicodedata.category(letter)
        if category[0] in "SP" or letter == ZERO_WIDTH_SPACE:
            letters.append(" ")
        elif category[0] == "M":
            # Drop a mark without a letter, such as NFKC makes of the accent in "l´eau".
            on_letter = category != "Me" and letters and not letters[-1].isspace()
            letters.append(letter if on_letter else "")
        elif category != "Cf":  # joiners and directions are invisible
            letters.append(letter)
    plain = THAI_AM.sub("\\1\\2\u0e33", "".join(letters))
    return LAO_AM.sub("\\1\\2\u0eb3", plain)


def count_words(text: str, language: str) -> int:
    """The number of words of a text, or of letters if the language has no spaces between words."""
    if language in UNSPACED:
        return len(normaliser(language, split_letters=True)(text).split())
    return len(split_words(text))


def split_words(text: str) -> list[str]:
    """Runs of letters and digits with the marks on them, and underscores."""
    kept = (c if c.isalnum() or c == "_" or unicodedata.category(c)[0] == "M" else " " for c in text)
    return [word for word in "".join(kept).split() if re.search(r"\w", word)]
