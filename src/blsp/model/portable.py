"""The code in a folder for the hub, beside the weights.

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

import blsp

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
