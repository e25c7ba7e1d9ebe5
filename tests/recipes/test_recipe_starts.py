"""A training's start: the layers that it takes over, and new ones behind them."""

from __future__ import annotations

from pathlib import Path

import torch
from starts import STARTS, make

from blsp.model.adapter import adapter_state
from blsp.model.configuration_blsp import BlspConfig
from blsp.weights.shipped import find_model


def test_the_first_convolutions_of_conv_are_those_of_the_shipped_adapter(tmp_path: Path) -> None:
    assert make(STARTS["conv"], tmp_path / "start") == 4
    start, origin = (
        adapter_state(folder, BlspConfig.from_pretrained(folder))
        for folder in (tmp_path / "start", find_model("blsp-tiny"))
    )
    equal = {name for name in start if name in origin and torch.equal(start[name], origin[name])}
    assert {name for name in equal if name.startswith("stack.")} == {
        f"stack.convs.{number}.{part}" for number in (0, 1) for part in ("weight", "bias")
    }
    assert start["stack.convs.2.weight"].shape[0] == 2 * 576  # new, as wide as the LLM
