"""Damages of the folders of adapters, LLMs and encoders.

In:  a folder. Out: the same folder, damaged in one of the ways of `DAMAGES`.
Try: `make_home(home); DAMAGES["adapter"]["weights-nan"](home / "adapter")`
Flow: tests' tiny models → **damage.py** → commands.py (cases), tests/model/test_damaged_folders.py
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from blsp.data.audio import write_wav
from blsp.distributed import find_runtime
from blsp.model.checkpoint import save_adapter
from tests.support.tiny_models import speech_like, tiny_blsp

Damage = Callable[[Path], object]


def edit(file: str, **changes: Any) -> Damage:
    """Change values of a JSON file."""

    def damage(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def write(file: str, data: bytes | str) -> Damage:
    return lambda folder: (folder / file).write_bytes(data if isinstance(data, bytes) else data.encode())


def cut(file: str, share: float = 0.5) -> Damage:
    """Keep the beginning of a file."""

    def damage(folder: Path) -> None:
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[: int(len(data) * share)])

    return damage


def remove(file: str) -> Damage:
    return lambda folder: (folder / file).unlink()


def link(file: str, target: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        (folder / file).symlink_to(target)

    return damage


def tensor(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Change the tensors of model.safetensors."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def offsets(folder: Path) -> None:
    """Let the first tensor lie beyond the file's end."""
    data = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    next(value for name, value in header.items() if name != "__metadata__")["data_offsets"] = [10**9, 10**9 + 64]
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def first_weight(value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in sorted(tensors) if tensors[name].is_floating_point() and tensors[name].dim() > 1)
        tensors[name].view(-1)[3] = value

    return change


def foreign_token(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.multi_modal_projector.vocabulary"][5] = 10**6


def exchange_ids(folder: Path) -> None:
    """Two tokens exchange their ids."""
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[40:42]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(content))


FOR_EVER = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
FOR_EVER += "{% endfor %}"
HUGE = "{{ 'x' * 10000000000 }}"
DOUBLED = "{% set n = namespace(t='x') %}{% for i in range(34) %}{% set n.t = n.t + n.t %}{% endfor %}{{ n.t }}"
CODE = {"AutoConfig": "code.Config", "AutoModel": "code.Model", "AutoModelForCausalLM": "code.Model"}

COMMON: dict[str, Damage] = {
    "weights-truncated": cut("model.safetensors"),
    "weights-empty": write("model.safetensors", b""),
    "weights-header-length": write("model.safetensors", struct.pack("<Q", 2**60) + bytes(64)),
    "weights-offsets": offsets,
    "weights-device": link("model.safetensors", "/dev/zero"),
    "weights-folder": lambda folder: ((folder / "model.safetensors").unlink(), (folder / "model.safetensors").mkdir()),
    "weights-missing": remove("model.safetensors"),
    "config-torn": cut("config.json"),
    "config-empty": write("config.json", ""),
    "config-list": write("config.json", "[1, 2]"),
    "config-device": link("config.json", "/dev/zero"),
    "config-missing": remove("config.json"),
    "config-unknown-code": edit("config.json", model_type="mine", auto_map=CODE),
}
TOKENIZER: dict[str, Damage] = {
    "tokenizer-torn": cut("tokenizer.json"),
    "tokenizer-empty": write("tokenizer.json", ""),
    "tokenizer-device": link("tokenizer.json", "/dev/zero"),
    "tokenizer-config-torn": cut("tokenizer_config.json"),
    "tokenizer-ids": exchange_ids,
    "template-for-ever": write("chat_template.jinja", FOR_EVER),
    "template-huge": write("chat_template.jinja", HUGE),
    "template-doubled": write("chat_template.jinja", DOUBLED),
    "template-syntax": write("chat_template.jinja", "{% for %}"),
    "template-device": link("chat_template.jinja", "/dev/zero"),
}
DAMAGES: dict[str, dict[str, Damage]] = {
    "adapter": {
        **COMMON,
        **TOKENIZER,
        "weights-nan": tensor(first_weight(float("nan"))),
        "weights-infinite": tensor(first_weight(float("inf"))),
        "vocabulary-foreign": tensor(foreign_token),
        "weights-lacking": tensor(lambda tensors: tensors.popitem()),
        "text-model-null": edit("config.json", text_model_id=None),
        "audio-model-number": edit("config.json", audio_model_id=7),
        "adapter-unknown": edit("config.json", adapter="nobody"),
        "adapter-number": edit("config.json", adapter=5),
        "options-unknown": edit("config.json", adapter_options={"hiden": 12}),
        "options-list": edit("config.json", adapter_options=[1]),
        "options-absurd": edit("config.json", adapter_options={"hidden": 10**13}),
        "options-large": edit("config.json", adapter_options={"hidden": 200_000, "bottleneck": 8}),
        "readout-absurd": edit("config.json", readout_size=10**13),
        "processor-torn": cut("processor_config.json"),
    },
    "llama": {
        **COMMON,
        **TOKENIZER,
        "tokenizer-missing": lambda folder: [
            (folder / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")
        ],
        "generation-config-torn": cut("generation_config.json"),
        "layers-absurd": edit("config.json", num_hidden_layers=10**9),
        "width-absurd": edit("config.json", hidden_size=10**12),
        "layers-text": edit("config.json", num_hidden_layers="three"),
        "not-an-llm": edit("config.json", model_type="whisper"),
    },
    "whisper": {
        **COMMON,
        "extractor-torn": cut("preprocessor_config.json"),
        "extractor-missing": remove("preprocessor_config.json"),
        "layers-absurd": edit("config.json", encoder_layers=10**9),
        "width-absurd": edit("config.json", d_model=10**12),
    },
}


def make_home(home: Path) -> None:
    """A folder with `adapter`, which names `llama` and `whisper` beside it, and a recording `a.wav`."""
    model, processor = tiny_blsp(home, adapter="grounded", runtime=find_runtime("cpu", "float32"))
    model.config.audio_model_id, model.config.text_model_id = "whisper", "llama"
    save_adapter(model, processor, home / "adapter")
    write_wav(home / "a.wav", speech_like(0.5))


def damaged_copy(home: Path, part: str, name: str, copy: Path) -> None:
    shutil.copytree(home, copy)
    DAMAGES[part][name](copy / part)


def with_code(home: Path, copy: Path, ran: Path, **changes: Any) -> None:
    """A copy whose folders hold code that would make the folder `ran`. changes: of their config.json."""
    shutil.copytree(home, copy)
    for part in ("llama", "whisper", "adapter"):
        edit("config.json", auto_map=CODE, **changes)(copy / part)
        (copy / part / "code.py").write_text(f"import os\nos.mkdir({str(ran)!r})\n")
