"""The frozen ears, the adapter, the frozen mind.

`register()` makes transformers' Auto classes and pipelines know the model:

    blsp.register()
    pipeline("any-to-any", model="models/blsp-tiny")
"""

from __future__ import annotations


def register() -> None:
    """Register BLSP with AutoConfig, AutoModel, AutoModelForMultimodalLM and AutoProcessor; may be called again."""
    from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoProcessor

    from blsp.model.configuration_blsp import BlspConfig
    from blsp.model.modeling_blsp import BlspForConditionalGeneration, BlspModel
    from blsp.model.processing_blsp import BlspProcessor

    AutoConfig.register(BlspConfig.model_type, BlspConfig, exist_ok=True)
    AutoModel.register(BlspConfig, BlspModel, exist_ok=True)
    AutoModelForMultimodalLM.register(BlspConfig, BlspForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(BlspConfig, BlspProcessor, exist_ok=True)
