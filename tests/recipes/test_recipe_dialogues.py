"""The dialogues of the recipe: turns answered together are answered as one conversation answers them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import dialogues
import pytest
from dialogues import DIALOGUES, ROUTES, is_right, talk
from support.tiny_models import speech_like, tiny_blsp

from blsp.inference.conversation import Conversation
from blsp.inference.listener import Listener


def test_dialogues_together_are_answered_as_each_alone(tiny_models_folder: Path) -> None:
    listener = Listener(*tiny_blsp(tiny_models_folder, adapter="conv"))
    asked = [
        ["my dog is called rex", "what is two plus two", "what is the name of my dog"],
        listener.embed_audio([speech_like(1.5, seed) for seed in range(3)]),
    ]
    together = talk(listener, asked, max_new_tokens=6)
    for turns, answers in zip(asked, together, strict=True):
        alone = Conversation(listener, decoding=replace(listener.decoding, max_new_tokens=6))
        assert answers == ["".join(alone.ask(turn)).strip() for turn in turns]


@pytest.fixture
def routes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The routes that are asked; the first three of their answers are wrong."""
    seen: list[str] = []

    def asked(_: object, route: str, *__: object) -> list[dict]:
        seen.append(route)
        return [{"route": route, "right": number >= 3} for number in range(len(DIALOGUES))]

    monkeypatch.setattr(dialogues, "speak", lambda *_: [])
    monkeypatch.setattr(dialogues, "load", lambda *_, **__: None)
    monkeypatch.setattr(dialogues, "asked", asked)
    return seen


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *flags: str) -> None:
    monkeypatch.setattr("sys.argv", ["dialogues.py", "--root", "C", "--out", str(out), *flags])
    dialogues.main()


def test_a_stopped_run_goes_on_with_the_next_route(
    tmp_path: Path, routes: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "dialogues.jsonl"
    run(monkeypatch, out)
    whole = out.read_bytes()
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("text: 17 of 20 last answers are right (0.85, 95 % interval 0.") and len(said) == 3
    out.write_bytes(b"".join(whole.splitlines(keepends=True)[: len(DIALOGUES)]))
    run(monkeypatch, out)
    assert out.read_bytes() == whole and routes == [*ROUTES, *ROUTES[1:]]


@pytest.mark.parametrize("flag", [["--model", "blsp-tiny"], ["--dtype", "bfloat16"], ["--max-new-tokens", "9"]])
def test_answers_of_another_model_are_not_reported(
    tmp_path: Path, routes: list[str], monkeypatch: pytest.MonkeyPatch, flag: list[str]
) -> None:
    out = tmp_path / "dialogues.jsonl"
    run(monkeypatch, out)
    with pytest.raises(SystemExit, match=f"{flag[0][2:].replace('-', '_')} was .*choose another --out"):
        run(monkeypatch, out, *flag)
    monkeypatch.setattr(dialogues, "model_digest", lambda _: "of other weights")
    with pytest.raises(SystemExit, match=r"sha256 was .*, is 'of other weights'"):
        run(monkeypatch, out)
    assert len(routes) == len(ROUTES)


def test_one_of_the_wanted_words_must_stand_in_the_answer() -> None:
    assert is_right("You live in Great Britain.", "England|Britain")
    assert is_right("You have six dollars left.", "six|6")
    assert not is_right("Birds of Englandia", "England|Britain")
