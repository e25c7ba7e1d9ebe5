"""A prompt that nearly fills the LLM's context: the answer is shorter, unless the client asked for a length."""

from __future__ import annotations

import pytest
from serving.conftest import Running, spoken, user

LEFT = 5  # positions of the context after the prompt


@pytest.fixture
def prompt(server: Running, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Messages that leave so many positions."""
    messages = [user(spoken(), "hello")]
    body = {"messages": messages, "max_tokens": 1}
    usage = server.http().post("/v1/chat/completions", json=body).json()["usage"]
    text_config = server.listener.model.config.text_config
    monkeypatch.setattr(text_config, "max_position_embeddings", usage["prompt_tokens"] + LEFT)
    return messages


def test_without_a_length_the_answer_gets_what_the_prompt_leaves(
    server: Running, prompt: list[dict[str, object]]
) -> None:
    answer = server.http().post("/v1/chat/completions", json={"messages": prompt})
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == LEFT
    assert answer.json()["choices"][0]["finish_reason"] == "length"


def test_a_length_that_does_not_fit_is_refused(server: Running, prompt: list[dict[str, object]]) -> None:
    for length, status in ((LEFT, 200), (LEFT + 1, 400)):
        answer = server.http().post("/v1/chat/completions", json={"messages": prompt, "max_tokens": length})
        assert answer.status_code == status, answer.text
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_a_prompt_that_leaves_nothing_is_refused(
    server: Running, prompt: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    text_config = server.listener.model.config.text_config
    monkeypatch.setattr(text_config, "max_position_embeddings", text_config.max_position_embeddings - LEFT)
    answer = server.http().post("/v1/chat/completions", json={"messages": prompt})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
