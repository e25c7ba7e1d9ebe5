"""What follows from frozen tensors is worked out once.

In:  a function and the tensors that it is of.
Out: its value; the same one until a tensor has changed, moved or been replaced.
Try: `Kept().of(torch.exp, torch.zeros(2))`
Flow: model/ — the read-out's table and its spelling, which every clip is compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import is_

import torch
from torch import Tensor


class Kept:
    """What was worked out from a few tensors, until one of them changes."""

    def __init__(self) -> None:
        self._sources: tuple[Tensor, ...] = ()
        self._state: list[tuple[int, int]] = []
        self._value: Tensor | None = None

    def of(self, work_out: Callable[..., Tensor], *sources: Tensor) -> Tensor:
        """`work_out(*sources)`; not again while they are as they were. Where one is learnt, nothing is kept."""
        if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
            return work_out(*sources)
        state = [(source.data_ptr(), source._version) for source in sources]
        same = len(sources) == len(self._sources) and all(map(is_, sources, self._sources))
        if self._value is None or not same or state != self._state:
            self._sources, self._state = sources, state
            self._value = work_out(*sources).detach()
        return self._value
