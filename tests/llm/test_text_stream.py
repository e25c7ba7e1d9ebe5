"""Streamed text equals the answer's text, and no character is given before its bytes are complete."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import IM_END, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from blsp.llm.decoding import TextStream, answer_text


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


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerFast:
    """Llama's kind: spaces are `▁`, bytes that are in no token are tokens of their own, a leading space is cut."""
    letters = ["▁", "▁a", "b", "é", "▁ab", "<s>"]
    vocabulary = {token: i for i, token in enumerate([*(f"<0x{byte:02X}>" for byte in range(256)), *letters])}
    backend = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<0x00>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


@given(text=st.text(st.sampled_from(" abéA漢🙂\n")))
def test_byte_tokens_stream_to_their_text(sentencepiece, text: str) -> None:
    letters = {" ": [256], "a": [97], "b": [258], "é": [259]}
    ids = [token for letter in text for token in letters.get(letter, list(letter.encode()))]
    pieces = _streamed(sentencepiece, ids)
    assert "".join(pieces) == answer_text(sentencepiece, ids).strip() == text.strip()
    assert not any("\ufffd" in piece for piece in pieces)


@given(ids=st.lists(st.integers(256, 261) | st.sampled_from([0x20, 0x41, 0xC3, 0xA9, 0xE4]), max_size=30))
def test_bytes_of_no_character_end_no_stream(sentencepiece, ids: list[int]) -> None:
    _streamed(sentencepiece, ids)


def test_pieces_come_as_soon_as_they_are_certain(tokenizer) -> None:
    ids = tokenizer.encode(" hé", add_special_tokens=False)
    assert [piece for piece in _streamed(tokenizer, ids) if piece] == ["h", "é"]
    assert _streamed(tokenizer, [*tokenizer.encode("a ", add_special_tokens=False), IM_END])[-1] == ""
