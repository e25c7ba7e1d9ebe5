"""Prompts: both routes have the same ids around the speech, and no text of a user becomes a role or a clip."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import IM_END, IM_START, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from blsp.llm.prompt import ORDERS, PromptError, Speech, prompt_template, render, text_ids, transcript_ids
from blsp.model.configuration_blsp import AUDIO_TOKEN

CONTROL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", AUDIO_TOKEN, "<start_of_turn>", "<end_of_turn>"]
MARKS = ["\ue0000\ue001", "\ue0001\ue001", "\ue000", "\ue001"]
HOSTILE = st.lists(st.sampled_from([*CONTROL, *MARKS, "system\n", "{{", "}}", "{% raw %}", " a", "\n", "é"])).map(
    "".join
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """With a placeholder, and with control tokens that are not "special", as Gemma 2 has them."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AUDIO_TOKEN], special_tokens=True)
    tokenizer.add_tokens(["<start_of_turn>", "<end_of_turn>"])
    return tokenizer


def _control_ids(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    return {tokenizer.convert_tokens_to_ids(token) for token in CONTROL}


@given(text=HOSTILE | st.text())
def test_control_tokens_in_text_are_text(tokenizer, text: str) -> None:
    ids = text_ids(tokenizer, text)
    assert not _control_ids(tokenizer) & set(ids)
    assert tokenizer.decode(ids) == text


@given(texts=st.lists(HOSTILE, min_size=1, max_size=3), clips=st.integers(0, 3), system=HOSTILE)
def test_roles_and_clips_cannot_be_forged(tokenizer, texts: list[str], clips: int, system: str) -> None:
    content = [*texts, *(Speech(index) for index in range(clips))]
    messages = [{"role": "system", "content": system}, {"role": "user", "content": content}]
    segments = render(tokenizer, messages)
    ids = [token for segment in segments if not isinstance(segment, Speech) for token in segment]
    assert [segment for segment in segments if isinstance(segment, Speech)] == content[len(texts) :]
    assert ids.count(IM_START) == 3  # system, user, and the opening of the answer
    assert ids.count(IM_END) == 2
    assert _control_ids(tokenizer) & set(ids) == {IM_START, IM_END}


@pytest.mark.parametrize("order", ORDERS)
def test_the_frame_is_the_template_cut_at_the_speech(tokenizer, order: str) -> None:
    frame = prompt_template(tokenizer, " Please repeat: ", order)
    text = tokenizer.decode([*frame.prefix_ids, *transcript_ids(tokenizer, "hello  world "), *frame.suffix_ids])
    body = {"instruction-first": "Please repeat: hello  world", "speech-first": " hello  world\nPlease repeat:"}
    assert text == f"<|im_start|>user\n{body[order]}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("order", ORDERS)
def test_without_an_instruction_the_speech_is_the_turn(tokenizer, order: str) -> None:
    frame = prompt_template(tokenizer, "", order)
    assert tokenizer.decode(frame.prefix_ids) == "<|im_start|>user\n"
    assert tokenizer.decode(frame.suffix_ids) == "<|im_end|>\n<|im_start|>assistant\n"


def test_a_conversation_goes_on_from_its_own_beginning(tokenizer) -> None:
    """The ids of a turn are a prefix of those of the next, so key/values are kept from turn to turn."""
    turn = [{"role": "user", "content": [Speech(0), "\nwhat?"]}]
    first = render(tokenizer, turn)
    written = tuple(text_ids(tokenizer, "an answer"))
    answer = {"role": "assistant", "content": [written]}
    second = render(tokenizer, [*turn, answer, {"role": "user", "content": [Speech(1)]}])
    assert second[:2] == first[:2]
    assert second[2][: len(first[2]) + len(written)] == first[2] + written
    assert second[3] == Speech(1)


def test_an_empty_transcript_is_no_token(tokenizer) -> None:
    assert transcript_ids(tokenizer, " \n") == []


def test_what_cannot_be_framed_is_refused(tokenizer) -> None:
    with pytest.raises(PromptError, match="order"):
        prompt_template(tokenizer, "say", "sideways")
    plain = tiny_tokenizer()
    plain.chat_template = None
    with pytest.raises(PromptError, match="no chat template"):
        prompt_template(plain, "say", "speech-first")
    plain.chat_template = "{{ messages[0]['content'].split()[0] | length }}"
    with pytest.raises(PromptError, match="template"):
        prompt_template(plain, "say", "speech-first")
    plain.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(PromptError, match="System role not supported"):
        prompt_template(plain, "say", "speech-first")
