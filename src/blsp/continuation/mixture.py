"""What each row is asked: its behaviours and its orders, a pure function of (seed, id).

In:  `--behaviours continue:0.5,repeat:0.1,translate:de:0.4` — with weights every row gets one of them;
     `--behaviours continue,repeat` — without weights every row gets each. Orders are written the same way.
Out: the names that fall to a row.
Try: `parse_mixture("continue:0.7,repeat:0.3").chosen(seed=0, id="clip-1", salt="behaviour")` -> ('continue',)
Flow: continuation/ — read by the plan. A row's lot does not depend on its neighbours: a manifest may be cut,
      joined or shuffled, and each row is still asked the same.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass


class MixtureError(ValueError):
    """A mixture that cannot be read; the message shows the entry and how it should look."""


@dataclass(frozen=True)
class Mixture:
    """Names, and the share of the rows that each one gets; shares None: each name for every row."""

    names: tuple[str, ...]
    shares: tuple[float, ...] | None

    def chosen(self, seed: int, id: str, salt: str) -> tuple[str, ...]:
        """The names for row `id`; `salt` keeps two mixtures over the same rows independent."""
        if self.shares is None:
            return self.names
        digest = hashlib.blake2b(f"{seed}\0{salt}\0{id}".encode(), digest_size=8).digest()
        lot = int.from_bytes(digest, "little") / 2**64
        for name, share in zip(self.names, self.shares, strict=True):
            lot -= share
            if lot < 0:
                return (name,)
        return (self.names[-1],)


def parse_mixture(text: str) -> Mixture:
    """Read `name:weight,name:weight` or `name,name`; a name may hold a colon of its own (`translate:de`)."""
    entries = [_entry(part.strip()) for part in text.split(",") if part.strip()]
    names = tuple(name for name, _ in entries)
    weights = [weight for _, weight in entries if weight is not None]
    if not names or len(set(names)) != len(names):
        raise MixtureError(f"{text!r}: name each choice once, as in continue:0.7,repeat:0.3")
    if weights and len(weights) != len(names):
        raise MixtureError(
            f"{text!r}: give all a weight (each row gets one of them) or none (each row gets all)"
        )
    return Mixture(names, tuple(weight / sum(weights) for weight in weights) if weights else None)


def _entry(part: str) -> tuple[str, float | None]:
    name, colon, last = part.rpartition(":")
    try:
        weight = float(last) if colon else None
    except ValueError:
        return part, None
    if weight is None:
        return part, None
    if not math.isfinite(weight) or weight <= 0:
        raise MixtureError(f"{part!r}: a weight must be a number above 0")
    return name, weight
