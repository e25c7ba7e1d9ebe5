"""Key/values of a batch whose rows join and leave: preallocated slots that all end at one column.

In:  prefilled caches of new rows; one new column of keys and values at each step.
Out: a transformers `Cache` over the columns in use, without copying them at every step.
Try: see `decoding.Decoder`, its only user.
Flow: model/ — the memory under the decode loop.

Letters: R rows, H key/value heads, C columns, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

COLUMNS_AT_A_TIME = 64  # the slots grow by this many tokens


class BatchKVCache:
    """Key/values of all seated rows in preallocated columns; every row ends at column `end`."""

    def __init__(self, layers: int) -> None:
        self.layers = [_SlotLayer(self) for _ in range(layers)]
        self.cache = Cache(layers=self.layers)
        self.start = self.end = 0  # columns [start, end) are in use
        self.active = 0

    def seat(self, cache: DynamicCache, lengths: list[int], *, occupied: int, widest: int) -> None:
        """Copy the valid part of each prefilled row so that it ends where the seated rows end."""
        width = max(widest, *lengths)
        self._reserve(occupied + len(lengths), width, cache)
        self.start = self.end - width
        for layer, filled in zip(self.layers, cache.layers, strict=True):
            for i, length in enumerate(lengths):
                place = slice(self.end - length, self.end)
                layer.buffer_keys[occupied + i, :, place] = filled.keys[i, :, :length]
                layer.buffer_values[occupied + i, :, place] = filled.values[i, :, :length]

    def open_column(self, rows: int, lengths: Tensor) -> Tensor:
        """Make room for one more token a row; returns the mask (R, columns in use + 1)."""
        self._reserve(rows, self.end - self.start, None, after=1)
        self.active = rows
        columns = torch.arange(self.start, self.end + 1, device=lengths.device)
        return (columns[None, :] >= self.end - lengths[:, None]).long()

    def close_column(self) -> None:
        self.end += 1

    def move(self, source: int, target: int) -> None:
        for layer in self.layers:
            for buffer in (layer.buffer_keys, layer.buffer_values):
                buffer[target, :, self.start : self.end] = buffer[source, :, self.start : self.end]

    def take(self, row: int, length: int) -> tuple[tuple[Tensor, Tensor], ...]:
        """A copy of one row's key/values, each (1, H, length, d)."""
        place = (slice(row, row + 1), slice(None), slice(self.end - length, self.end))
        return tuple(
            (layer.buffer_keys[place].clone(), layer.buffer_values[place].clone()) for layer in self.layers
        )

    def _reserve(self, rows: int, width: int, like: DynamicCache | None, after: int = 0) -> None:
        """Room for `rows` rows that are `width` columns wide and `after` columns more; in-use columns are kept."""
        kept = self.end - self.start
        for index, layer in enumerate(self.layers):
            layer.reserve(rows, width, after, (self.start, self.end), like.layers[index] if like else None)
        if self.layers and self.layers[0].moved:
            self.start, self.end = max(width, kept) - kept, max(width, kept)


class _SlotLayer(DynamicLayer):
    """One layer's slots, under the interface that transformers' attention calls."""

    def __init__(self, slots: BatchKVCache) -> None:
        super().__init__()
        self.slots = slots
        self.buffer_keys = self.buffer_values = torch.empty(0, 0, 0, 0)  # (rows, H, columns, d)
        self.moved = False
        self.is_initialized = True

    def reserve(
        self, rows: int, width: int, after: int, used: tuple[int, int], like: DynamicLayer | None
    ) -> None:
        start, end = used
        fits = rows <= self.buffer_keys.shape[0] and width <= end and end + after <= self.buffer_keys.shape[2]
        self.moved = not fits
        if fits:
            return
        width = max(width, end - start)
        capacity = (-(-(width + after) // COLUMNS_AT_A_TIME) + 1) * COLUMNS_AT_A_TIME
        self.buffer_keys = _regrown(
            self.buffer_keys, like.keys if like else None, rows, capacity, used, width
        )
        self.buffer_values = _regrown(
            self.buffer_values, like.values if like else None, rows, capacity, used, width
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the open column (R, H, 1, d); return the columns in use, (R, H, C, d) each."""
        slots = self.slots
        self.buffer_keys[: slots.active, :, slots.end] = key_states[:, :, 0]
        self.buffer_values[: slots.active, :, slots.end] = value_states[:, :, 0]
        view = (slice(0, slots.active), slice(None), slice(slots.start, slots.end + 1))
        return self.buffer_keys[view], self.buffer_values[view]

    def get_seq_length(self) -> int:
        return self.slots.end - self.slots.start


def _regrown(
    buffer: Tensor, like: Tensor | None, rows: int, capacity: int, used: tuple[int, int], width: int
) -> Tensor:
    """A larger buffer in which the columns in use end at `width`."""
    start, end = used
    like = buffer if like is None else like
    grown = like.new_zeros(max(rows, buffer.shape[0]), like.shape[1], capacity, like.shape[3])
    if buffer.numel():
        grown[: buffer.shape[0], :, width - (end - start) : width] = buffer[:, :, start:end]
    return grown
