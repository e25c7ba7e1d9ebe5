"""The dialogues of the recipe: turns answered together are answered as one conversation answers them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dialogues import is_right, talk
from support.tiny_models import speech_like, tiny_blsp

from blsp.inference.conversation import Conversation
from blsp.inference.listener import Listener


def test_dialogues_together_are_answered_as_each_alone(tiny_models_folder: Path) -> None:
    listener = Listener(*tiny_blsp(tiny_models_folder, adapter="conv"))
    dialogues = [
        ["my dog is called rex", "what is two plus two", "what is the name of my dog"],
        listener.embed_audio([speech_like(1.5, seed) for seed in range(3)]),
    ]
    together = talk(listener, dialogues, max_new_tokens=6)
    for turns, answers in zip(dialogues, together, strict=True):
        alone = Conversation(listener, decoding=replace(listener.decoding, max_new_tokens=6))
        assert answers == ["".join(alone.ask(turn)).strip() for turn in turns]


def test_one_of_the_wanted_words_must_stand_in_the_answer() -> None:
    assert is_right("You live in Great Britain.", "England|Britain")
    assert is_right("You have six dollars left.", "six|6")
    assert not is_right("Birds of Englandia", "England|Britain")
