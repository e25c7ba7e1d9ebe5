"""Where the shipped adapters lie: `models/NAME` in a checkout, `blsp/_models/NAME` in an installed wheel.

In: a model's name as a user writes it. Out: the same name, or the folder of the shipped adapter it stands
    for.

    find_model("blsp-tiny")        # -> '/…/models/blsp-tiny'
    find_model("runs/x/adapter")   # -> 'runs/x/adapter', untouched
"""

from __future__ import annotations

from pathlib import Path

from blsp.data.files import file_digest

SHIPPED = ("blsp-tiny", "blsp-base")


def is_shipped(name: str) -> bool:
    """Whether this installation holds the shipped adapter `name`."""
    return any((place / "config.json").is_file() for place in _places(name))


def find_model(name: str) -> str:
    """Resolve the name of a shipped adapter to its folder; a folder or hub id is returned as it is.

    Raises FileNotFoundError when a shipped name is asked for and this installation does not hold it.
    """
    if name not in SHIPPED or Path(name, "config.json").is_file():
        return name
    places = _places(name)
    for place in places:
        if (place / "config.json").is_file():
            return str(place)
    looked = " and ".join(str(place) for place in places)
    raise FileNotFoundError(
        f"the shipped adapter {name!r} is not in this installation (looked in {looked}); "
        "train one with `blsp train` or name a folder with --model"
    )


def model_digest(name: str) -> str | None:
    """SHA-256 over a local model folder's own weights and configuration; None for a hub id."""
    folder = Path(find_model(name))
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")])
    return file_digest(*files) if files else None


def _places(name: str) -> list[Path]:
    package = Path(__file__).resolve().parents[1]
    return [package.parents[1] / "models" / name, package / "_models" / name]
