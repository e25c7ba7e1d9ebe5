"""Models that several laws look at: made once a session, in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import tiny_blsp

from blsp.model.modeling_blsp import BlspForConditionalGeneration
from blsp.model.processing_blsp import BlspProcessor

Pair = tuple[BlspForConditionalGeneration, BlspProcessor]


@pytest.fixture(scope="session")
def pair_of(tiny_models_folder: Path) -> Callable[..., Pair]:
    """`pair_of(adapter, family)` is a model and its processor, shared by all tests: do not change them."""
    made: dict[tuple[str, str], Pair] = {}

    def of(adapter: str = "conv", family: str = "llama") -> Pair:
        if (adapter, family) not in made:
            made[adapter, family] = tiny_blsp(tiny_models_folder, family=family, adapter=adapter)
        return made[adapter, family]

    return of
