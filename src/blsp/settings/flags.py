"""Reading of flags and YAML files into one settings object.

In:  a settings class and the flags. `--config FILE` among them names a YAML mapping of the same flags, with
     hyphens or underscores: `batch-size: 64`, `augment: [speed, noise]`, `pad-to-30s: true`, `cache: null`
     (not given).
Out: the settings. A typed flag replaces the file's value, and the file's value replaces that of `--paper`. A flag with
     several values may be given several times.
Try: `read_settings(TrainSettings, ["--config", "recipes/blsp-tiny/train.yaml"], prog="blsp train")`
Flow: cli.py → **flags.py** → tyro, over the classes of pipeline.py, training.py, applications.py and serving.py

A file for `blsp train` may hold `stages:`, a list of mappings, each with a `name`. A stage has the flags of the top
level and its own. It writes to OUT/stages/NAME and starts from the adapter of the previous stage, or from its own
`init-from` (earlier stages or adapters). The first stage starts from a typed `--init-from`.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import tyro
import yaml
from tyro.constructors import ConstructorRegistry, PrimitiveTypeInfo, UnsupportedTypeAnnotationError

from blsp.settings.paper import PAPER
from blsp.settings.shared import Choices, SettingsError, flag_groups, flag_texts

Settings = TypeVar("Settings")
Values = dict[str, Any]
NOT_IN_FILES = ("config", "stages")


def read_settings(kind: type[Settings], flags: Sequence[str], prog: str) -> Settings:
    """Settings of class `kind`; raises SettingsError for a wrong file, exits with 2 for a wrong flag."""
    names = _fields(kind)
    file = _config_file(flags) if "config" in names else None
    if file is None:
        return _parse(kind, flags, {}, prog)
    mapping = _read_mapping(file)
    stages = mapping.pop("stages", None) if "stages" in names else None
    values = _typed_values(kind, mapping, str(file))
    if stages is None:
        return _parse(kind, flags, values, prog)
    return _read_stages(kind, flags, values, _checked_stages(stages, file), file, prog)


def _parse(kind: Any, flags: Sequence[str], defaults: Values, prog: str) -> Any:
    """The flags, read by tyro with these `defaults` and checked by the class; exits with 2 if one is wrong."""
    if "--paper" in flags or defaults.get("paper"):
        defaults = PAPER[kind.__name__] | defaults
    parsed: Any = tyro.cli(
        _flags_in_groups(kind, defaults), args=_join_repeated(kind, flags), prog=prog, description=inspect.getdoc(kind)
    )
    given = {name: value for group in vars(parsed).values() for name, value in vars(group).items()}
    try:
        return kind(**given)
    except SettingsError as error:
        print(f"blsp: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _flags_in_groups(kind: Any, defaults: Values) -> type:
    """The fields of `kind` as a class of classes, one per group: tyro shows each group in its own box.

    Example: `lr` and `steps` become the class `Flags(lr, steps)`, in a field with the name "optimisation". The flags
    are still `--lr` and `--steps`, without the group's name (`prefix_name=False`).
    """
    texts, types, groups = flag_texts(kind), _types(kind), flag_groups(kind)
    members: dict[str, list[Any]] = {}
    for name in groups:
        if name == "stages":
            continue
        field = kind.__dataclass_fields__[name]
        flag = tyro.conf.arg(help=texts.get(name), prefix_name=False)
        default = dataclasses.field(default=defaults.get(name, field.default))
        members.setdefault(groups[name], []).append((name, Annotated[types[name], flag], default))
    boxes = []
    for number, (group, fields) in enumerate(members.items()):
        flags = dataclasses.make_dataclass("Flags", fields, kw_only=True)
        boxes.append((f"group_{number}", Annotated[flags, tyro.conf.arg(name=group, help="")]))
    return dataclasses.make_dataclass("Groups", boxes)


def _types(kind: type) -> dict[str, Any]:
    """The types of the fields; `Choices` become a Literal of the present keys of their dict."""
    types = get_type_hints(kind, include_extras=True)
    for name, hint in types.items():
        for extra in getattr(hint, "__metadata__", ()):
            if isinstance(extra, Choices):
                types[name] = Annotated[(Literal[extra.keys()], *hint.__metadata__)]
    return types


def _typed_values(kind: type, mapping: Values, where: str) -> Values:
    """The mapping's values in the types of the fields; null means not given. Every key must be a field."""
    fields, types, values = _fields(kind), _types(kind), {}
    for key, value in mapping.items():
        if key not in fields or key in NOT_IN_FILES:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; it knows {', '.join(fields)}"
            raise SettingsError(f"{where}: unknown setting {key!r}{hint}")
        if value is not None:
            values[key] = _typed(str(fields[key].type), types[key], value, f"{where}: {key}")
    return values


def _typed(written: str, hint: Any, value: Any, where: str) -> Any:
    """One value of a file, converted by tyro like a typed flag, since YAML reads 1e-3 as text.

    written: the type as it is written in the class, for messages.
    """
    is_switch = getattr(hint, "__origin__", hint) is bool  # `bool`, or `Annotated[bool, "its help"]`
    if isinstance(value, bool) or is_switch:
        if isinstance(value, bool) and is_switch:
            return value
        raise SettingsError(f"{where}: {value!r} is not {'true or false' if is_switch else written}")
    items = value if isinstance(value, list) else [value]
    if any(isinstance(item, dict | list | bool) or item is None for item in items):
        raise SettingsError(f"{where}: {value!r} is not {written}")
    if isinstance(value, list) and "tuple" not in written:
        raise SettingsError(f"{where}: takes one value, not the list {value!r}")
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(hint, set()))
    assert not isinstance(spec, UnsupportedTypeAnnotationError), written
    words = [str(item) for item in items]
    try:
        if spec.choices and not set(words) <= set(spec.choices):
            raise ValueError(words)
        return spec.instance_from_str(words)
    except ValueError as error:
        allowed = f"one of {', '.join(spec.choices)}" if spec.choices else written
        raise SettingsError(f"{where}: {value!r} is not {allowed}") from error


def _read_stages(kind: Any, flags: Sequence[str], top: Values, stages: list[Values], file: Path, prog: str) -> Any:
    """The top level with all stages resolved: their flags, folders, and the adapters they start from."""
    resolved: list[Any] = []
    for stage in stages:
        own = {key: value for key, value in stage.items() if key != "name"}
        values = top | _typed_values(kind, own, f"{file}, {stage['name']}")
        settings = _parse(kind, flags, values, prog)
        start = settings.init_from
        if resolved:
            adapters = {earlier.out.name: str(earlier.out / "adapter") for earlier in resolved}
            names = stage.get("init_from", resolved[-1].out.name)
            names = names if isinstance(names, list) else [names]
            start = tuple(adapters.get(name, name) for name in names)
        out = settings.out / "stages" / stage["name"]
        resolved.append(dataclasses.replace(settings, out=out, init_from=start))
    whole = dataclasses.replace(resolved[0], out=resolved[0].out.parent.parent)
    return dataclasses.replace(whole, stages=tuple(resolved))


def _checked_stages(stages: Any, file: Path) -> list[Values]:
    """The stages with underscores in their keys; raises SettingsError for a missing or equal name."""
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise SettingsError(f"{file}: stages: must be a list of mappings, as in [{{name: grounding, loss: ctc}}]")
    stages = [_with_underscores(stage) for stage in stages]
    names = [stage.get("name") for stage in stages]
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]*\w", name) or names.count(name) > 1:
            raise SettingsError(f"{file}: stages: name {name!r}: each needs a name of its own that can name a folder")
    for stage in stages:
        if "out" in stage or "config" in stage:
            raise SettingsError(f"{file}: stage {stage['name']!r}: `out` and `config` belong to the top level")
    return stages


def _join_repeated(kind: type, flags: Sequence[str]) -> list[str]:
    """The flags with `--task a --task b` changed to `--task a b`; tyro would keep only the last one."""
    repeatable = {
        f"--{name.replace('_', '-')}"
        for name, field in _fields(kind).items()
        if "tuple" in str(field.type) and "Positional" not in str(field.type)
    }
    rest: list[str] = []
    joined: dict[str, list[str]] = {}  # such a flag -> its values
    words = rest  # the list that the next word belongs to
    for flag in flags:
        name, equals, value = flag.partition("=")
        name = name.replace("_", "-")
        if name in repeatable:
            words = joined.setdefault(name, [])
            words += [value] if equals else []
        else:
            words = rest if flag.startswith("-") else words
            words.append(flag)
    return rest + [word for name, values in joined.items() for word in (name, *values)]


def _config_file(flags: Sequence[str]) -> Path | None:
    """The file of --config; of several, the last one."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    file: Path | None = parser.parse_known_args(list(flags))[0].config
    return file


def _read_mapping(file: Path) -> Values:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"--config {file}: cannot be read: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise SettingsError(f"--config {file}: must hold a mapping of flags, as in `steps: 100`")
    return _with_underscores(content)


def _with_underscores(mapping: Values) -> Values:
    return {str(key).replace("-", "_"): value for key, value in mapping.items()}


def _fields(kind: Any) -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(kind)}
