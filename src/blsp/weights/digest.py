"""What exact weights are these? A SHA-256 over the tensors of a checkpoint, whatever files they lie in.

An adapter fits the very weights it was trained between: their dequantised or fine-tuned namesakes are other
weights. The digest is taken over (name, dtype, shape, bytes) of the stored tensors in the order of their
names, read straight from the safetensors files, one shard or many. Of a Whisper checkpoint only the encoder
counts, its prefix stripped, so a full checkpoint and an encoder-only folder of the same weights agree.

In:    a folder, an `embedded:` name, or a hub id (fetched once into Hugging Face's own cache).
Out:   64 hexadecimal digits; remembered on disk by path, size and time of the files, as 16 GB take a while.
Try:   from blsp.weights.digest import tensor_digest; print(tensor_digest("embedded:whisper-tiny.en"))
Flow:  checkpoint.py writes it into config.json and checks it at loading; features.py keys its cache by it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blsp.weights.embedded import cache_root, resolve_weights

SCHEME = "tensors-1"  # raise it when the digest is taken another way
CHUNK = 1 << 24  # bytes
UNSETTLED_SECONDS = 2.0  # a file this young may yet change within its time stamp's resolution
HUB_FILES = ["config.json", "model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]


class WeightsNotFoundError(FileNotFoundError):
    """The name leads to no safetensors weights; the message says where was looked."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes lie."""

    file: Path
    begin: int  # bytes from the file's start
    end: int
    dtype: str  # safetensors' name: F32, BF16, ...
    shape: list[int]


def tensor_digest(name: str | Path) -> str:
    """SHA-256 of the stored tensors of a checkpoint (of its encoder alone, if it is a Whisper).

    Raises WeightsNotFoundError where there are no safetensors files.
    """
    folder = _local_folder(str(name))
    files = weight_files(folder)
    memo = _memo_path(folder, files)
    if memo.is_file():
        return memo.read_text().strip()
    tensors = _encoder_only(_read_headers(files)) if _is_whisper(folder) else _read_headers(files)
    digest = _hash_tensors(tensors)
    _remember(memo, digest, files)
    return digest


def _local_folder(name: str) -> Path:
    folder = Path(resolve_weights(name)).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise WeightsNotFoundError(
            f"{name}: neither a folder here nor a model on the hub ({error})"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those its index names, or `model.safetensors`."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
    else:
        names = {"model.safetensors"}
    files = [folder / name for name in sorted(names)]
    for file in files:
        if not file.is_file():
            raise WeightsNotFoundError(
                f"{file}: no such file; weights must be safetensors "
                "(convert others with transformers' save_pretrained)"
            )
    return files


def _is_whisper(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and json.loads(config.read_text()).get("model_type") == "whisper"


def _read_headers(files: list[Path]) -> dict[str, StoredTensor]:
    """Name -> place of every tensor. Format: u64 length of the JSON header, the header, the bytes."""
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        with file.open("rb") as content:
            (length,) = struct.unpack("<Q", content.read(8))
            header: dict[str, Any] = json.loads(content.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if name in tensors:
                raise ValueError(
                    f"{file}: tensor {name} is also in {tensors[name].file}; remove one of the files"
                )
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            tensors[name] = StoredTensor(file, begin, end, entry["dtype"], entry["shape"])
    return tensors


def _encoder_only(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Whisper's encoder under its own names, in whatever kind of checkpoint it lies."""
    decoder = re.compile(r"^(model\.)?decoder\.|^proj_out\.")
    prefix = re.compile(r"^(model\.)?encoder\.")
    return {prefix.sub("", name): tensor for name, tensor in tensors.items() if not decoder.match(name)}


def _hash_tensors(tensors: dict[str, StoredTensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        with tensor.file.open("rb") as content:
            content.seek(tensor.begin)
            left = tensor.end - tensor.begin
            while left > 0:
                chunk = content.read(min(left, CHUNK))
                if not chunk:
                    raise ValueError(f"{tensor.file}: ends inside tensor {name}; fetch or write it again")
                digest.update(chunk)
                left -= len(chunk)
    return digest.hexdigest()


def _memo_path(folder: Path, files: list[Path]) -> Path:
    """The memo's name is a hash of what the files look like, so a memo is never out of date."""
    config = folder / "config.json"
    looked_at = [*files, *([config] if config.is_file() else [])]
    stats = [(os.path.realpath(file), file.stat()) for file in looked_at]
    looks = [SCHEME, *([path, stat.st_size, stat.st_mtime_ns, stat.st_ino] for path, stat in stats)]
    return cache_root() / "digests" / hashlib.sha256(json.dumps(looks).encode()).hexdigest()


def _remember(memo: Path, digest: str, files: list[Path]) -> None:
    if time.time() - max(file.stat().st_mtime for file in files) < UNSETTLED_SECONDS:
        return
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        partial = memo.with_name(f"{memo.name}.{os.getpid()}.partial")
        partial.write_text(digest + "\n")
        partial.replace(memo)
    except OSError as error:
        warnings.warn(
            f"{memo}: {error.strerror}; set BLSP_CACHE, or weights are hashed each time", stacklevel=2
        )
