"""Damaged folders of adapters, LLMs and encoders: the error is one line with the file and what is wrong."""

from pathlib import Path

import pytest

from benchmarks.support.damage import DAMAGES, damaged_copy, make_home, with_code
from blsp import cli
from blsp.llm import template_check


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("whole")
    make_home(home)
    return home


@pytest.mark.parametrize(("part", "name"), [(part, name) for part, names in DAMAGES.items() for name in names])
def test_a_damaged_folder_is_refused_in_one_line_that_names_it(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, part: str, name: str
) -> None:
    monkeypatch.setattr(template_check, "CHECKED_SECONDS", 1)
    copy = tmp_path / "home"
    damaged_copy(home, part, name, copy)
    capfd.readouterr()
    code = cli.main(["transcribe", str(copy / "a.wav"), "--model", str(copy / "adapter")])
    said = capfd.readouterr().err.splitlines()
    (line,) = [line for line in said if line.startswith("blsp: error: ")]
    assert code == cli.FAILED and "Traceback" not in "".join(said)
    assert str(copy / part) in line and "unexpected" not in line


def test_the_whole_folder_is_loaded(home: Path) -> None:
    assert cli.main(["transcribe", str(home / "a.wav"), "--model", str(home / "adapter")]) == cli.DONE


def test_code_beside_a_known_model_is_not_run(home: Path, tmp_path: Path) -> None:
    copy = tmp_path / "home"
    with_code(home, copy, tmp_path / "ran")
    cli.main(["transcribe", str(copy / "a.wav"), "--model", str(copy / "adapter")])
    assert not (tmp_path / "ran").exists()
