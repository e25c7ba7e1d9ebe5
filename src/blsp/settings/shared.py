"""What the commands' settings share: choices, and the complaint about a value that cannot be meant.

In and out: types and a check, used by `making.py` and `using.py`.
Try: `above_zero(settings, "batch_size")`
"""

from __future__ import annotations

from typing import Literal

Device = str  # "auto", "cpu", "cuda", "cuda:1", "mps"
Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]
TalkDtype = Literal["fastest", Dtype]  # may differ by processor
Order = Literal["instruction-first", "speech-first"]
Normalise = Literal["none", "whisper"]


class SettingsError(ValueError):
    """A setting that cannot be meant; the message names the flag, the value and what would do."""


def above_zero(settings: object, *names: str) -> None:
    """Raise SettingsError for the first of these fields that is given and not above 0 (nan is not)."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise SettingsError(f"--{name.replace('_', '-')} {value}: must be above 0")


def can_sample(temperature: float, top_p: float) -> None:
    """Raise SettingsError for a temperature or a top-p that nothing can be drawn with."""
    if not temperature >= 0:
        raise SettingsError(f"--temperature {temperature}: must be 0 or more")
    if not 0 < top_p <= 1:
        raise SettingsError(f"--top-p {top_p}: must be above 0 and at most 1")
