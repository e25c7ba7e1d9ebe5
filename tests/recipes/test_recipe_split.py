"""Training and held-out texts of the recipe share no text of four words or more; held-out voices stay out.

Works on the committed lists alone: nothing is downloaded and nothing is spoken. What is judged is taken from where the
evaluation takes it, and compared word by word, not through the recipe's own `HeldOut`.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

from eval_data import LANGUAGES, SPOKEN, answered_in, line_for, questions  # noqa: E402
from fetch import assign_splits  # noqa: E402
from heldout import HELD_OUT_VOICES, HeldOut, part_of, read_list, words  # noqa: E402
from lines import SHARES, SPEAKS, plan, sentences  # noqa: E402
from voices import KOKORO_TRAINING  # noqa: E402

SPEECH = ROOT / "examples" / "speech"
RECORDED = ("asterisk_en_eval", "asterisk_fr", "asterisk_es", "asterisk_it", "asterisk_ru", "drascula_en")


@pytest.fixture(scope="module")
def held_out() -> HeldOut:
    return HeldOut.load()


@pytest.fixture(scope="module")
def judged() -> Judged:
    """All texts that the suite asks for or compares with, but for the Czech ones."""
    rows = [row["text"] for asked in SPOKEN.values() for row in asked()]
    recorded = [row["text"] for name in RECORDED for row in read_list(name)]
    assert len(rows) == 510 and len(recorded) == 2_648
    return Judged([*rows, *recorded])


class Judged:
    """Texts of four words or more, found by any four words in a row that they have."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = {words(text) for text in texts if len(words(text)) >= 4}
        self._by_run: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
        for text in self.texts:
            for run in _runs(text):
                self._by_run.setdefault(run, set()).add(text)

    def shared(self, text: str) -> list[str]:
        """Judged texts that `text` equals, contains or is contained in."""
        said = words(text)
        near = {each for run in _runs(said) for each in self._by_run.get(run, ())}
        pairs = [(f" {' '.join(said)} ", f" {' '.join(each)} ") for each in near]
        return [other for one, other in pairs if one in other or other in one]


def _runs(said: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [said[at : at + 4] for at in range(len(said) - 3)]


@pytest.fixture(scope="module")
def fotaq(held_out: HeldOut) -> dict[str, list[dict]]:
    parts: dict[str, list[dict]] = {}
    for row in assign_splits([row | {"id": f"fotaq/{row['id'][:-3]}"} for row in read_list("fotaq_en")], held_out):
        parts.setdefault(row["split"], []).append(row)
    return parts


def test_texts_that_are_equal_contain_or_are_contained_touch() -> None:
    held_out = HeldOut.of(["Please enter your agent number.", "Thank you."])
    assert held_out.touches("please ENTER your agent number")
    assert held_out.touches("Now, please enter your agent number!")
    assert held_out.touches("enter your agent number")
    long = " ".join(f"word{number}" for number in range(60))
    assert HeldOut.of([long]).touches(long) and HeldOut.of([long]).touches(f"So: {long}.")
    assert not held_out.touches("Thank you.")  # two words are anybody's
    assert not held_out.touches("Please enter your room number.")


def test_what_is_judged_is_held_out(judged: Judged, held_out: HeldOut) -> None:
    assert not [text for text in judged.texts if not held_out.touches(" ".join(text))]


LISTS = {
    (name, language) for engine, shares in SHARES.items() for name in shares for language in SPEAKS.get(engine, ("en",))
}


@pytest.mark.parametrize(("name", "language"), sorted(LISTS))
def test_no_spoken_sentence_shares_its_words_with_a_judged_text(
    name: str, language: str, judged: Judged, held_out: HeldOut
) -> None:
    texts = sentences(name, held_out, language)
    assert len(texts) > 100
    assert not [(text, judged.shared(text)) for text in texts if judged.shared(text)]


@pytest.mark.parametrize("engine", ["quiz", "words"])
def test_no_line_of_these_engines_touches_a_held_out_text(engine: str, held_out: HeldOut) -> None:
    lines = plan(engine, seed=0)
    assert len(lines) > 100
    assert not [line.text for line in lines if held_out.touches(line.text)]


def test_what_is_judged_is_spoken_by_held_out_voices() -> None:
    spoken = [line_for(task, row["text"]) for task, asked in SPOKEN.items() for row in asked()]
    assert {line.voice for line in spoken} == set(HELD_OUT_VOICES)


def test_the_tour_s_questions_are_held_out(held_out: HeldOut) -> None:
    for line in (SPEECH / "questions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert held_out.touches(row["text"]) and row["speaker"].removeprefix("kokoro-") in HELD_OUT_VOICES


def test_shares_of_the_engines_do_not_overlap() -> None:
    for name in {name for shares in SHARES.values() for name in shares}:
        bounds = sorted(shares[name] for shares in SHARES.values() if name in shares)
        assert bounds[0][0] == 0 and bounds[-1][1] == 1
        assert all(left[1] == right[0] for left, right in itertools.pairwise(bounds))


def test_held_out_voices_speak_nothing_in_training() -> None:
    assert len(KOKORO_TRAINING) == 22
    assert not set(HELD_OUT_VOICES) & set(KOKORO_TRAINING)


def test_questions_and_commands_are_in_one_part_only() -> None:
    rows = read_list("split")
    parts = {part: {words(row["text"]) for row in rows if row["part"] == part} for part in ("train", "eval")}
    assert not parts["train"] & parts["eval"]
    templates = [(row["template"], row["part"]) for row in rows if row["kind"] == "command"]
    for template, part in templates:  # a text that both parts can say moves to the evaluation, never the other way
        assert part_of(template) == part or part == "eval"


def test_fotaq_trains_on_no_held_out_and_no_development_text(
    fotaq: dict[str, list[dict]], held_out: HeldOut, judged: Judged
) -> None:
    development = {words(row["text"]) for row in fotaq["dev"]}
    for row in fotaq["train"]:
        assert not held_out.touches(row["text"]) and not judged.shared(row["text"])
        assert len(words(row["text"])) < 4 or words(row["text"]) not in development


def test_the_hero_has_at_most_a_third_of_fotaq(fotaq: dict[str, list[dict]]) -> None:
    seconds = [(row["speaker"] == "JOE", row["seconds"]) for row in fotaq["train"]]
    assert sum(s for hero, s in seconds if hero) <= sum(s for _, s in seconds) / 3 + 1


def test_the_clips_in_the_repository_come_from_the_right_parts(fotaq: dict[str, list[dict]]) -> None:
    ids = {split: {row["id"] for row in rows} for split, rows in fotaq.items()}
    clips = {name: _ids(SPEECH / f"{name}.jsonl") for name in ("train", "heldout", "asterisk")}
    judged = {f"asterisk_en/{row['id']}" for row in read_list("asterisk_en_eval")}
    assert clips["train"] <= ids["train"]
    assert clips["heldout"] <= ids["dev"]
    assert not clips["asterisk"] & judged


def _ids(manifest: Path) -> set[str]:
    return {json.loads(line)["id"] for line in manifest.read_text(encoding="utf-8").splitlines()}


def test_a_hundred_questions_have_their_answer_in_every_language_of_the_suite() -> None:
    asked = list(questions())
    english = {row["text"]: row["references"] for row in asked}
    for language in LANGUAGES:
        rows = answered_in(language, asked)
        assert len(rows) >= 100
        assert all(row["reference"] and "" not in row["references"] for row in rows)
        assert any(row["references"] != english[row["text"]] for row in rows)
        assert {row["text"]: row["references"] for row in rows}["How many legs does a spider have?"][-1] == "8"
