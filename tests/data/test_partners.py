"""Partners: the next clip, unless it says the same."""

from __future__ import annotations

import pytest

from blsp.data.partners import partners


@pytest.mark.parametrize(
    "texts, expected",
    [
        ([], []),
        (["a"], [0]),
        (["a", "b", "c"], [1, 2, 0]),
        (["a", "a", "b", "b", "c"], [2, 2, 4, 4, 0]),
        (["a", "b", "a"], [1, 2, 1]),
        (["a", "a", "a"], [1, 2, 0]),
    ],
)
def test_the_next_clip_that_says_something_else(texts: list[str], expected: list[int]) -> None:
    assert partners(texts) == expected
