"""The prompts of each row: a function of (seed, id) with the given shares; long prompts are dropped."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import tiny_tokenizer

from blsp.continuation.requests import (
    MixtureError,
    PlannedPrompt,
    PromptPolicy,
    PromptSpec,
    parse_mixture,
    plan_continuations,
    prompt_lengths,
)
from blsp.data.jobs import SkippedLog
from blsp.data.manifest import Utterance
from blsp.llm.instructions import BEHAVIOURS, BehaviourError, instruction_for


def test_weights_give_one_name_and_no_weights_give_each() -> None:
    assert parse_mixture("continue,repeat").draw(0, "a", "behaviour") == ("continue", "repeat")
    assert len(parse_mixture("continue:0.5,repeat:0.5").draw(0, "a", "behaviour")) == 1


def test_a_language_is_not_a_weight() -> None:
    assert parse_mixture("translate:de").names == ("translate:de",)
    assert parse_mixture("translate:de:3,continue:1").shares == (0.75, 0.25)


def test_shares_are_met() -> None:
    mixture = parse_mixture("continue:7,repeat:1,answer:2")
    drawn = [mixture.draw(3, f"clip-{i}", "behaviour")[0] for i in range(5000)]
    for name, share in zip(mixture.names, (0.7, 0.1, 0.2), strict=True):
        assert abs(drawn.count(name) / 5000 - share) < 0.02


@given(st.text(), st.integers())
def test_a_draw_depends_on_seed_and_id_alone(id: str, seed: int) -> None:
    mixture = parse_mixture("a:1,b:1,c:1")
    assert mixture.draw(seed, id, "x") == parse_mixture("a:1,b:1,c:1").draw(seed, id, "x")


def test_behaviour_and_order_are_drawn_independently() -> None:
    two = parse_mixture("a:1,b:1")
    pairs = {(two.draw(0, str(i), "behaviour"), two.draw(0, str(i), "order")) for i in range(50)}
    assert len(pairs) == 4


def test_draws_stay_the_same_from_version_to_version() -> None:
    """A job that was begun yesterday goes on, so the draws of (seed, id) are fixed for good."""
    mixture = parse_mixture("continue:6,repeat:3,answer:1")
    drawn = [mixture.draw(7, f"clip-{i}", "behaviour")[0] for i in range(12)]
    assert "".join(name[0] for name in drawn) == "rrracccccccr"


def test_prompts_stand_in_the_order_of_the_mixtures() -> None:
    policy = PromptPolicy(parse_mixture("repeat,continue"), parse_mixture("speech-first,instruction-first"))
    specs = policy.specs_for(Utterance(id="a", audio="a.wav", text="seven"))
    assert [(spec.behaviour, spec.order) for spec in specs] == [
        ("repeat", "speech-first"),
        ("repeat", "instruction-first"),
        ("continue", "speech-first"),
        ("continue", "instruction-first"),
    ]


def test_a_rows_instruction_wins_over_the_commands() -> None:
    policy = PromptPolicy(parse_mixture("continue"), parse_mixture("speech-first"), instruction="Say:")
    row = Utterance(id="a", audio="a.wav", text="seven")
    own = Utterance(id="b", audio="b.wav", text="seven", instruction="Shout:")
    assert [policy.specs_for(utterance)[0].instruction for utterance in (row, own)] == ["Say:", "Shout:"]


@pytest.mark.parametrize(("tokens", "kept"), [(191, True), (192, False), (193, False)])
def test_prompts_of_192_tokens_are_dropped(tmp_path: Path, tokens: int, kept: bool) -> None:
    """The paper's limit, to the token."""
    count, spec = prompt_lengths(tiny_tokenizer()), PromptSpec("continue", "Say:", "instruction-first")
    text = "a"
    while count(spec, text) < tokens:
        text += "~"
    assert count(spec, text) == tokens
    policy = PromptPolicy(parse_mixture("continue"), parse_mixture("instruction-first"), instruction="Say:")
    with SkippedLog(tmp_path / "out.jsonl") as skipped:
        row = Utterance(id="a", audio="a.wav", text=text)
        prompts = list(plan_continuations([row], tiny_tokenizer(), policy, skipped))
        assert skipped.count == (not kept)
    expected = [PlannedPrompt(0, spec, tokens, prompts[0].digest)] if kept else []
    assert prompts == expected


@pytest.mark.parametrize("text", ["", ",", "a,a", "a:0.5,b", "a:0", "a:-1", "a:nan", "a:inf"])
def test_what_cannot_be_a_mixture_is_refused(text: str) -> None:
    with pytest.raises(MixtureError):
        parse_mixture(text)


def test_the_papers_instruction_stands_to_the_letter() -> None:
    paper = "Continue the following text in a coherent and engaging style with less than 40 words."
    assert instruction_for("continue") == paper


def test_languages_are_codes_or_names() -> None:
    assert "German" in instruction_for("translate:de") and "German" in instruction_for("translate:German")
    assert "Icelandic" in instruction_for("translate:icelandic")
    assert "{" not in instruction_for("translate:de")


@pytest.mark.parametrize("behaviour", ["", "translate", "translate:", "translate:xx", "repeat:de", "sing"])
def test_unknown_behaviours_are_refused(behaviour: str) -> None:
    with pytest.raises(BehaviourError):
        instruction_for(behaviour)


def test_every_behaviour_has_an_instruction() -> None:
    for name in BEHAVIOURS:
        assert instruction_for(f"{name}:fr" if name == "translate" else name)
