"""Every mutant of tests/mutants.py can still be applied to the source."""

from __future__ import annotations

import ast

import pytest
from mutants import MUTANTS, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_fits_the_source(mutant: Mutant) -> None:
    ast.parse(mutant.text())
