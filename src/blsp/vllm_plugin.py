"""vLLM plugin: `vllm serve EXPORT`, for adapters that give a vector for every audio token (`conv`, `stack`).

In:  a merged folder of `blsp export`; vLLM, which finds `register` by the entry point `vllm.general_plugins`.
Out: a vLLM model of it: the LLM with vLLM's attention and batching, encoder and adapter as in transformers.
Try: `blsp export --model blsp-conv --out merged && vllm serve merged`
Flow: vLLM, in each of its processes → **register** → `BlspForVllm` → model/modeling_blsp.py

vLLM builds the prompt before it encodes the speech, so the number of vectors must follow from a clip's length. With an
adapter that reads out, the number is known only after encoding; `blsp serve --engine-url` serves it
(serving/remote.py).
"""

from functools import cache
from typing import Any

from torch import Tensor

from blsp.model.configuration_blsp import CheckpointError

ARCHITECTURE = "BlspForConditionalGeneration"  # in config.json of an export


def register() -> None:
    """Make vLLM and transformers know our model; calling it again changes nothing."""
    from vllm import ModelRegistry

    from blsp.cli import load_plugins
    from blsp.model import register as register_with_transformers

    load_plugins()  # plugins may add adapters
    register_with_transformers()
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}:BlspForVllm")


def check_adapter(name: str) -> None:
    """Raise CheckpointError for an adapter that vLLM cannot serve."""
    from blsp.model.adapter import adapter_class

    if adapter_class(name).reads_out:
        raise CheckpointError(
            f"adapter {name!r} reads out: the number of vectors is known only after a clip is encoded, and vLLM must "
            "know it before; serve the LLM with vLLM and put `blsp serve --engine-url` in front (docs/serving.md)"
        )


def __getattr__(name: str) -> Any:
    """The class that vLLM imports by name; vLLM itself is imported only now."""
    if name == "BlspForVllm":
        return _model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _model_class() -> Any:
    from vllm.model_executor.models.transformers import TransformersMultiModalForCausalLM

    class BlspForVllm(TransformersMultiModalForCausalLM):
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            config = vllm_config.model_config.hf_config
            check_adapter(config.adapter)
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            # the id of the placeholder is outside the LLM's embedding table
            self.configure_mm_token_handling(config.text_config.vocab_size, [config.audio_token_id])

        def embed_multimodal(self, input_features: Any = (), input_features_mask: Any = (), **_: Any) -> list[Tensor]:
            """The vectors of each clip, from features (M, Tm) and mask (Tm,), which are lists if their lengths differ.

            vLLM's own method would call `get_audio_features` with a list of masks.
            """
            clips = zip(input_features, input_features_mask, strict=True)
            return [self.model.get_audio_features(mel[None], mask[None]).pooler_output for mel, mask in clips]

    return BlspForVllm
