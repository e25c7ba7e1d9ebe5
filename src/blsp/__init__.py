"""BLSP for everyone: teach a frozen text LLM to listen.

Importing `blsp` imports no torch and does no work. The public names below are imported from their modules when they are
first used. docs/architecture.md lists all files.

    import blsp
    listener = blsp.load()                      # the shipped adapter
    print(listener.answer("question.wav"))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "load": "blsp.inference.listener",
    "register": "blsp.model",
    "Listener": "blsp.inference.listener",
    "Manifest": "blsp.data.manifest",
    "Utterance": "blsp.data.manifest",
    "load_audio": "blsp.data.audio",
    "BlspConfig": "blsp.model.configuration_blsp",
    "BlspModel": "blsp.model.modeling_blsp",
    "BlspForConditionalGeneration": "blsp.model.modeling_blsp",
    "BlspProcessor": "blsp.model.processing_blsp",
}

__all__ = [
    "__version__",
    "load",
    "register",
    "Listener",
    "Manifest",
    "Utterance",
    "load_audio",
    "BlspConfig",
    "BlspModel",
    "BlspForConditionalGeneration",
    "BlspProcessor",
]

if TYPE_CHECKING:
    from blsp.data.audio import load_audio
    from blsp.data.manifest import Manifest, Utterance
    from blsp.inference.listener import Listener, load
    from blsp.model import register
    from blsp.model.configuration_blsp import BlspConfig
    from blsp.model.modeling_blsp import BlspForConditionalGeneration, BlspModel
    from blsp.model.processing_blsp import BlspProcessor


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'blsp' has no attribute {name!r}; it has {', '.join(_HOME)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
