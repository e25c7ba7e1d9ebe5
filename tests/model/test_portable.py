"""A merged model contains its code: transformers loads it without this package. Also the cards for the hub."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from support.tiny_models import FAMILIES, speech_like, tiny_blsp
from transformers import AutoProcessor

from blsp.data.audio import write_wav
from blsp.distributed import find_runtime
from blsp.model.card_parts import card_head
from blsp.model.checkpoint import export_merged, load_blsp, save_adapter
from blsp.model.configuration_blsp import AUDIO_TOKEN
from blsp.model.portable import ENTRIES, flat_sources
from blsp.model.processing_blsp import FLATTEN_PARTS, BlspProcessor

F32 = find_runtime("cpu", "float32")
ABSENT = """\
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):  # every import of the package fails, as where it is not installed
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "blsp":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
"""
WITHOUT_BLSP = f"""{ABSENT}
sys.meta_path.insert(0, Absent())
import numpy, torch
from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoProcessor, pipeline
folder = sys.argv[1]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=True)
assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == "BlspModel"
inputs = processor(text="say" + processor.audio_token, audio=folder + "/../clip.wav")
with torch.no_grad():
    numpy.save(folder + "/../logits.npy", model(**inputs).logits.numpy())
part = dict(type="audio", path=folder + "/../clip.wav")
messages = [dict(role="user", content=[part])]
asked = pipeline("any-to-any", model=folder, trust_remote_code=True)
print(asked(text=messages, generate_kwargs=dict(max_new_tokens=4), return_full_text=False)[0]["generated_text"])
assert not any(name.startswith("blsp.") for name in sys.modules)
"""
STUB = f"""{ABSENT}
sys.meta_path.insert(0, Absent())
from transformers import AutoProcessor
for trusted in (False, True):
    try:
        print(type(AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=trusted)))
    except (ValueError, ImportError) as error:
        print(error)
"""


def run(script: str, *arguments: object, home: Path) -> subprocess.CompletedProcess[str]:
    """A process with a cache of its own for the code that it copies."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    environment = {"PATH": "", "HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ":".join(sys.path)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, input="")


@pytest.mark.parametrize("adapter", ["conv", "grounded"])
def test_a_merged_model_answers_without_the_package(tiny_models_folder: Path, tmp_path: Path, adapter: str) -> None:
    model, processor = tiny_blsp(tiny_models_folder, adapter=adapter, runtime=F32)
    export_merged(model, processor, tmp_path / "merged")
    write_wav(tmp_path / "clip.wav", speech_like(1.3))
    done = run(WITHOUT_BLSP, tmp_path / "merged", home=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    inputs = processor(text=f"say{AUDIO_TOKEN}", audio=str(tmp_path / "clip.wav"))
    with torch.no_grad():
        expected = model(**inputs).logits
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "logits.npy")), expected, rtol=0, atol=1e-4)


def test_the_code_that_is_carried_is_all_that_it_needs() -> None:
    sources = flat_sources()
    assert {entry.rpartition(".")[2] for entry in ENTRIES} <= sources.keys()
    for name, text in sources.items():
        assert text.count("from blsp") == text.count("import load_adapter_folder"), name
    assert len(sources) < 25 and "loading" not in sources


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_merged_model_is_still_ours(tiny_models_folder: Path, tmp_path: Path, family: str) -> None:
    model, processor = tiny_blsp(tiny_models_folder, family=family, runtime=F32)
    export_merged(model, processor, tmp_path / "merged")
    loaded, again = load_blsp(tmp_path / "merged", F32)
    assert type(loaded) is type(model) and type(again) is type(processor)


def test_a_processor_is_never_a_bare_tokenizer(tiny_models_folder: Path, tmp_path: Path) -> None:
    model, processor = tiny_blsp(tiny_models_folder, runtime=F32)
    save_adapter(model, processor, tmp_path / "adapter")
    said = run(STUB, tmp_path / "adapter", home=tmp_path).stdout
    assert "trust_remote_code=True" in said and "pip install blsp" in said
    assert type(AutoProcessor.from_pretrained(tmp_path / "adapter", trust_remote_code=True)) is BlspProcessor


def test_the_shipped_adapters_have_it_too() -> None:
    for folder in sorted((Path(__file__).parents[2] / "models").glob("blsp-*")):
        assert json.loads((folder / "processor_config.json").read_text())["auto_map"], folder
        stub = (folder / "blsp_classes.py").read_text()
        assert "pip install blsp" in stub and "import BlspProcessor" in stub, folder
        assert (folder / "chat_template.jinja").read_text().startswith(FLATTEN_PARTS), folder


def test_the_card_names_the_parts_as_the_hub_knows_them(tiny_models_folder: Path, tmp_path: Path) -> None:
    model, processor = tiny_blsp(tiny_models_folder, runtime=F32)
    config: Any = model.config
    assert "base_model" not in card_head(config, "adapter", [])  # folders of this machine
    config.text_model_id, config.audio_model_id = "embedded:smollm2-135m-instruct", "openai/whisper-small"
    export_merged(model, processor, tmp_path / "merged")
    head = yaml.safe_load((tmp_path / "merged/README.md").read_text().split("---")[1])
    assert head["base_model"] == ["HuggingFaceTB/SmolLM2-135M-Instruct", "openai/whisper-small"]
    assert head["base_model_relation"] == "merge"
