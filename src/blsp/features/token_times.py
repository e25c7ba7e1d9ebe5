"""Times at which the tokens of transcripts are spoken: the store beside the features, and the adapter's places.

In:  for a clip and its transcript, one encoder frame (int16, 50/s) for each token, as `blsp align` finds them.
Out: `DIR/<encoder>/token_times.sqlite`; for training, the place of each token among an adapter's vectors.
Try: `token_places(np.array([0, 11, 13, 40]), 9, 8, 0.0)`   # -> [0, 1, 2, 5]
Flow: features/align.py → **token_times.py** → training/examples.py (`--loss embed`)

Shapes: U transcript tokens, S places of an adapter.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from blsp.features.cache import FeatureCache, key_of

Times = NDArray[np.int16]


class TokenTimes:
    """The store: (features of a clip, transcript ids) → the encoder frame at which each token is spoken."""

    def __init__(self, cache: FeatureCache) -> None:
        # a thread that reads examples ahead uses it too
        self._database = sqlite3.connect(cache.folder / "token_times.sqlite", timeout=60, check_same_thread=False)
        self._database.execute("create table if not exists times (key blob primary key, frames blob) without rowid")

    def __len__(self) -> int:
        return int(self._database.execute("select count(*) from times").fetchone()[0])

    def get(self, feature_key: bytes, tokens: Sequence[int]) -> Times | None:
        """(U,) encoder frames, or None where this transcript was not aligned with this clip."""
        query = "select frames from times where key = ?"
        found = self._database.execute(query, [_key(feature_key, tokens)]).fetchone()
        return None if found is None else np.frombuffer(found[0], dtype="<i2")

    def add(self, entries: Sequence[tuple[bytes, Sequence[int], Times]]) -> None:
        """Add (feature key, tokens, times) of several clips in one transaction."""
        rows = [(_key(key, tokens), times.astype("<i2").tobytes()) for key, tokens, times in entries]
        with self._database:
            self._database.executemany("insert or replace into times values (?, ?)", rows)


def _key(feature_key: bytes, tokens: Sequence[int]) -> bytes:
    return key_of(feature_key + np.asarray(tokens, "<u4").tobytes())


def token_places(times: Times, places: int, frames_per_place: int, first_centre: float) -> NDArray[np.int64] | None:
    """The place (U,) of each token among S = `places`, strictly increasing; None where there are more tokens.

    A token goes to the place whose centre is nearest. Where several meet in one, they make room to both sides.
    frames_per_place, first_centre: of the adapter, in encoder frames (`place_centres`).
    """
    if len(times) > places:
        return None
    order = np.arange(len(times))
    nearest = np.rint((times - first_centre) / frames_per_place).astype(np.int64)
    # Strictly increasing places are a non-decreasing row after `order` is taken off: the mean of the row that is
    # pushed to the right and the one that is pushed to the left. [3, 3, 3] - [0, 1, 2] -> [3, 3, 3], [1, 1, 1] -> 2
    slack = nearest - order
    right = np.maximum.accumulate(slack)
    left = np.minimum.accumulate(slack[::-1])[::-1]
    return np.clip((right + left) // 2, 0, places - len(times)) + order
