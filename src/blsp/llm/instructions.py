"""Instruction texts of all behaviours, and the answer to clips without speech.

In:  a behaviour's name: continue, repeat, answer, keywords, translate:<language>.
Out: the instruction that the LLM gets beside a transcript (step 1) or beside speech (step 2, inference).
Try: `instruction_for("translate:de")` -> 'Translate the following text into German. …'
Flow: **instructions.py** → prompt.py; step 1, training, evaluation and inference use the same texts.

The same instruction is used with the transcript and with the speech. So no text says "audio" or "transcript": either
word would be wrong on one of the two routes. `continue` is the paper's text (arXiv 2309.00916), unchanged. The others
were chosen with text alone: `translate` with the LLM of blsp-small, the rest with the smallest LLM (docs/log.md).
"""

NO_SPEECH_SENTENCE = "I could not hear any speech."  # the answer to a clip without speech

BEHAVIOURS: dict[str, str] = {
    "continue": "Continue the following text in a coherent and engaging style with less than 40 words.",
    "repeat": "Please repeat the following words:",
    "answer": "Answer the following question in one short sentence:",
    "keywords": "List the keywords of the following text, separated by commas:",
    "translate": "Translate the following text into {language}. Write only the translation:",
}

# ISO 639-1 codes of the languages in the paper's tasks, CoVoST 2, MuST-C and FLEURS' larger ones
LANGUAGES: dict[str, str] = {
    "ar": "Arabic", "bn": "Bengali", "ca": "Catalan", "cs": "Czech", "cy": "Welsh", "da": "Danish",
    "de": "German", "el": "Greek", "en": "English", "es": "Spanish", "et": "Estonian", "fa": "Persian",
    "fi": "Finnish", "fr": "French", "he": "Hebrew", "hi": "Hindi", "hu": "Hungarian", "id": "Indonesian",
    "it": "Italian", "ja": "Japanese", "ko": "Korean", "lt": "Lithuanian", "lv": "Latvian",
    "mn": "Mongolian", "nl": "Dutch", "no": "Norwegian", "pl": "Polish", "pt": "Portuguese",
    "ro": "Romanian", "ru": "Russian", "sk": "Slovak", "sl": "Slovenian", "sv": "Swedish",
    "sw": "Swahili", "ta": "Tamil", "th": "Thai", "tr": "Turkish", "uk": "Ukrainian", "ur": "Urdu",
    "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip


class BehaviourError(ValueError):
    """A behaviour that has no instruction; the message lists those that have."""


def instruction_for(behaviour: str) -> str:
    """The instruction of `behaviour`; a language is an ISO 639-1 code (`translate:de`) or an English name."""
    name, _, language = behaviour.partition(":")
    if name not in BEHAVIOURS or (name == "translate") != bool(language):
        known = ", ".join("translate:<language>" if name == "translate" else name for name in BEHAVIOURS)
        raise BehaviourError(f"behaviour {behaviour!r}: must be one of {known}")
    return BEHAVIOURS[name].format(language=language_name(language)) if language else BEHAVIOURS[name]


def language_name(language: str) -> str:
    """The English name of an ISO 639-1 code; a longer word is taken as a name, with a capital letter."""
    if len(language) > 2:
        return language[0].upper() + language[1:]
    try:
        return LANGUAGES[language.lower()]
    except KeyError:
        raise BehaviourError(
            f"language {language!r}: not a known code; write its English name, as in translate:Icelandic"
        ) from None
