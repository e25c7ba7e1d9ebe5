"""The scripts of `make bench` work with the present code: all can be imported, and the quick ones run."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks import memory, scale
from blsp.distributed import find_runtime
from blsp.model.loading import load_speech_encoder
from blsp.weights.digest import find_weights

SCRIPTS = sorted(path.stem for path in Path(scale.__file__).parent.glob("*.py") if path.stem != "__main__")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_can_be_run(name: str) -> None:
    pytest.importorskip("faster_whisper") if name == "latency" else None
    import_module(f"benchmarks.{name}")


def test_scale_reports_every_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.argv", ["scale", "--most", "10000", "--folder", str(tmp_path)])
    scale.main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [each["rows"] for each in figures["manifests"]] == [1000, 10000]
    assert figures["rows_per_second"] > 0 and figures["rss_growth_mb"] < 64  # ten times the rows, read at random


def test_memory_is_the_sum_of_its_parts(tiny_llm, tiny_whisper: str) -> None:
    figures = memory.estimate(tiny_whisper, tiny_llm(), "conv", "float32", 512, False)
    assert figures["total"] == pytest.approx(sum(v for k, v in figures.items() if k != "total"), abs=0.5)
    tower, _ = load_speech_encoder(find_weights(tiny_whisper), find_runtime("cpu", "float32"))
    frozen = 4 * sum(each.numel() for each in tower.parameters()) / 1e6
    assert figures["frozen_encoder"] == pytest.approx(frozen, abs=0.05)
    checkpointed = memory.estimate(tiny_whisper, tiny_llm(), "conv", "float32", 512, True)
    assert checkpointed["activations"] < figures["activations"]
