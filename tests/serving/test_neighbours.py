"""Nobody is held up by a neighbour: what one client sends keeps no other one waiting."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from serving.conftest import Running, spoken, user, wav

from blsp.inference import conversation
from blsp.llm import prompt

MEGABYTE = "hello " * 170_000
TINY_CLIP = wav(np.zeros(160, dtype=np.float32))  # 10 ms
ONE_SAMPLE = wav(np.zeros(1, dtype=np.float32))


def in_turns(count: int, *parts: str | bytes) -> list[dict[str, Any]]:
    """`count` messages of user and assistant in turn; the user's hold `parts`."""
    return [user(*parts) if number % 2 == 0 else {"role": "assistant", "content": "Yes."} for number in range(count)]


CROWDS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "1 MB of text": ([user(MEGABYTE)], "context_length_exceeded"),
    "3 MB of text": ([user(MEGABYTE * 3)], "context_length_exceeded"),
    "1 MB of text in a system message": (
        [{"role": "system", "content": MEGABYTE}, user("hi")],
        "context_length_exceeded",
    ),
    "5,000 parts of text": ([user(*["hello"] * 5000)], "too_many"),
    "5,000 clips of 10 ms": ([user(*[TINY_CLIP] * 5000)], "too_many"),
    "20,000 clips of one sample": ([user(*[ONE_SAMPLE] * 20_000)], "too_many"),
    "511 turns with clips": (in_turns(511, TINY_CLIP), "too_many"),
    "5,001 turns": (in_turns(5001, "hello"), "too_many"),
}


@pytest.mark.parametrize("case", CROWDS)
def test_a_crowd_is_refused_before_anything_is_tokenised_or_decoded(
    server: Running, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages, code = CROWDS[case]
    for module in (conversation, prompt):  # neither is reached
        monkeypatch.setattr(module, "render", lambda *_: pytest.fail("laid out"))
    answer = server.http().post("/v1/chat/completions", json={"messages": messages})
    error = answer.json()["error"]
    assert answer.status_code == 400 and (error["param"], error["code"]) == ("messages", code)
    assert len(error["message"]) < 200


def test_as_much_as_is_taken_is_answered(server: Running) -> None:
    for messages in ([user(*["hello"] * 512)], [user(*[ONE_SAMPLE] * 128)], [user(*[TINY_CLIP] * 128, "hello")],
                     in_turns(255, spoken(seconds=0.02))):  # fmt: skip
        answer = server.http().post("/v1/chat/completions", json={"messages": messages, "max_tokens": 2})
        assert answer.status_code == 200, answer.text


def test_a_text_of_too_many_tokens_is_not_embedded(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "embed", lambda *_: pytest.fail("embedded"))
    text = "\N{HEADPHONE}" * 16_000  # below the bound on characters, far above the context
    answer = server.http().post("/v1/chat/completions", json={"messages": [user(text)]})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
