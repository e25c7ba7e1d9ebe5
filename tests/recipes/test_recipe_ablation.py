"""The ablation: its settings are valid for `blsp train`, and its table has the figures of the evaluation."""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ablation
import pytest
import yaml
from ablation import ARMS, judge, run, settings_of, written

from blsp.evaluation.tasks import load_suite
from blsp.settings import TrainSettings
from blsp.settings.flags import read_settings

PLAN = yaml.safe_load(ARMS.read_text(encoding="utf-8"))
STARTS = {"grounded": Path("grounded"), "embedded": Path("embedded")}
STARTED = {"kl", "ce", "ce-continuation", "ce-repeat", "ce-answers"}  # of an adapter; with embed- before it, of another


@pytest.mark.parametrize("name", PLAN["arms"])
def test_every_arm_is_a_training_run(name: str, tmp_path: Path) -> None:
    config = tmp_path / "arm.yaml"
    arm = settings_of(PLAN["arms"][name], tmp_path, STARTS, tmp_path / "out", 2)
    config.write_text(yaml.safe_dump(arm))
    settings = read_settings(TrainSettings, ["--config", str(config)], "blsp train")
    assert settings.seed == 2 and settings.out == tmp_path / "out"
    start = "grounded" if name in STARTED else "embedded" if name.startswith("embed-") else None
    assert settings.init_from == ((start,) if start else ())
    assert all(Path(data).parent == tmp_path for data in settings.data)


def test_the_judge_reads_the_plan(tmp_path: Path) -> None:
    suite = tmp_path / "suite.yaml"
    suite.write_text(yaml.safe_dump(PLAN["judge"]))
    assert [task.name for task in load_suite(str(suite), tmp_path).tasks] == ["repeat", "answer", "sqa"]


def test_the_table_has_mean_and_spread_of_the_seeds_that_are_done(tmp_path: Path) -> None:
    for seed, wer in ((1, 0.2), (2, 0.4)):
        judged = tmp_path / f"kl-seed{seed}" / "judged"
        judged.mkdir(parents=True)
        (judged / "results.json").write_text(json.dumps({"tasks": {"repeat": {"readout": {"wer": wer}}}}))
        (judged.parent / "metrics.jsonl").write_text(json.dumps({"seconds": 600}) + "\n")
    head, _, *rows = written(tmp_path, list(PLAN["arms"])).splitlines()
    assert len(rows) == 1
    cells = dict(zip(*([c.strip() for c in line.split("|")[1:-1]] for line in (head, rows[0])), strict=True))
    assert cells["arm"] == "kl" and cells["seeds"] == "2" and cells["divergence"] == ""
    assert cells["read-out WER"] == "0.3 (0.2 to 0.4)" and cells["minutes"] == "10 (10 to 10)"


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The `blsp` commands that are run, in place of which the result alone is written, after a moment."""
    seen: list[str] = []

    def made(command: str, *arguments: str) -> None:
        seen.append(command)
        time.sleep(0.2)
        if command == "train":
            settings = yaml.safe_load(Path(arguments[-1]).read_text())
            write_adapter(Path(settings["out"]) / "adapter", settings["loss"])
        else:
            judged = Path(arguments[arguments.index("--out") + 1])
            judged.mkdir()
            (judged / "results.json").write_text("{}")

    monkeypatch.setattr(ablation, "blsp", made)
    return seen


def write_adapter(folder: Path, weights: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text(weights)
    return folder


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    (tmp_path / "suite.yaml").write_text("tasks: [repeat]\n")
    return tmp_path / "suite.yaml"


def test_what_all_seeds_start_from_is_judged_once(tmp_path: Path, commands: list[str], suite: Path) -> None:
    start = write_adapter(tmp_path / "start", "a")
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(judge, start, tmp_path / "grounded-seed0", suite) for _ in range(2)]:
            done.result()
    assert commands == ["evaluate"]


def test_an_arm_goes_on_only_with_what_it_was_made_of(tmp_path: Path, commands: list[str], suite: Path) -> None:
    start, out = write_adapter(tmp_path / "start", "a"), tmp_path / "kl-seed1"
    data = tmp_path / "continued.jsonl"
    data.write_text("{}\n")
    settings = {"out": str(out), "seed": 1, "loss": "kl", "init-from": str(start), "data": [str(data)]}
    for _ in range(2):
        run("kl", settings, suite)
    assert commands == ["train", "evaluate"]
    with pytest.raises(SystemExit, match=r"kl-seed1: .*loss was 'kl', is 'ce'.*remove it"):
        run("kl", settings | {"loss": "ce"}, suite)
    write_adapter(start, "b")
    with pytest.raises(SystemExit, match=r"kl-seed1: .*start's digest was"):
        run("kl", settings, suite)
    shutil.rmtree(out)
    run("kl", settings, suite)
    data.write_text("{}\n{}\n")
    with pytest.raises(SystemExit, match=r"kl-seed1: .*data's digest was"):
        run("kl", settings, suite)
    assert commands == ["train", "evaluate"] * 2


def test_a_judgement_of_another_adapter_or_by_other_tasks_is_not_kept(
    tmp_path: Path, commands: list[str], suite: Path
) -> None:
    start, out = write_adapter(tmp_path / "start", "a"), tmp_path / "grounded-seed0"
    judge(start, out, suite)
    with pytest.raises(SystemExit, match=r"seed0/judged: .*adapter's digest was.*remove it"):
        judge(write_adapter(tmp_path / "other", "b"), out, suite)
    suite.write_text("tasks: [answer]\n")
    with pytest.raises(SystemExit, match=r"judged: .*tasks was \['repeat'\], is \['answer'\]"):
        judge(start, out, suite)
    shutil.rmtree(out / "judged")
    judge(start, out, suite)
    assert commands == ["evaluate"] * 2
