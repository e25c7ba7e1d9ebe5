"""The keys of many JSONL rows at once, as 64-bit hashes, straight from the bytes.

    >>> hashes, certain = hash_keys(buffer, starts, ends, ("id",))

A row is taken from its bytes when the token `"id"` stands in it exactly once, as a name with a string value
that has no backslash; then value and hash are found with array operations. Every other row is left to the
caller, who parses its JSON and asks `key_of`. Used by `row_index.py` alone.

Letters: n rows, m tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from blsp.data.jsonl import ManifestError, show

QUOTE, BACKSLASH, SPACE, COLON = (ord(c) for c in '"\\ :')
PADDING = 64  # zero bytes after the buffer, so that looking a little ahead needs no bounds check
# constants of MurmurHash3's 64-bit finaliser
MIX_A, MIX_B = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)
SHIFT = np.uint64(33)
LOW_BYTES = np.array([(1 << 8 * i) - 1 for i in range(8)] + [2**64 - 1], dtype=np.uint64)


def key_of(row: dict[str, Any], key: tuple[str, ...], where: str) -> tuple[tuple[str, ...], np.uint64]:
    """The values of a parsed row's key and their hash; fields other than "id" may be missing."""
    values = []
    for name in key:
        value = row.get(name)
        if value is None and name != "id":
            value = ""
        if not isinstance(value, str) or (name == "id" and not value):
            raise ManifestError(f'{where}: "{name}" must be a string that is not empty, not {show(value)}')
        values.append(value)
    combined = np.zeros(1, dtype=np.uint64)
    for value in values:
        raw = value.encode("utf-8")
        padded = np.frombuffer(raw + bytes(PADDING), dtype=np.uint8)
        combined = _combine(combined, hash_spans(padded, np.array([0]), np.array([len(raw)])))
    return tuple(values), combined[0]


def hash_keys(
    buffer: np.ndarray, starts: np.ndarray, ends: np.ndarray, key: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Hashes (n,) uint64 of the rows `buffer[starts:ends]`, and (n,) bool where they can be relied upon."""
    padded = np.concatenate([buffer, np.zeros(PADDING, dtype=np.uint8)])
    quotes = np.flatnonzero(buffer == QUOTE)
    backslashes = np.flatnonzero(buffer == BACKSLASH)
    combined = np.zeros(len(starts), dtype=np.uint64)
    certain = np.ones(len(starts), dtype=bool)
    for name in key:
        first, last, found = _find_values(padded, quotes, backslashes, ends, name)
        certain &= found
        hashes = np.zeros(len(starts), dtype=np.uint64)
        hashes[found] = hash_spans(padded, first[found], last[found])
        combined = _combine(combined, hashes)
    return combined, certain


def _find_values(
    padded: np.ndarray, quotes: np.ndarray, backslashes: np.ndarray, ends: np.ndarray, name: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the value of `name` lies in each row: first and last byte (n,) (n,), and whether that is
    certain (n,)."""
    first, last = np.zeros(len(ends), dtype=np.int64), np.zeros(len(ends), dtype=np.int64)
    certain = np.zeros(len(ends), dtype=bool)
    order = _find_tokens(padded, quotes, name)  # (m,) places in `quotes`
    token = quotes[order]
    row = np.searchsorted(ends, token)  # (m,)
    alone = np.bincount(row, minlength=len(ends))[row] == 1
    after = token + len(name) + 2
    after += padded[after] == SPACE
    colon = padded[after] == COLON
    after += 1
    after += padded[after] == SPACE
    closing = np.append(quotes, [len(padded)] * 3)[order + 3]  # name's two quotes, value's two
    good = alone & colon & (padded[after] == QUOTE) & (closing < ends[row]) & (closing > after + 1)
    escaped = np.searchsorted(backslashes, after) != np.searchsorted(backslashes, closing)
    good &= ~escaped
    first[row[good]], last[row[good]] = after[good] + 1, closing[good]
    certain[row[good]] = True
    return first, last, certain


def _find_tokens(padded: np.ndarray, quotes: np.ndarray, name: str) -> np.ndarray:
    """Which `quotes` (as places in that array) open the token `"name"`; (m,)."""
    order = np.arange(len(quotes))
    for ahead, letter in enumerate(f'{name}"'.encode(), start=1):
        order = order[padded[quotes[order] + ahead] == letter]
    before = quotes[order] - 1
    return order[(before < 0) | (padded[before] != BACKSLASH)]


def hash_spans(padded: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """64-bit hashes (n,) of the byte strings `padded[first:last]`; `padded` ends in `PADDING` spare bytes."""
    length = (last - first).astype(np.int64)
    hashes = _mix(length.astype(np.uint64) + MIX_B)
    words = np.lib.stride_tricks.sliding_window_view(padded, 8)
    active = np.flatnonzero(length > 0)
    at = 0
    while len(active):
        left = np.minimum(length[active] - at, 8)
        word = np.ascontiguousarray(words[first[active] + at]).view("<u8")[:, 0] & LOW_BYTES[left]
        hashes[active] = _mix((hashes[active] ^ word) * MIX_A + MIX_B)
        at += 8
        active = active[length[active] > at]
    return hashes


def _combine(hashes: np.ndarray, further: np.ndarray) -> np.ndarray:
    return _mix(hashes * MIX_B + further)


def _mix(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> SHIFT)) * MIX_A
    values = (values ^ (values >> SHIFT)) * MIX_B
    return values ^ (values >> SHIFT)
