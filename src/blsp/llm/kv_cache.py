"""Key/values of a running batch: preallocated slots, one a row, that all end at the same column.

In:  prefilled key/values of new rows; one new column of keys and values at each step.
Out: a transformers `Cache` over the columns in use. A step reads them as views, without a copy.
Try: see `decoding.Decoder`, its only user.
Flow: prefix.py (prefill) → **kv_cache.py** ↔ decoding.py

                 start                       end     capacity
                   ↓                          ↓         ↓
    slot 0   . . . x x x x x x x x x x x x x x  _ . . . .     the longest row; x: one token's keys and values
    slot 1   . . . . . . . . x x x x x x x x x  _ . . . .     a shorter row is masked to the left of its first token
    slot 2   . . . . . x x x x x x x x x x x x  _ . . . .     _: the column that the next step fills in each slot
    slot 3   . . . . . . . . . . . . . . . . .  . . . . .     free

A step writes one column and reads the columns from `start` on, as a view. When a row is removed, the last row takes
its slot, and `start` moves to the longest row that is left.

Shapes: R rows in use, H key/value heads, C columns in use, d head width.
"""

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

COLUMNS_AT_A_TIME = 64  # the buffers grow by this many tokens


class BatchKVCache:
    """Key/values of all rows, one `_SlotLayer` for each layer; every row ends before column `end`."""

    def __init__(self, layers: int) -> None:
        self.layers = [_SlotLayer(self) for _ in range(layers)]
        self.cache = Cache(layers=self.layers)
        self.start = self.end = 0  # columns [start, end) are in use
        self.active = 0  # rows in the current step

    def insert(self, cache: DynamicCache, lengths: list[int], *, occupied: int, widest: int) -> None:
        """Copy prefilled rows into the slots from `occupied` on, so that each ends at column `end`.

        cache: right-padded, row i has `lengths[i]` tokens. widest: length of the longest row already in a slot.
        """
        width = max(widest, *lengths)
        self._reserve(occupied + len(lengths), width, like=cache)
        self.start = self.end - width
        for layer, filled in zip(self.layers, cache.layers, strict=True):
            for i, length in enumerate(lengths):
                columns = slice(self.end - length, self.end)
                layer.buffer_keys[occupied + i, :, columns] = filled.keys[i, :, :length]
                layer.buffer_values[occupied + i, :, columns] = filled.values[i, :, :length]

    def open_column(self, rows: int, lengths: Tensor) -> Tensor:
        """Make room for one more token in each row; return the attention mask (R, C + 1) with the new column."""
        self._reserve(rows, self.end - self.start, after=1)
        self.active = rows
        columns = torch.arange(self.start, self.end + 1, device=lengths.device)
        return (columns[None, :] >= self.end - lengths[:, None]).long()

    def close_column(self) -> None:
        """Count the column that the step has written as one in use."""
        self.end += 1

    def remove(self, slot: int, *, last: int, widest: int) -> None:
        """Free `slot`: the row in the slot `last` moves into it. widest: length of the longest row that is left."""
        if slot != last:
            for layer in self.layers:
                for buffer in (layer.buffer_keys, layer.buffer_values):
                    buffer[slot, :, self.start : self.end] = buffer[last, :, self.start : self.end]
        self.start = self.end - widest

    def copy_row(self, slot: int, length: int) -> tuple[tuple[Tensor, Tensor], ...]:
        """A copy of one row's key/values, each (1, H, length, d)."""
        row = (slice(slot, slot + 1), slice(None), slice(self.end - length, self.end))
        return tuple((layer.buffer_keys[row].clone(), layer.buffer_values[row].clone()) for layer in self.layers)

    def _reserve(self, rows: int, width: int, *, like: DynamicCache | None = None, after: int = 0) -> None:
        """Make room for `rows` rows of `width` columns before `end`, and `after` columns behind it.

        If the buffers are too small, the columns in use are copied to larger ones, where they end at column `width`.
        like: key/values with the type, heads and head width of the first buffers.
        """
        first = self.layers[0].buffer_keys  # all layers have buffers of the same number of rows and columns
        if rows <= first.shape[0] and width <= self.end and self.end + after <= first.shape[2]:
            return
        width = max(width, self.end - self.start)
        # one more block of columns, so that the buffers do not grow again at the next step
        columns = (-(-(width + after) // COLUMNS_AT_A_TIME) + 1) * COLUMNS_AT_A_TIME
        for index, layer in enumerate(self.layers):
            keys, values = layer.buffer_keys, layer.buffer_values
            if like is not None:
                keys, values = like.layers[index].keys, like.layers[index].values
            layer.buffer_keys = self._larger(layer.buffer_keys, keys, rows, columns, width)
            layer.buffer_values = self._larger(layer.buffer_values, values, rows, columns, width)
        self.start, self.end = width - (self.end - self.start), width

    def _larger(self, buffer: Tensor, like: Tensor, rows: int, columns: int, end: int) -> Tensor:
        """A new buffer (rows, H, columns, d) with the columns in use copied so that they end at `end`."""
        larger = like.new_zeros(max(rows, buffer.shape[0]), like.shape[1], columns, like.shape[3])
        if buffer.numel():
            used = buffer[:, :, self.start : self.end]
            larger[: buffer.shape[0], :, end - used.shape[2] : end] = used
        return larger


class _SlotLayer(DynamicLayer):
    """One layer's slots, with the methods that transformers' attention calls."""

    def __init__(self, slots: BatchKVCache) -> None:
        super().__init__()
        self.slots = slots
        self.buffer_keys = self.buffer_values = torch.empty(0, 0, 0, 0)  # (rows, H, columns, d)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the open column (R, H, 1, d); return the columns in use with it, (R, H, C + 1, d) each."""
        slots = self.slots
        self.buffer_keys[: slots.active, :, slots.end] = key_states[:, :, 0]
        self.buffer_values[: slots.active, :, slots.end] = value_states[:, :, 0]
        view = (slice(0, slots.active), slice(None), slice(slots.start, slots.end + 1))
        return self.buffer_keys[view], self.buffer_values[view]

    def get_seq_length(self) -> int:
        """Columns in use, without the open one."""
        return self.slots.end - self.slots.start
