"""The ablation: its settings are valid for `blsp train`, and its table has the figures of the evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from ablation import ARMS, settings_of, written

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
