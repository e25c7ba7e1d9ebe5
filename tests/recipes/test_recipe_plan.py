"""The plan of the synthetic speech: each engine has ordered lines with unique ids."""

from __future__ import annotations

import lines
import pytest
from lines import VOICES, HeldOut, plan


@pytest.mark.parametrize("engine", VOICES)
def test_every_engine_has_a_plan_in_order(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HeldOut, "touches", lambda self, text: False)  # slow, and tested in test_recipe_split.py
    monkeypatch.setattr(lines, "drills", lambda seed: [("one two", 0.0), ("three four", 0.5)])
    planned = plan(engine, seed=0)
    assert len(planned) > {"words": 1, "quiz": 900, "kokoro_quiz": 900, "kokoro_romance": 2_000}.get(engine, 5_000)
    assert [line.position for line in planned] == sorted(line.position for line in planned)
    assert len({line.id for line in planned}) == len(planned)


def test_the_languages_of_a_plan_are_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HeldOut, "touches", lambda self, text: False)
    first = plan("pico", seed=0)[:300]
    assert {line.language for line in first} == {"fr", "es", "it"}
    assert all(line.language == "en" for line in plan("piper", seed=0))
