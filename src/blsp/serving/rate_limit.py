"""Limits per minute for each client: requests, wrong keys, lines in the log.

In:  the address of a client. Out: seconds to wait, 0 if the request is allowed.
Try: `RateLimit(60).wait("192.0.2.7")`
Flow: middleware.py → **rate_limit.py**
"""

from __future__ import annotations

import time
from collections import OrderedDict

CLIENTS = 10_000  # addresses in memory; the least recently seen one is dropped first


class RateLimit:
    """At most `per_minute` requests of each client, all at once or spread; 0: no limit. Not thread-safe."""

    def __init__(self, per_minute: int) -> None:
        self._most = per_minute
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # requests left, at which time

    def wait(self, client: str) -> float:
        """Count a request; the seconds until it would be allowed, 0 if it is allowed now."""
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
    """Decides whether an event is logged: each kind once a minute, with the number of events since the last line."""

    SECONDS = 60.0

    def __init__(self) -> None:
        self._kinds: OrderedDict[str, tuple[float, int]] = OrderedDict()  # when written, how many since

    def count(self, kind: str) -> int:
        """0: do not log it; otherwise the number of events since the last line, with this one."""
        now = time.monotonic()
        written, silent = self._kinds.pop(kind, (-self.SECONDS, 0))
        say = now - written >= self.SECONDS
        self._kinds[kind] = (now, 0) if say else (written, silent + 1)
        if len(self._kinds) > CLIENTS:
            self._kinds.popitem(last=False)
        return silent + 1 if say else 0
