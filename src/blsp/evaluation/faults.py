"""What can be wrong with an answer whatever was asked: refused, looping, empty, in the wrong language.

In:  an answer's text and the language it should be in.
Out: the names of its faults. All are plain rules on the text, so the counts mean the same for every route.
Try: `faults("I'm sorry, but I can't assist with that.", "en")` -> {'refusals'}
Flow: evaluation/ — beside scoring.py, for every route's answers.
"""

from __future__ import annotations

import re
import zlib

FAULTS = ("refusals", "loops", "empty", "wrong_language")

_HELP = (
    r"( \w+){0,2} (assist|help|answer|provide|fulfil?l|process|hear|listen|access|comply|do|translate|repeat)"
)
REFUSAL = re.compile(
    r"\b(i'?m (really |very |so )?sorry,? (but|i)|i apologi[sz]e"
    r"|as an? (ai|artificial|language model|digital)"
    r"|i (can'?t|cannot|can not|don'?t have the ability to)"
    + _HELP
    + r"|i('?m| am) (unable|not able) to"
    + _HELP
    + r"|i (don'?t|do not) (understand|have enough (information|context))"
    r"|(could|can) you (please )?(provide|clarify|rephrase)"
    r"|please provide (me )?(with )?(more|the|some|additional))\b",
    re.IGNORECASE,
)
REFUSAL_WITHIN = 160  # characters: a refusal stands at the beginning
LOOP_TIMES = 4  # a phrase this often in a row is a loop
LOOP_WORDS = 8  # the longest phrase looked for
COMPRESSION = 2.4  # Whisper's own mark of a hallucinated loop (Radford et al. 2022, §4.5)

# The commonest short words of a language: enough to tell an answer of a few words from one in another language.
FUNCTION_WORDS = {
    "en": "the of and to in is that it for you are with on this be have from not your at as what how can will i",
    "de": "der die das und ist nicht ein eine zu den mit auf für von ich sie wir es im dem sich auch des werden bitte",
    "fr": "le la les des et est un une pour dans que qui pas vous sur avec ce au du votre en il nous je être plus",
    "es": "el la los las de y es un una para en que no por con su se del al lo usted como más está este ha",
    "it": "il la i gli le di e è un una per in che non con si del della al sono questo da come più ha alla",
    "nl": "de het een en van is in op te dat niet voor met zijn je ik aan er om maar ook als wat bij naar",
    "cs": "a je v na se to že s z do i o jako za by ale jsem není tak co už jen si bude jste",
    "pt": "o a os as de e é um uma para em que não por com seu se do da ao você como mais está no na",
}
SCRIPTS = {
    "ru": re.compile(r"[Ѐ-ӿ]"),
    "el": re.compile(r"[Ͱ-Ͽ]"),
    "zh": re.compile(r"[一-鿿]"),
    "ja": re.compile(r"[぀-ヿ]"),
    "ko": re.compile(r"[가-힯]"),
    "ar": re.compile(r"[؀-ۿ]"),
    "hi": re.compile(r"[ऀ-ॿ]"),
}
_WORDS = {language: frozenset(words.split()) for language, words in FUNCTION_WORDS.items()}


def faults(answer: str, language: str) -> set[str]:
    """The faults of an answer that should be in `language` (ISO 639-1)."""
    if not re.search(r"\w", answer):
        return {"empty"}
    found = set()
    if REFUSAL.search(answer[:REFUSAL_WITHIN].replace("’", "'")):
        found.add("refusals")
    if loops(answer):
        found.add("loops")
    if (heard := guess_language(answer)) is not None and heard != language:
        found.add("wrong_language")
    return found


def loops(answer: str) -> bool:
    """True where a phrase of up to eight words comes four times in a row, or the text compresses like one."""
    words = re.findall(r"\w+", answer.lower())
    for width in range(1, LOOP_WORDS + 1):
        run = 0
        for here, before in zip(words[width:], words, strict=False):
            run = run + 1 if here == before else 0
            if run >= (LOOP_TIMES - 1) * width:
                return True
    raw = answer.encode()
    return len(raw) >= 60 and len(raw) / len(zlib.compress(raw)) > COMPRESSION


def guess_language(text: str) -> str | None:
    """The language of a text, None where a few rules cannot tell: names, numbers and short answers stay untold.

    A script decides where most letters are of it; else the language whose function words are at least three,
    and twice as many as those of any other.
    """
    letters = re.findall(r"[^\W\d_]", text)
    for language, script in SCRIPTS.items():
        if letters and sum(bool(script.match(letter)) for letter in letters) * 2 > len(letters):
            return language
    words = re.findall(r"[^\W\d_]+", text.lower())
    counts = sorted(((sum(w in known for w in words), name) for name, known in _WORDS.items()), reverse=True)
    (most, language), (second, _) = counts[:2]
    return language if most >= 3 and most >= 2 * second else None
