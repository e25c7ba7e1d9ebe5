"""Settings of all commands: one frozen dataclass per command; the text below a field is its help.

    shared.py        flags that several commands have, lists of choices, checks
    pipeline.py      prepare, continue, encode, align
    training.py      train
    paper.py         the values of `--paper`, used instead of the defaults
    applications.py  evaluate, generate, transcribe, chat, move, export, tour
    serving.py       serve
    flags.py         flags and YAML files → one settings object

In:  the command line, or a YAML file given with --config, which holds the same flags.
Out: one settings object, checked, handed to one function. Inner functions take plain arguments, not settings.
Try: `TranscribeSettings(files=("question.wav",))`, or `blsp transcribe --help`.

Names of data and models have no default, except the shipped adapter. Other defaults are the paper's (arXiv 2309.00916),
marked "paper", if it has one. A model name is a folder, a hub id, or `embedded:NAME`.
"""

from blsp.settings.applications import (
    ChatSettings,
    EvaluateSettings,
    ExportSettings,
    GenerateSettings,
    MoveSettings,
    TourSettings,
    TranscribeSettings,
)
from blsp.settings.pipeline import AlignSettings, ContinueSettings, EncodeSettings, PrepareSettings
from blsp.settings.serving import ServeSettings
from blsp.settings.shared import DEFAULT_MODEL, SettingsError
from blsp.settings.training import TrainSettings
