"""Partners: for each clip, another one in which something else is said.

In:  what is said in each clip, in order. Out: for each clip the number of its partner.
Try: `partners(["yes", "yes", "no"])` → [2, 2, 0]
Flow: **partners** → exchanged clips in the figures of training (probes.py) and evaluation (alignment.py, following.py)

Several speakers may read one sentence. If such clips were exchanged, an adapter that listens would look deaf.
"""

from collections.abc import Hashable, Sequence


def partners(texts: Sequence[Hashable]) -> list[int]:
    """For each text the next other one, after the last one from the first on; if there is none, just the next one."""
    count = len(texts)
    found = []
    for number, text in enumerate(texts):
        others = ((number + step) % count for step in range(1, count))
        found.append(next((other for other in others if texts[other] != text), (number + 1) % count))
    return found
