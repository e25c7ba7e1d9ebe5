"""Flags and the YAML file that stands for them → one settings object.

In:  a settings class and the flags; `--config FILE` among them names a YAML mapping of the same flags, with
     hyphens or underscores: `batch-size: 64`, `augment: [speed, noise]`, `pad-to-30s: true`, `cache: null`
     (left out).
Out: the settings, parsed by tyro. The command line wins over the file, wherever the file says it; a flag that
     takes several values may be given several times.
Try: `read_settings(TrainSettings, ["--config", "recipes/blsp-tiny/train.yaml"], prog="blsp train")`
Flow: cli.py → **configuration_file.py** → settings/

A file for `blsp train` may hold `stages:`, a list of mappings, each with a `name`. A stage is the top level
with its own flags on top, writes to OUT/stages/NAME and starts from the stage before, or from what its own
`init-from` names: earlier stages or adapters. A typed `--init-from` is where the first stage starts.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from blsp.settings import SettingsError

Settings = TypeVar("Settings")
Mapping = dict[str, Any]


def read_settings(kind: type[Settings], flags: Sequence[str], prog: str) -> Settings:
    """Settings of class `kind`; raises SettingsError on a bad file, exits with 2 on a bad flag."""
    flags = _gathered(kind, flags)
    file = _config_flag(flags)
    if file is None or "config" not in _fields(kind):
        return _parse(kind, flags, prog)
    mapping = _read_mapping(file)
    stages = mapping.pop("stages", None) if "stages" in _fields(kind) else None
    top = _as_flags(kind, mapping, str(file))
    if stages is None:
        return _parse(kind, [*top, *flags], prog)
    return _with_stages(kind, top, _checked_stages(stages, file), flags, file, prog)


def _parse(kind: type[Settings], flags: Sequence[str], prog: str) -> Settings:
    return tyro.cli(kind, args=list(flags), prog=prog, description=inspect.getdoc(kind))


def _with_stages(
    kind: type[Settings], top: list[str], stages: list[Mapping], flags: Sequence[str], file: Path, prog: str
) -> Settings:
    """The top level, holding every stage resolved: its own flags, its folder, and what it starts from."""
    resolved: list[Any] = []
    for stage in stages:
        own = _as_flags(
            kind, {key: value for key, value in stage.items() if key != "name"}, f"{file}, {stage['name']}"
        )
        given: Any = _parse(kind, [*top, *own, *flags], prog)
        ended = {each.out.name: str(each.out / "adapter") for each in resolved}
        start = given.init_from
        if resolved:
            wanted = stage.get("init_from", resolved[-1].out.name)
            wanted = wanted if isinstance(wanted, list) else [wanted]
            start = tuple(ended.get(name, name) for name in wanted)
        resolved.append(dataclasses.replace(given, out=given.out / "stages" / stage["name"], init_from=start))
    whole: Any = dataclasses.replace(resolved[0], out=resolved[0].out.parent.parent)
    return dataclasses.replace(whole, stages=tuple(resolved))


def _checked_stages(stages: Any, file: Path) -> list[Mapping]:
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise SettingsError(
            f"{file}: stages: must be a list of mappings, as in [{{name: grounding, loss: ctc}}]"
        )
    stages = [_with_underscores(stage) for stage in stages]
    names = [stage.get("name") for stage in stages]
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]*\w", name) or names.count(name) > 1:
            raise SettingsError(
                f"{file}: stages: name {name!r}: each needs a name of its own that can name a folder"
            )
    for stage in stages:
        if "out" in stage or "config" in stage:
            raise SettingsError(
                f"{file}: stage {stage['name']!r}: `out` and `config` belong to the top level"
            )
    return stages


def _as_flags(kind: type, mapping: Mapping, where: str) -> list[str]:
    """The mapping spelled as flags; every key must be a field of `kind`."""
    fields = _fields(kind)
    flags: list[str] = []
    for key, value in mapping.items():
        if key not in fields or key in ("config", "stages"):
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; it knows {', '.join(fields)}"
            raise SettingsError(f"{where}: unknown setting {key!r}{hint}")
        flags += _flag(fields[key], value, where)
    return flags


def _flag(field: dataclasses.Field[Any], value: Any, where: str) -> list[str]:
    """One setting as it would be typed; null is what is not typed."""
    flag, kind = f"--{field.name.replace('_', '-')}", str(field.type)
    if value is None:
        return []
    if isinstance(value, bool) != (kind == "bool"):
        raise SettingsError(
            f"{where}: {field.name}: {value!r} is not {'true or false' if kind == 'bool' else kind}"
        )
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    values = value if isinstance(value, list) else [value]
    if any(isinstance(item, dict | list | bool) or item is None for item in values):
        raise SettingsError(f"{where}: {field.name}: {value!r} is not {kind}")
    if isinstance(value, list) and "tuple" not in kind:
        raise SettingsError(f"{where}: {field.name}: takes one value, not the list {value!r}")
    words = [str(item) for item in values]
    if "Positional" in kind:
        return words
    return [f"{flag}={words[0]}"] if "tuple" not in kind else [flag, *words]


def _gathered(kind: type, flags: Sequence[str]) -> list[str]:
    """`--task a --task b` means `--task a b`: a flag that takes several values may be given several times."""
    several = {
        f"--{field.name.replace('_', '-')}" for field in _fields(kind).values() if _takes_several(field)
    }
    found: dict[str, list[str]] = {}
    rest: list[str] = []
    words = rest
    for flag in flags:
        name, equals, value = flag.partition("=")
        name = name.replace("_", "-")
        if name in several:
            words = found.setdefault(name, [])
            words += [value] if equals else []
            continue
        words = rest if flag.startswith("-") else words
        words.append(flag)
    return [*rest, *(word for name, values in found.items() for word in (name, *values))]


def _takes_several(field: dataclasses.Field[Any]) -> bool:
    return "tuple" in str(field.type) and "Positional" not in str(field.type)


def _config_flag(flags: Sequence[str]) -> Path | None:
    """The file that --config names, the last one if several do."""
    file = None
    for place, flag in enumerate(flags):
        if flag.startswith("--config="):
            file = Path(flag.removeprefix("--config="))
        elif flag == "--config" and place + 1 < len(flags):
            file = Path(flags[place + 1])
    return file


def _read_mapping(file: Path) -> Mapping:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"--config {file}: cannot be read: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise SettingsError(f"--config {file}: must hold a mapping of flags, as in `steps: 100`")
    return _with_underscores(content)


def _with_underscores(mapping: Mapping) -> Mapping:
    return {str(key).replace("-", "_"): value for key, value in mapping.items()}


def _fields(kind: type) -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(kind)}
