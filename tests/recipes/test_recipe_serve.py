"""recipes/serve: its commands are valid, and the panel uses existing metrics."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import yaml

from blsp import cli
from blsp.serving.metrics import Metrics

SERVE = Path(__file__).parents[2] / "recipes" / "serve"


def test_the_unit_and_the_compose_file_start_the_server(monkeypatch) -> None:
    unit = (SERVE / "blsp.service").read_text(encoding="utf-8")
    (line,) = re.findall(r"^ExecStart=(.*)$", unit, flags=re.MULTILINE)
    compose = yaml.safe_load((SERVE / "compose.yml").read_text(encoding="utf-8"))["services"]["blsp"]
    for words, grace in (
        (shlex.split(line), re.search(r"^TimeoutStopSec=(\d+)$", unit, flags=re.MULTILINE)),
        (compose["command"], re.fullmatch(r"(\d+)s", compose["stop_grace_period"])),
    ):
        assert Path(words[0]).name == "blsp" and words[1] == "serve"
        settings = cli.parse("serve", words[2:])
        assert settings.log_format == "json"
        assert grace and int(grace[1]) > settings.deadline, "accepted requests are answered before the end"
    assert (SERVE / compose["build"]["context"] / compose["build"]["dockerfile"]).is_file()


def test_the_llm_of_the_second_compose_file_is_not_open_to_others() -> None:
    services = yaml.safe_load((SERVE / "compose-vllm.yml").read_text(encoding="utf-8"))["services"]
    settings = cli.parse("serve", services["blsp"]["command"][2:])
    assert settings.engine_url == ("http://llm:8000/v1",)
    assert "--enable-prompt-embeds" in services["llm"]["command"]
    assert "ports" not in services["llm"] and services["llm"]["networks"] == ["inside"]


def test_the_panel_asks_for_metrics_that_the_server_has() -> None:
    names = {sample.name for family in Metrics().registry.collect() for sample in family.samples}
    names |= {f"{family.name}_{end}" for family in Metrics().registry.collect() for end in ("total", "bucket")}
    panel = json.loads((SERVE / "grafana-panel.json").read_text(encoding="utf-8"))
    asked = [target["expr"] for part in panel["panels"] for target in part["targets"]]
    assert asked
    for name in re.findall(r"blsp_\w+", " ".join(asked)):
        assert name in names, name
    page = (SERVE.parents[1] / "docs" / "operations.md").read_text(encoding="utf-8")
    for name in set(re.findall(r"`(blsp_\w+)", page)):
        assert name in names or any(known.startswith(name) for known in names), name
