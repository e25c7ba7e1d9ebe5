"""What every command can be told: one frozen dataclass per command; a field's docstring is its help text.

In:  the command line, read by tyro (a YAML file given with --config is the same flags written down).
Out: one settings object, checked, handed to one function. Inner functions take plain arguments, not settings.
Try: `TranscribeSettings(files=("question.wav",))`, or `blsp transcribe --help`.

Data and model names have no default, the shipped adapter excepted. Other defaults are the paper's where it
has one (arXiv 2309.00916, marked "paper"). A model name is a folder, a hub id, or `embedded:NAME`.
"""

from blsp.settings.applications import (
    ChatSettings,
    EvaluateSettings,
    ExportSettings,
    GenerateSettings,
    ServeSettings,
    TourSettings,
    TranscribeSettings,
)
from blsp.settings.pipeline import ContinueSettings, EncodeSettings, PrepareSettings, TrainSettings
from blsp.settings.shared import SettingsError

__all__ = [
    "SettingsError",
    "PrepareSettings",
    "ContinueSettings",
    "EncodeSettings",
    "TrainSettings",
    "EvaluateSettings",
    "GenerateSettings",
    "TranscribeSettings",
    "ChatSettings",
    "ServeSettings",
    "ExportSettings",
    "TourSettings",
]
