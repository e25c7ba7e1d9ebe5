"""Folders of the shipped adapters: `models/NAME` in a checkout, `blsp/_models/NAME` in an installed wheel.

In:   a model's name as the user gave it.
Out:  the folder of the shipped adapter with this name; any other folder or hub id, with `~` expanded.
Try:  find_model("blsp-tiny")   # -> '/…/models/blsp-tiny'
Flow: every command with --model calls this module first.
"""

import os
from pathlib import Path

from blsp.data.files import file_digest
from blsp.weights.embedded import refuse_missing_path

SHIPPED = ("blsp-tiny", "blsp-small", "blsp-base", "blsp-conv", "blsp-romance")


def is_shipped(name: str) -> bool:
    """Whether this installation holds the shipped adapter `name`."""
    return any((folder / "config.json").is_file() for folder in _folders(name))


def find_model(name: str) -> str:
    """Resolve the name of a shipped adapter to its folder; another folder or a hub id is returned, with `~` expanded.

    Raises FileNotFoundError for a shipped adapter that is not installed, and for a path that does not exist.
    """
    if name not in SHIPPED or Path(name, "config.json").is_file():
        refuse_missing_path(name)
        return os.path.expanduser(name)
    folders = _folders(name)
    for folder in folders:
        if (folder / "config.json").is_file():
            return str(folder)
    looked = " and ".join(str(folder) for folder in folders)
    raise FileNotFoundError(
        f"the shipped adapter {name!r} is not in this installation (looked in {looked}); "
        "train one with `blsp train` or name a folder with --model"
    )


def model_digest(name: str) -> str | None:
    """SHA-256 over a local model folder's own weights and configuration; None for a hub id."""
    folder = Path(find_model(name))
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")])
    return file_digest(*files) if files else None


def _folders(name: str) -> list[Path]:
    package = Path(__file__).resolve().parents[1]
    return [package.parents[1] / "models" / name, package / "_models" / name]
