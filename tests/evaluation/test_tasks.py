"""Tasks in YAML: valid ones, and the messages about invalid ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from blsp.data.manifest import write_manifest
from blsp.evaluation.tasks import SUITES, Suite, TaskError, check_manifests, load_suite, select


def test_ten_lines_of_yaml_are_a_task(corpus: Path) -> None:
    own = corpus / "own.yaml"
    own.write_text("name: shout\nkind: chat\nmanifest: speech.jsonl\ninstruction: Shout.\nsamples: 3\nmin_words: 3\n")
    (task,) = select(None, (str(own),), Path("elsewhere")).tasks
    rows = task.rows()
    assert len(rows) == 3 and all(row.instruction == "Shout." and len(row.text.split()) >= 3 for row in rows)


def test_the_same_prompts_are_drawn_in_every_language(corpus: Path) -> None:
    for language, file in (("en", "speech"), ("fr", "french")):
        content = {"name": language, "kind": "asr", "manifest": f"{file}.jsonl", "samples": 4}
        (corpus / f"{language}.yaml").write_text(yaml.safe_dump(content))
    drawn = [
        [row.id[3:] for row in load_suite(str(corpus / f"{language}.yaml"), corpus).tasks[0].rows()]
        for language in ("en", "fr")
    ]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 4


def test_references_come_from_the_other_languages_recordings(suite: Suite) -> None:
    task = next(task for task in suite.tasks if task.kind == "st")
    assert [row.reference for row in task.rows()][:2] == ["mot 0 de la semaine", "mot 1 de la semaine"]
    assert "French" in (task.rows()[0].instruction or "")


def test_a_rows_own_instruction_wins(tmp_path: Path) -> None:
    write_manifest(
        tmp_path / "m.jsonl",
        [
            {"id": "a", "audio": "a.wav", "text": "hi", "instruction": "Mine."},
            {"id": "b", "audio": "b.wav", "text": "hi"},
        ],
    )
    (tmp_path / "t.yaml").write_text("{name: t, kind: chat, manifest: m.jsonl, instruction: Theirs.}")
    assert [row.instruction for row in load_suite(str(tmp_path / "t.yaml"), tmp_path).tasks[0].rows()] == [
        "Mine.",
        "Theirs.",
    ]


def test_rows_are_in_the_language_of_their_task_unless_they_say_another(tmp_path: Path) -> None:
    """The recogniser and `--normalise` read the rows' language, also in the alignment analysis."""
    rows = [
        {"id": "a", "audio": "a.wav", "text": "hallo"},
        {"id": "b", "audio": "b.wav", "text": "hi", "language": "en"},
    ]
    write_manifest(tmp_path / "m.jsonl", rows)
    task = {"name": "t", "kind": "chat", "manifest": "m.jsonl", "language": "de"}
    plan = {"manifest": "m.jsonl", "language": "de"}
    (tmp_path / "t.yaml").write_text(yaml.safe_dump({"tasks": [task], "alignment": plan}))
    suite = load_suite(str(tmp_path / "t.yaml"), tmp_path)
    assert suite.alignment is not None
    for asked in (suite.tasks[0], suite.alignment.task("repeat")):
        assert [row.language for row in asked.rows()] == ["de", "en"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("[1, 2]", "must hold a mapping"),
        ("a: [", "is not YAML"),
        ("{tasks: []}", "neither one task"),
        ("{name: t, kind: asr}", "needs kind, manifest, name"),
        ("{name: t, kind: sing, manifest: m}", "kind 'sing': must be one of asr"),
        ("{name: t, kind: asr, manifest: m, volume: 3}", "unknown 'volume'"),
        ("{name: t, kind: asr, manifest: m, order: backwards}", "order 'backwards'"),
        ("{name: t, kind: asr, manifest: m, behaviour: dance}", "behaviour 'dance'"),
        ("{name: t, kind: asr, manifest: m, behaviour: repeat, instruction: Say}", "not both"),
        ("{tasks: [{name: t, kind: asr, manifest: m}, {name: t, kind: asr, manifest: m}]}", "two tasks are called 't'"),
        ("{name: t, kind: asr, manifest: m, alignment: {manifests: x}}", "unknown"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "t.yaml").write_text(content)
    with pytest.raises(TaskError, match=message):
        load_suite(str(tmp_path / "t.yaml"), tmp_path)


def test_two_files_with_a_task_of_one_name_are_refused(tmp_path: Path) -> None:
    for kind in ("asr", "chat"):
        (tmp_path / f"{kind}.yaml").write_text(f"{{name: mine, kind: {kind}, manifest: {kind}.jsonl}}")
    files = [str(tmp_path / "asr.yaml"), str(tmp_path / "chat.yaml")]
    with pytest.raises(TaskError, match="two tasks are called 'mine'; rename one"):
        select(None, files, tmp_path)


@pytest.mark.parametrize(
    "kind, row, message",
    [
        ("st", {}, "no reference"),
        ("sqa", {}, "neither options nor a reference"),
        ("slu", {"options": ["a", "b"], "reference": "c"}, "not among its options"),
        ("slu", {"options": ["yes", ""], "reference": "yes"}, "task 't': row 'a': its option '' is empty"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(tmp_path: Path, kind: str, row: dict, message: str) -> None:
    write_manifest(tmp_path / "m.jsonl", [{"id": "a", "audio": "a.wav", "text": "hi", **row}])
    (tmp_path / "t.yaml").write_text(f"{{name: t, kind: {kind}, manifest: m.jsonl}}")
    with pytest.raises(TaskError, match=message):
        load_suite(str(tmp_path / "t.yaml"), tmp_path).tasks[0].rows()


def test_a_missing_manifest_is_named_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"eval_asterisk_en\.jsonl: no such manifest. .*`make eval-data`"):
        check_manifests(load_suite("tiny", tmp_path))


def test_wrong_answers_become_options(tmp_path: Path) -> None:
    row = {"id": "a", "audio": "a.wav", "text": "hi", "reference": "b", "wrong": ["c", "a"]}
    write_manifest(tmp_path / "m.jsonl", [row])
    (tmp_path / "t.yaml").write_text("{name: t, kind: sqa, manifest: m.jsonl, distractors: wrong}")
    assert load_suite(str(tmp_path / "t.yaml"), tmp_path).tasks[0].rows()[0].options == ("a", "b", "c")


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(TaskError, match="there are tiny"):
        load_suite("huge", Path())
    with pytest.raises(TaskError, match="asr-asterisk-en"):
        select("tiny", ("asr-mars",), Path())


def test_the_tiny_suite_covers_all_kinds_and_reads_manifests_of_the_recipe() -> None:
    suite = load_suite("tiny", Path("data"))
    assert {task.kind for task in suite.tasks} == {"asr", "st", "slu", "sqa", "chat", "continuation", "no-speech"}
    assert {
        "asr-asterisk-en",
        "asr-drascula-en",
        "st-en-fr",
        "st-fr-en",
        "slu-home",
        "sqa",
        "chat",
        "continuation",
    } <= {task.name for task in suite.tasks}
    assert suite.alignment is not None and suite.alignment.behaviours[0] == "continue"
    assert all(task.note for task in suite.tasks)
    assert [file.name for file in SUITES.iterdir()] == ["tiny.yaml"]
