"""Code and card in a folder for the hub, beside the weights.

In:  the modules of this package that the model needs, found by following imports from its three classes.
Out: copies of them in one folder, with relative imports, and `auto_map`, which tells transformers where the classes
     are.
Try: `sorted(flat_sources())`
Flow: checkpoint.py (`export_merged`, `save_adapter`) → **portable.py** → `from_pretrained(…, trust_remote_code=True)`

A merged model works without this package. An adapter folder needs the package to load the frozen parts. It contains one
file that imports the package, so that AutoProcessor asks for it instead of returning a plain tokenizer.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml

import blsp
from blsp.model.configuration_blsp import BlspConfig
from blsp.weights.embedded import hub_name

CLASSES = {
    "AutoConfig": "configuration_blsp.BlspConfig",
    "AutoModel": "modeling_blsp.BlspModel",
    "AutoModelForMultimodalLM": "modeling_blsp.BlspForConditionalGeneration",
    "AutoProcessor": "processing_blsp.BlspProcessor",
}
ENTRIES = ("blsp.model.configuration_blsp", "blsp.model.modeling_blsp", "blsp.model.processing_blsp")
OWN_IMPORT = re.compile(r"^from (blsp\.[\w.]+) import", re.MULTILINE)  # of a module's head
STUB = "blsp_classes"
STUB_TEXT = '''"""The processor of this folder is in the package blsp: pip install blsp."""

from blsp.model.processing_blsp import BlspProcessor
'''


def flat_sources() -> dict[str, str]:
    """The text of each module that the model needs, by its last name, with relative imports."""
    root, sources = Path(blsp.__file__).parent, dict[str, str]()
    waiting = list(ENTRIES)
    while waiting:
        module = waiting.pop()
        name = module.rpartition(".")[2]
        if name in sources:
            continue
        text = root.joinpath(*module.split(".")[1:]).with_suffix(".py").read_text(encoding="utf-8")
        waiting += OWN_IMPORT.findall(text)
        sources[name] = OWN_IMPORT.sub(lambda found: f"from .{found[1].rpartition('.')[2]} import", text)
    return sources


def add_code(folder: Path) -> None:
    """Write the code into the folder of a merged model, and name it in the configuration files."""
    for name, text in flat_sources().items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    _name_classes(folder / "config.json", CLASSES)
    _name_classes(folder / "processor_config.json", {"AutoProcessor": CLASSES["AutoProcessor"]})


def add_stub(folder: Path) -> None:
    """Write the file that gives AutoProcessor the processor of an adapter folder, or says what to install."""
    (folder / f"{STUB}.py").write_text(STUB_TEXT, encoding="utf-8")
    _name_classes(folder / "processor_config.json", {"AutoProcessor": f"{STUB}.BlspProcessor"})


def _name_classes(path: Path, classes: dict[str, str]) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(values | {"auto_map": classes}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# --- the card ---------------------------------------------------------------------------------------------
def card_head(config: BlspConfig, relation: str, tags: list[str], **more: Any) -> str:
    """The card's metadata for the hub. relation: between the model and its parts, "adapter" or "merge"."""
    parts = [hub_name(name) for name in (config.text_model_id, config.audio_model_id)]
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "audio-text-to-text"}
    if known := [part for part in parts if part is not None]:
        head |= {"base_model": known, "base_model_relation": relation}
    head |= {"tags": ["blsp", "speech", *tags]} | more
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip()}\n---\n"


def merged_card(config: BlspConfig) -> str:
    """The README of a merged model."""
    llm, audio = config.text_model_id, config.audio_model_id
    return f"""{card_head(config, "merge", [f"adapter-{config.adapter}"])}
# BLSP: {audio} → {llm}

The LLM `{llm}` listens through the encoder of `{audio}` and a `{config.adapter}` adapter. All weights and
the code are in this folder; transformers loads it by itself:

    pip install torch "transformers>=5.20" soundfile soxr av fsspec

```python
from transformers import AutoModelForMultimodalLM, AutoProcessor

processor = AutoProcessor.from_pretrained("this/folder", trust_remote_code=True)
model = AutoModelForMultimodalLM.from_pretrained("this/folder", trust_remote_code=True)
messages = [{{"role": "user", "content": [{{"type": "audio", "path": "question.wav"}}]}}]
inputs = processor.apply_chat_template(
    messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
)
answer = model.generate(**inputs, max_new_tokens=64)[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(answer, skip_special_tokens=True)[0])
```

The licences of both parts also apply to this folder.
"""
