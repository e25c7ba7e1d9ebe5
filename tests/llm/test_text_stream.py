"""Streamed text is the answer's text, and no character is shown before its bytes are complete."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import IM_END, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from blsp.llm.text_stream import TextStream, answer_text


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def _streamed(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.push(token) for token in ids), stream.close()]


@given(ids=st.lists(st.integers(0, 299), max_size=40))
def test_any_tokens_stream_to_their_text(tokenizer, ids: list[int]) -> None:
    assert "".join(_streamed(tokenizer, ids)) == answer_text(tokenizer, ids).strip()


@given(text=st.text())
def test_characters_come_whole(tokenizer, text: str) -> None:
    pieces = _streamed(tokenizer, tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
    assert "".join(pieces) == text.strip()
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_pieces_come_as_soon_as_they_are_certain(tokenizer) -> None:
    ids = tokenizer.encode(" hé", add_special_tokens=False)
    assert [piece for piece in _streamed(tokenizer, ids) if piece] == ["h", "é"]
    assert _streamed(tokenizer, [*tokenizer.encode("a ", add_special_tokens=False), IM_END])[-1] == ""
