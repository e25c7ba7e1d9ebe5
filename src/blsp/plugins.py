"""Plugins: your own Python files, imported before a command reads its flags.

In:  the environment variable BLSP_PLUGINS, with names of modules or paths of files, separated by commas; and
     installed packages with an entry point in the group `blsp.plugins`.
Out: the imported modules. A plugin adds entries to the dicts that own the choices: `ADAPTERS`, `LOSSES`, `READERS`.
Try: `BLSP_PLUGINS=my_adapter.py blsp train --help`
Flow: cli.py → **plugins.py** → your file. docs/extending.md shows one plugin of each kind.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

VARIABLE = "BLSP_PLUGINS"
ENTRY_POINTS = "blsp.plugins"


class PluginError(ImportError):
    """A plugin that cannot be imported; the message names it."""


def load_plugins() -> None:
    """Import every plugin once; raises PluginError for one that is not there or fails."""
    installed = [entry.module for entry in entry_points(group=ENTRY_POINTS)]
    named = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    for name in installed + named:
        try:
            _import_file(Path(name)) if name.endswith(".py") else import_module(name)
        except Exception as error:
            raise PluginError(f"plugin {name} (of {VARIABLE}): {type(error).__name__}: {error}") from error


def _import_file(path: Path) -> None:
    """Run a file as the module of its name, once a process."""
    path = path.resolve()
    loaded = sys.modules.get(path.stem)
    if loaded is not None and getattr(loaded, "__file__", None) == str(path):
        return
    if loaded is not None:
        raise ImportError(f"a module {path.stem!r} is loaded already; give the file another name")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    sys.modules[path.stem] = module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
