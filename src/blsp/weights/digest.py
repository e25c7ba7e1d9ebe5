"""Frozen weights by name: the folder they are loaded from, and the SHA-256 over their tensors.

The digest covers (name, dtype, shape, bytes) of each stored tensor, in the order of the names; how they are divided
into files does not matter. Of a Whisper checkpoint only the encoder counts, with the prefix of its names removed. So a
full checkpoint and an encoder-only folder of the same weights have the same digest.

In:    a folder, an `embedded:` name, or a hub id (fetched once into Hugging Face's own cache).
Out:   `Weights`; its digest has 64 hexadecimal digits and is kept on disk by path, size and time of the files, since
       hashing 16 GB takes a while.
Try:   from blsp.weights.digest import find_weights; print(find_weights("embedded:whisper-tiny.en").sha256)
Flow:  a command resolves its names here, once; model/loading.py loads from the folder and compares the digest,
       features/ keys its cache by it.
"""

import hashlib
import json
import os
import re
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blsp.data.files import write_text
from blsp.weights.embedded import cache_root, require_on_hub, resolve_weights
from blsp.weights.folder import WeightsNotFoundError, check_folder, open_tensors, weight_files

SCHEME = "tensors-1"  # raise it when the digest is computed in another way
CHUNK = 1 << 24  # bytes that are read at once
UNSETTLED_SECONDS = 2.0  # a younger file may change again without a new time stamp
DECODER = re.compile(r"^(model\.)?decoder\.|^proj_out\.")  # of a Whisper checkpoint
ENCODER = re.compile(r"^(model\.)?encoder\.")
HUB_FILES = ["config.json", "model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]


@dataclass(frozen=True)
class Weights:
    """A frozen model's weights.

    name: as the user gave it; this is what config.json and headers keep.
    folder: what transformers loads: a local folder, or the hub id.
    """

    name: str
    folder: str

    @cached_property
    def sha256(self) -> str:
        """The digest of the stored tensors."""
        return tensor_digest(self.folder)


def find_weights(name: str | Path) -> Weights:
    """Resolve a name: unpack `embedded:` names; raise an error for a missing path or a damaged folder."""
    weights = Weights(str(name), resolve_weights(str(name)))
    if (folder := Path(weights.folder)).is_dir():
        check_folder(folder)
    else:
        require_on_hub(weights.folder)
    return weights


def tensor_digest(name: str | Path) -> str:
    """SHA-256 of the stored tensors of a checkpoint (of its encoder alone, if it is a Whisper).

    Raises WeightsNotFoundError where there are no safetensors files.
    """
    folder = local_folder(str(name))
    files = weight_files(folder)
    memo = _memo_path(folder, files)
    if memo.is_file():
        return memo.read_text().strip()
    config = folder / "config.json"
    is_whisper = config.is_file() and json.loads(config.read_text()).get("model_type") == "whisper"
    digest = _hash_tensors(files, encoder_only=is_whisper)
    _remember(memo, digest, files)
    return digest


def local_folder(name: str) -> Path:
    """The folder of a name's files, fetched from the hub where it is a model there."""
    folder = Path(resolve_weights(name))
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise WeightsNotFoundError(f"{name}: neither a folder here nor a model on the hub ({error})") from error


def _hash_tensors(files: list[Path], encoder_only: bool) -> str:
    # name in the digest -> the file that holds the tensor, and the tensor's name in it
    tensors: dict[str, tuple[Any, str]] = {}
    for file in files:
        opened = open_tensors(file)
        for stored_name in opened.keys():  # noqa: SIM118  safe_open is no dict
            name = stored_name
            if encoder_only and DECODER.match(name):
                continue
            if encoder_only:
                name = ENCODER.sub("", name)
            if name in tensors:
                raise ValueError(f"{file}: tensor {name} is also in another file; remove one of the files")
            tensors[name] = opened, stored_name

    digest = hashlib.sha256()
    for name, (opened, stored_name) in sorted(tensors.items(), key=lambda item: item[0]):
        tensor = opened.get_slice(stored_name)
        digest.update(f"{name} {tensor.get_dtype()} {tensor.get_shape()}\n".encode())
        for chunk in _chunks(opened, stored_name):
            digest.update(chunk.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _chunks(opened: Any, name: str) -> Iterator[Tensor]:
    """A stored tensor, some rows at a time, so that a large one does not fill the memory."""
    part = opened.get_slice(name)
    if not part.get_shape():  # a single number has no rows
        yield opened.get_tensor(name)
        return
    count = part.get_shape()[0]
    rows = max(1, CHUNK // max(1, part[:1].nbytes)) if count else 1
    for start in range(0, count, rows):
        yield part[start : start + rows]


def _memo_path(folder: Path, files: list[Path]) -> Path:
    """The file that keeps the digest. Its name is a hash of the files' paths, sizes and times, so it is never stale."""
    config = folder / "config.json"
    stats = [(os.path.realpath(file), file.stat()) for file in [*files, *([config] if config.is_file() else [])]]
    marks = [SCHEME, *([path, stat.st_size, stat.st_mtime_ns, stat.st_ino] for path, stat in stats)]
    return cache_root() / "digests" / hashlib.sha256(json.dumps(marks).encode()).hexdigest()


def _remember(memo: Path, digest: str, files: list[Path]) -> None:
    if time.time() - max(file.stat().st_mtime for file in files) < UNSETTLED_SECONDS:
        return
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_text(memo, digest + "\n")
    except OSError as error:
        warnings.warn(f"{memo}: {error.strerror}; set BLSP_CACHE, or weights are hashed each time", stacklevel=2)
