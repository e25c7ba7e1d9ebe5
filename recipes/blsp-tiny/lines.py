"""The plan of the synthetic speech: which sentence is spoken by which engine and voice.

In: the sentence lists under `texts/`, the quiz's training half, and a seed. Out: `Line`s (text, voice, tempo, pitch)
with a stable id.
Where in the flow: between the texts and `synthesise.py`. A sentence belongs to one engine, so that words, not
voices, repeat least; adding sentences never moves those that are there.

Try: `plan("flite", seed=0)[0]`
"""

from __future__ import annotations

import gzip
import hashlib
import re
from dataclasses import dataclass
from itertools import product

from drills import drills
from heldout import TEXTS, HeldOut, read_list
from rows import fraction
from voices import KOKORO_ROMANCE, KOKORO_TRAINING

LICENCES = {
    "wordnet_examples": "WordNet-3.0",
    "wordnet_definitions": "WordNet-3.0",
    "spoken": "BSD-3-Clause (ChatterBot), Apache-2.0 (Home Assistant, ours)",
    "numbers": "Apache-2.0",
    "kjv": "public domain",
    "words": "Apache-2.0",
    "sentences": "as the described packages (Debian), GPL-2+ or CC-BY-SA-3.0 (handbook), BSD-3-Clause (ChatterBot)",
}
# Every sentence of a list has a fixed position in [0, 1); an engine speaks the sentences between its two bounds.
# The best voices speak most of the requests and questions, the fast ones most sentences with rare words.
SHARES: dict[str, dict[str, tuple[float, float]]] = {
    "kokoro": {
        "wordnet_examples": (0.0, 0.15), "wordnet_definitions": (0.0, 0.1), "spoken": (0.0, 0.6),
        "numbers": (0.0, 0.3),
    },
    "piper": {
        "wordnet_examples": (0.15, 0.35), "wordnet_definitions": (0.1, 0.3), "spoken": (0.6, 0.8),
        "numbers": (0.3, 0.6), "kjv": (0.0, 0.2),
    },
    "flite": {
        "wordnet_examples": (0.35, 1.0), "wordnet_definitions": (0.3, 1.0), "spoken": (0.8, 1.0),
        "numbers": (0.6, 1.0), "kjv": (0.2, 1.0),
    },
    "kokoro_romance": {"sentences": (0.0, 0.15)},
    "pico": {"sentences": (0.15, 1.0)},
}  # fmt: skip
SOONER = {("kokoro", "spoken"): 0.2}  # the lines for voice assistants come in the first fifth of the plan
FLITE = (*("slt", "rms", "awb") * 3, "kal16")  # kal16 is the robotic one
VOICES = {
    "flite": FLITE, "words": FLITE, "quiz": FLITE, "piper": ("joe",), "kokoro": KOKORO_TRAINING, "pico": ("pico",),
    "kokoro_quiz": KOKORO_TRAINING, "kokoro_romance": (*KOKORO_TRAINING, *KOKORO_ROMANCE * 3),
}  # fmt: skip
CULTURES = {"fr": "fr-FR", "es": "es-ES", "it": "it-IT"}  # of the languages besides English
SPEAKS = {"pico": tuple(CULTURES), "kokoro_romance": tuple(CULTURES)}  # others speak English
QUIZ_ROUNDS = 4  # how often each question of the quiz's training half is spoken, in voices drawn anew
BLENDED = 0.4  # share of Kokoro's lines that are spoken by the mean of two training voices
TEMPO = (0.85, 1.2)  # over the voice's own
PITCH = (0.9, 1.12)  # pitch and formants together: a smaller or larger speaker (flite and pico)
QUESTION = re.compile(
    r"(who|whose|what|where|when|why|how|which|do|does|did|is|are|was|were|can|could|will|would|should|may|have|has)\s"
    r".*\b(i|you|he|she|it|we|they|this|that|there|the|a|an|my|your|his|her|its|our|their)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Line:
    """One thing to say. `position` orders the lines of an engine; the audio is named by `id`."""

    id: str
    text: str
    list_name: str
    voice: str
    tempo: float
    pitch: float
    position: float
    language: str = "en"


def sentences(list_name: str, held_out: HeldOut, language: str = "en") -> list[str]:
    """A list under `texts/` as sentences with capital and full stop; held-out and repeated ones left out."""
    with gzip.open(TEXTS / f"{list_name}_{language}.txt.gz", "rt", encoding="utf-8") as file:
        unique = dict.fromkeys(as_sentence(line.strip()) for line in file if line.strip())
    return [text for text in unique if not held_out.touches(text)]


def as_sentence(text: str) -> str:
    """ "the Magi came from afar" -> "The Magi came from afar."; transcripts of one style over all sources."""
    text = text[0].upper() + text[1:]
    if text[-1] in ".!?":
        return text
    return text.rstrip(",;: ") + ("?" if QUESTION.match(text) and len(text.split()) < 12 else ".")


def plan(engine: str, seed: int) -> list[Line]:
    """All lines of `engine` in the order of speaking: a random one, so that any beginning is varied."""
    if engine == "words":
        return [_line(engine, "words", text, position, seed) for text, position in drills(seed)]
    if engine in ("quiz", "kokoro_quiz"):
        asked = [row["text"] for row in read_list("split") if (row["kind"], row["part"]) == ("quiz", "train")]
        return [
            _line(engine, "spoken", text, (turn + number / len(asked)) / QUIZ_ROUNDS, seed * QUIZ_ROUNDS + turn)
            for turn in range(QUIZ_ROUNDS)
            for number, text in enumerate(asked)
        ]
    lines = []
    held_out = HeldOut.load()
    for language, (list_name, (low, high)) in product(SPEAKS.get(engine, ("en",)), SHARES[engine].items()):
        for text in sentences(list_name, held_out, language):
            position = (fraction("place", text) - low) / (high - low)
            if 0 <= position < 1:
                position *= SOONER.get((engine, list_name), 1.0)
                lines.append(_line(engine, list_name, text, position, seed, language))
    return sorted(lines, key=lambda line: line.position)


def _line(engine: str, list_name: str, text: str, position: float, seed: int, language: str = "en") -> Line:
    said = text if language == "en" else f"{language}\0{text}"  # two languages may share a sentence
    digest = hashlib.sha256(f"{engine}\0{seed}\0{said}".encode()).hexdigest()[:12]
    return Line(
        id=f"{engine}/{digest[:2]}/{digest}",
        text=text,
        list_name=list_name,
        voice=_voice(engine, digest),
        tempo=round(_between(TEMPO, fraction("tempo", digest)), 3),
        pitch=round(_between(PITCH, fraction("pitch", digest)), 3),
        position=position,
        language=language,
    )


def _voice(engine: str, digest: str) -> str:
    voices = VOICES[engine]
    one, other = (voices[int(len(voices) * fraction(which, digest))] for which in ("voice", "other"))
    blended = engine.startswith("kokoro") and one != other and fraction("blend", digest) < BLENDED
    return f"{one}+{other}" if blended else one


def _between(bounds: tuple[float, float], share: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * share
