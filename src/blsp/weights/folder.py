"""Files of a checkpoint folder, checked before a library reads them.

In:  a local folder of an LLM, an encoder or an adapter.
Out: nothing, or a `FolderError` that names the file and what is wrong with it.
Try: `check_folder(Path("models/blsp-tiny"))`
Flow: digest.py (`find_weights`), model/configuration_blsp.py → **folder.py** → transformers

Without these checks a library reports "Expecting value: line 1 column 1" for an incomplete file, never stops reading a
link to a device, or builds a billion layers if a damaged configuration asks for them. Errors that a library still
raises get the folder's name from `naming_folder`.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

INDEX = "model.safetensors.index.json"
JSON_FILES = (
    *("config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json", INDEX),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
OTHER_FILES = ("chat_template.jinja", "vocab.json", "merges.txt", "tokenizer.model")
LARGEST_TEXT = 1 << 28  # bytes; the largest tokenizer.json in use has about 40 MB
MOST_LAYERS = 10_000


class WeightsNotFoundError(FileNotFoundError):
    """No weights were found under a name; the message says where they were looked for."""


class FolderError(ValueError):
    """A file of a checkpoint folder that cannot be used; the message names it and what is wrong."""


def check_folder(folder: Path) -> None:
    """Raise FolderError for an unusable file: not a regular file, incomplete, or with impossible values.

    Missing files are no error here.
    """
    for name in (*JSON_FILES, *OTHER_FILES):
        path = folder / name
        if os.path.lexists(path):
            _check_regular(path)
            if name in JSON_FILES:
                _check_layers(path, _read_object(path))
    if os.path.lexists(folder / "model.safetensors") or (folder / INDEX).exists():
        for path in weight_files(folder):
            open_tensors(path)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those its index names, or `model.safetensors`."""
    names = {"model.safetensors"}
    if (folder / INDEX).is_file():
        weight_map = _read_object(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise FolderError(f"{folder / INDEX}: its weight_map does not name a file for each tensor; fetch it again")
        names = set(weight_map.values())
    files = [folder / name for name in sorted(names)]
    for file in files:
        if not os.path.lexists(file):
            raise WeightsNotFoundError(
                f"{file}: no such file; weights must be safetensors (convert others with transformers' save_pretrained)"
            )
        _check_regular(file)
    return files


def open_tensors(path: Path) -> Any:
    """Open a safetensors file; only its header is read."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise FolderError(f"{path}: is damaged ({error}); fetch or write it again") from error


@contextmanager
def naming_folder(folder: Any) -> Iterator[None]:
    """Turn a library's errors about a folder (or hub id) into a FolderError that names it."""
    try:
        yield
    except Exception as error:
        ours = type(error).__module__.partition(".")[0] == "blsp"
        if ours or isinstance(error, ImportError):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FolderError(f"{folder}: cannot be loaded ({reason:.400})") from error


def _check_regular(path: Path) -> None:
    """Raise FolderError for a folder, a device, a broken link, or a text file of impossible size."""
    if not path.is_file():
        what = f"a link to {os.readlink(path)}" if path.is_symlink() else "a folder or device"
        raise FolderError(f"{path}: is {what}, not a file; fetch or write it again")
    if path.suffix != ".safetensors" and path.stat().st_size > LARGEST_TEXT:
        raise FolderError(f"{path}: has {path.stat().st_size:,} bytes; no such file is that large")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FolderError(f"{path}: is damaged, it is not JSON ({error}); fetch or write it again") from error
    if not isinstance(value, dict):
        raise FolderError(f"{path}: must hold a JSON object, not a {type(value).__name__}; fetch or write it again")
    return value


def _check_layers(path: Path, values: dict[str, Any]) -> None:
    """Raise FolderError for an impossible number of layers."""
    for name, value in values.items():
        if isinstance(value, dict) and path.name == "config.json":
            _check_layers(path, value)
        elif name.endswith("layers") and isinstance(value, int) and not 0 <= value <= MOST_LAYERS:
            raise FolderError(f"{path}: {name} is {value}; no model has more than {MOST_LAYERS:,} layers")
