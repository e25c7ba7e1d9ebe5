"""Conversations: reused key/values change no answer, and no text can imitate a role."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import IM_END, IM_START, speech_like

from blsp.inference.conversation import ContextError, Conversation, Memory, lay_out, request_for, user_turn
from blsp.inference.listener import Listener, Question
from blsp.llm.decoding import Decoder, answer_text, decode

ADAPTERS = pytest.mark.parametrize("adapter", ["conv", "grounded"])


@pytest.fixture
def listener(listener_of) -> Listener:
    return listener_of("grounded")


def _say(talk: Conversation, *parts: object) -> str:
    return "".join(talk.ask(*parts))


def _afresh(talk: Conversation, turns: int) -> str:
    """The answer of turn number `turns`, without any memory, by the decode loop."""
    messages = [message for message in talk.messages if message["role"] != "system"][: 2 * turns + 1]
    messages = [*(m for m in talk.messages if m["role"] == "system"), *messages]
    laid_out = lay_out(talk.listener, messages)
    request = request_for(talk.listener, 0, laid_out, talk.decoding, Memory())
    assert request.prefix is None
    ids = decode(talk.listener.model, [request], 1)[0].ids
    return answer_text(talk.listener.tokenizer, ids).strip()


@ADAPTERS
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_turns_equal_the_conversation_run_afresh(listener_of, adapter: str, system: str | None) -> None:
    listener = listener_of(adapter)
    clips = listener.embed_audio([speech_like(0.8, 1), speech_like(1.3, 2)])
    talk = Conversation(listener, system=system, decoding=replace(listener.decoding, max_new_tokens=9))
    turns = [("hello",), (clips[0],), ("what was that?", clips[1], "and", clips[0]), ("thanks",)]
    answers = [_say(talk, *turn) for turn in turns]
    assert [_afresh(talk, number) for number in range(4)] == answers
    assert any(answers)


def test_only_what_is_new_is_run(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    join = Decoder.join

    def watched(self: Decoder, requests: list) -> list:
        seen.extend((len(r.prefix) if r.prefix else 0, len(r.embeds)) for r in requests)
        return join(self, requests)

    monkeypatch.setattr(Decoder, "join", watched)
    talk = Conversation(listener, decoding=replace(listener.decoding, max_new_tokens=12, stop_ids=()))
    clip = listener.embed_audio([speech_like(1.5)])[0]
    _say(talk, "listen:", clip)
    _say(talk, "and now?")
    first = sum(seen[0])
    turn = len(lay_out(listener, talk.messages[:3]).names) - first - 12
    assert seen[0][0] == 0
    assert seen[1] == (first + 11, turn + 1)  # the answer's last token was not run yet


def test_a_spoken_turn_is_the_listeners_question(listener: Listener) -> None:
    clip = listener.embed_audio([speech_like(1.0)])[0]
    for parts, question in (
        ((clip,), Question()),
        (("Please repeat:", clip), Question(instruction="Please repeat:")),
        ((clip, "Please repeat."), Question(instruction="Please repeat.", order="speech-first")),
    ):
        expected = listener.request(0, question, clip, listener.decoding)
        whole = lay_out(listener, [user_turn(parts)]).embeds
        torch.testing.assert_close(whole[len(expected.prefix or ()) :], expected.embeds, rtol=0, atol=1e-12)


@given(text=st.lists(st.sampled_from(["<|im_start|>", "<|im_end|>", "<|audio|>", "system", "\n", "x"])).map("".join))
@settings(max_examples=20)
def test_text_forges_no_role_and_no_clip(listener_of, text: str) -> None:
    listener = listener_of("grounded")
    clip = listener.embed_audio([speech_like(0.5)])[0]
    laid_out = lay_out(listener, [{"role": "system", "content": text}, user_turn([text, clip, text])])
    assert laid_out.names.count(IM_START) == 3
    assert laid_out.names.count(IM_END) == 2
    assert listener.processor.audio_token_id not in laid_out.names
    assert len([name for name in laid_out.names if isinstance(name, tuple)]) == len(clip.vectors)


def test_a_turn_without_speech_is_answered_in_the_set_way_and_forgotten(listener: Listener) -> None:
    silence = listener.embed_audio([speech_like(1.0) * 0])[0]
    talk = Conversation(listener)
    assert _say(talk, "What is said here?", silence) == listener.model.config.no_speech_sentence
    assert talk.messages == []


def test_an_answer_that_is_broken_off_stays_as_far_as_it_came(listener: Listener) -> None:
    talk = Conversation(listener, decoding=replace(listener.decoding, max_new_tokens=30, stop_ids=()))
    pieces = talk.ask("hello")
    begun = next(pieces)
    pieces.close()
    ids = talk.messages[-1]["content"][0]
    assert answer_text(listener.tokenizer, list(ids)).strip().startswith(begun)
    assert len(ids) < 30
    assert _say(talk, "go on") == _afresh(talk, 1)


def test_reset_forgets(listener: Listener) -> None:
    talk = Conversation(listener, system="Be brief.", decoding=replace(listener.decoding, max_new_tokens=5))
    first = _say(talk, "hello")
    talk.reset()
    assert [message["role"] for message in talk.messages] == ["system"]
    assert _say(talk, "hello") == first


def test_a_conversation_that_is_too_long_is_refused_and_kept(listener: Listener) -> None:
    talk = Conversation(listener, decoding=replace(listener.decoding, max_new_tokens=4000))
    with pytest.raises(ContextError, match="reads 4096"):
        _say(talk, "hello " * 100)
    assert talk.messages == []
    with pytest.raises(ValueError, match="nothing was asked"):
        _say(talk, "  ")


def test_the_memory_holds_the_sequences_used_last(listener: Listener) -> None:
    memory = Memory(sequences=2)
    decoding = replace(listener.decoding, max_new_tokens=3)
    talks = [Conversation(listener, system=f"Be {n}.", decoding=decoding, memory=memory) for n in range(3)]
    for talk in talks:
        _say(talk, "hello")
    reused = []
    for talk in talks:
        question = len(lay_out(listener, talk.messages[:2]).names)
        prefix = memory.longest(lay_out(listener, [*talk.messages, user_turn(["more"])]).names)
        reused.append(prefix is not None and len(prefix) >= question)
    assert reused == [False, True, True]


def test_the_memory_is_bounded_in_positions_too(listener: Listener) -> None:
    memory = Memory(sequences=8, positions=60)
    decoding = replace(listener.decoding, max_new_tokens=3)
    for n in range(3):
        _say(Conversation(listener, system=f"Be {n}. " + "hello " * 30, decoding=decoding, memory=memory), "hi")
    assert len(memory._stored) == 1, "each is longer than half of what may be stored"
