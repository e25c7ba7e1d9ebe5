"""What falls to a row is a pure function of (seed, id), and shares are what they say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blsp.continuation.requests import MixtureError, parse_mixture
from blsp.llm.instructions import BEHAVIOURS, BehaviourError, instruction_for


def test_weights_give_one_name_and_no_weights_give_each() -> None:
    assert parse_mixture("continue,repeat").chosen(0, "a", "behaviour") == ("continue", "repeat")
    assert len(parse_mixture("continue:0.5,repeat:0.5").chosen(0, "a", "behaviour")) == 1


def test_a_language_is_not_a_weight() -> None:
    assert parse_mixture("translate:de").names == ("translate:de",)
    assert parse_mixture("translate:de:3,continue:1").shares == (0.75, 0.25)


def test_shares_are_met() -> None:
    mixture = parse_mixture("continue:7,repeat:1,answer:2")
    drawn = [mixture.chosen(3, f"clip-{i}", "behaviour")[0] for i in range(5000)]
    for name, share in zip(mixture.names, (0.7, 0.1, 0.2), strict=True):
        assert abs(drawn.count(name) / 5000 - share) < 0.02


@given(st.text(), st.integers())
def test_a_draw_depends_on_seed_and_id_alone(id: str, seed: int) -> None:
    mixture = parse_mixture("a:1,b:1,c:1")
    assert mixture.chosen(seed, id, "x") == parse_mixture("a:1,b:1,c:1").chosen(seed, id, "x")


def test_behaviour_and_order_are_drawn_independently() -> None:
    two = parse_mixture("a:1,b:1")
    pairs = {(two.chosen(0, str(i), "behaviour"), two.chosen(0, str(i), "order")) for i in range(50)}
    assert len(pairs) == 4


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
