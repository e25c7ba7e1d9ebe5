"""Whisper's normaliser on texts in many scripts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

from blsp.data.normalisation import basic_normaliser, count_words, normaliser, split_words


@pytest.mark.parametrize(
    "language, text, expected",
    [
        ("hi", "आज का दिन, अच्छा है।", "आज का दिन अच्छा है"),
        ("bn", "আমি ভাত খাই।", "আমি ভাত খাই"),
        ("ta", "நான் சோறு சாப்பிடுகிறேன்!", "நான் சோறு சாப்பிடுகிறேன்"),
        ("th", "น้ำ", "น้ำ"),  # not U+0E4D U+0E32, as in NFKC
        ("th", "น\u0e49\u0e4d\u0e32 น\u0e4d\u0e49\u0e32", "น้ำ น้ำ"),
        ("ar", "الكِتَابُ الجَدِيد؟", "الكتاب الجديد"),  # vowel points are optional
        ("ar", "مســـجد آمن", "مسجد آمن"),
        ("he", "שָׁלוֹם", "שלום"),
        ("fa", "می\u200cخواهم", "میخواهم"),
        ("tr", "İYİ IŞIK", "iyi ışık"),
        ("yo", "ẹ\u0301kọ\u0301", "ẹ\u0301kọ\u0301"),  # no single character exists for these
        ("fr", "L´eau d'été", "l eau d été"),
        ("fr", "e\u0301te\u0301 ❤\ufe0f", "été"),
        ("de", "Straße [lacht] (leise) Über", "straße über"),
        ("km", "ខ្ញុំ\u200bទៅ", "ខ្ញុំ ទៅ"),
    ],
)
def test_marks_stay_and_symbols_go(language: str, text: str, expected: str) -> None:
    assert normaliser(language)(text).strip() == expected


@given(st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=0x24F, exclude_categories=["Cf", "Cc"])))
def test_plain_latin_text_is_whispers(text: str) -> None:
    assert normaliser("en")(text) == EnglishTextNormalizer()(text)
    assert basic_normaliser()(text).split() == BasicTextNormalizer()(text).split()


def test_words_keep_their_marks() -> None:
    assert split_words("हिंदी में, don't ❤\ufe0f snake_case 3.5") == ["हिंदी", "में", "don", "t", "snake_case", "3", "5"]
    assert count_words("हिंदी में बात।", "hi") == 3
    assert count_words("今天天气很好。", "zh") == 6
