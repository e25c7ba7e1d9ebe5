"""Shared parts of the commands' settings: common flags, lists of choices, checks of values.

In:  the settings classes of the other files, which use these types for their fields.
Out: types with their own help text; `Choices`, which reads a list from the dict that owns it.
Try: `Choices("blsp.model.adapter", "ADAPTERS").keys()`
Flow: **shared.py** → pipeline.py, training.py, applications.py, serving.py → flags.py, which turns a class into flags
"""

from __future__ import annotations

import ast
import datetime
import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import yaml

DEFAULT_MODEL = "blsp-tiny"  # the only default name of a model


class SettingsError(ValueError):
    """A wrong value; the message names the flag, the value and what is allowed."""


@dataclass(frozen=True)
class Choices:
    """The allowed values of a flag: the keys of the dict `name` in `module`.

    The module may import torch, which is too slow for `--help`. So the keys are read from the text of the file; keys
    that a plugin has added come from the loaded module.
    """

    module: str
    name: str

    def keys(self) -> tuple[str, ...]:
        """The keys, in the dict's order."""
        file = Path(__file__).parents[1].joinpath(*self.module.split(".")[1:]).with_suffix(".py")
        written: list[str] = []
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == self.name:
                assert isinstance(node.value, ast.Dict), f"{file}: {self.name} must be written out as a dict"
                written = [str(ast.literal_eval(key)) for key in node.value.keys if key is not None]
        loaded = getattr(sys.modules.get(self.module), self.name, {})
        return tuple(dict.fromkeys([*written, *loaded]))


# Flags that several commands have: a type and its help text, which a field's own docstring replaces.
Precision = Literal["auto", "float32", "bfloat16", "float16", "float64"]
Device = Annotated[str, "where to run: auto, cpu, cuda, cuda:1, mps"]
Dtype = Annotated[
    Precision,
    "the number format of the frozen weights; auto: bfloat16 if the device is fast with it, otherwise float32",
]
LlmWeights = Annotated[
    Literal["bfloat16", "int8", "int4"] | None,
    "the format of the LLM's weights (its embeddings and head are bfloat16); int8, int4: less memory, and faster if "
    "memory is slow (pip install 'blsp[quant]'); without: as --dtype",
]
ShardLlm = Annotated[
    bool, "under torchrun: split the layers of the LLM over the processes (FSDP2), where it is too large for one device"
]
Attention = Annotated[
    str | None,
    "the LLM's attention, as transformers names it: sdpa (what it takes by itself), eager, flash_attention_2",
]
Rescore = Annotated[
    Literal["auto", "always", "never"],
    "let the LLM choose one of the adapter's likeliest read-outs: fewer wrong words, but the answer begins later; "
    "auto: as in the adapter's config.json",
]
ConfigFile = Annotated[Path | None, "a YAML file with these same flags"]
Limit = Annotated[int | None, "read only this many rows"]
Order = Literal["instruction-first", "speech-first"]
Normalise = Literal["none", "whisper"]
VoiceActivity = Literal["auto", "silero", "none"]
TranscriptFormat = Literal["jsonl", "json", "txt", "srt", "vtt"]
Temperature = Annotated[float, "0 takes the most probable token each time"]
TopP = Annotated[float, "when sampling: draw from the most probable tokens that together have this probability"]


AudioModel = Annotated[str | None, "where the adapter's speech encoder is now, if not where its config.json says"]
Llm = Annotated[str | None, "where the adapter's LLM is now, if not where its config.json says"]
TemplateArg = Annotated[
    tuple[str, ...], "NAME=VALUE of a variable of the LLM's chat template, as in enable_thinking=false"
]
Paper = Annotated[
    bool, "use exactly the paper's settings (settings/paper.py) instead of the defaults; other flags replace them"
]
CollectiveMinutes = Annotated[
    float, "with several processes: minutes that one waits for the others before the run stops"
]
NoThinking = Annotated[bool, "the same as --template-arg enable_thinking=false"]


def read_template_args(flags: Sequence[str], no_thinking: bool) -> dict[str, Any]:
    """The variables of the chat template, with values read as YAML; raises SettingsError for wrong ones."""
    args: dict[str, Any] = {}
    for flag in flags:
        name, equals, text = flag.partition("=")
        if not equals or not name.isidentifier():
            raise SettingsError(f"--template-arg {flag}: must read NAME=VALUE, as in enable_thinking=false")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise SettingsError(f"--template-arg {flag}: {text!r} is not YAML") from error
        args[name] = str(value) if isinstance(value, datetime.date) else value
    if no_thinking and args.setdefault("enable_thinking", False) is not False:
        raise SettingsError(f"--no-thinking: but --template-arg sets enable_thinking={args['enable_thinking']}")
    return args


def flag_texts(kind: type) -> dict[str, str]:
    """The help text of each field: the string below it in the class, or the text of its type."""
    hints = get_type_hints(kind, include_extras=True)
    extras = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    texts = {name: text for name in extras for text in extras[name] if isinstance(text, str)}
    body = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(body, ast.ClassDef)
    for field, text in pairwise(body.body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            texts[ast.unparse(field.target)] = " ".join(str(ast.literal_eval(text.value)).split())
    return texts


def flag_groups(kind: Any) -> dict[str, str]:
    """The group of each field from the class's `GROUPS`, or "", in the order of `--help`."""
    named = {name: group for group, names in getattr(kind, "GROUPS", {}).items() for name in names.split()}
    return named | {field.name: "" for field in fields(kind) if field.name not in named}


def above_zero(settings: object, *names: str) -> None:
    """Raise SettingsError for the first of these fields that is given and not above 0 (nan is not above 0)."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise SettingsError(f"--{name.replace('_', '-')} {value}: must be above 0")


def can_sample(temperature: float, top_p: float) -> None:
    """Raise SettingsError for an invalid temperature or top-p."""
    if not temperature >= 0:
        raise SettingsError(f"--temperature {temperature}: must be 0 or more")
    if not 0 < top_p <= 1:
        raise SettingsError(f"--top-p {top_p}: must be above 0 and at most 1")
