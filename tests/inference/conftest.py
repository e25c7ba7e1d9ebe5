"""Listeners made of tiny random parts, shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.tiny_models import tiny_blsp

from blsp.inference.listener import Listener


@pytest.fixture(scope="session")
def listener_of(tiny_models_folder: Path) -> Callable[[str], Listener]:
    """`listener_of(adapter)`: do not change it."""
    made: dict[str, Listener] = {}

    def of(adapter: str = "grounded") -> Listener:
        if adapter not in made:
            made[adapter] = Listener(*tiny_blsp(tiny_models_folder, adapter=adapter))
        return made[adapter]

    return of
