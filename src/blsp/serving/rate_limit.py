"""Limits on how often a client may ask, and how often it may guess a key.

In:  the address of a client. Out: seconds to wait, 0 where it may go on.
Try: `RateLimit(60).wait("192.0.2.7")`
Flow: middleware.py → **rate_limit.py**
"""

from __future__ import annotations

import time
from collections import OrderedDict

CLIENTS = 10_000  # addresses that are remembered; the one that has been quiet for the longest is forgotten


class RateLimit:
    """At most `per_minute` requests of each client, at once or spread; 0: no limit. Not for several threads."""

    def __init__(self, per_minute: int) -> None:
        self._most = per_minute
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # requests left, at which time

    def wait(self, client: str) -> float:
        """Count a request; the seconds until it would be taken, 0 where it is taken now."""
        if not self._most:
            return 0.0
        now = time.monotonic()
        left, before = self._left.pop(client, (float(self._most), now))
        left = min(float(self._most), left + (now - before) * self._most / 60)
        taken = left >= 1
        self._left[client] = (left - taken, now)
        if len(self._left) > CLIENTS:
            self._left.popitem(last=False)
        return 0.0 if taken else (1 - left) * 60 / self._most


class Quiet:
    """Whether an event of a kind is to be written into the log: once a minute, with the number of those before it."""

    SECONDS = 60.0

    def __init__(self) -> None:
        self._kinds: OrderedDict[str, tuple[float, int]] = OrderedDict()  # when written, how many since

    def count(self, kind: str) -> int:
        """0: not now; else how many events there were since the last line, this one included."""
        now = time.monotonic()
        written, silent = self._kinds.pop(kind, (-self.SECONDS, 0))
        say = now - written >= self.SECONDS
        self._kinds[kind] = (now, 0) if say else (written, silent + 1)
        if len(self._kinds) > CLIENTS:
            self._kinds.popitem(last=False)
        return silent + 1 if say else 0
