"""The model: a frozen Whisper encoder, an adapter, and a frozen LLM.

modeling_blsp.py        the model, as a transformers class
configuration_blsp.py   its configuration: the frozen parts by name and digest, the adapter
processing_blsp.py      text and speech to the model's inputs
speech_encoder.py       the Whisper encoder on the true length of the speech
splicing.py             speech vectors in the place of the placeholders
adapter.py              the adapters `conv` and `stack`, and ADAPTERS, the dictionary of all of them
adapter_parts.py        parts that adapters share: their output, the convolution stack
grounded.py             the adapter `grounded`: CTC over the LLM's own token embeddings
hypotheses.py           possible transcripts of a read-out, scored by the LLM
loading.py              frozen parts by name; a whole model from an adapter folder
lora.py                 LoRA on the frozen parts, where training asks for it
weight_samples.py       samples of the frozen weights, to find out whether they were changed
checkpoint.py           new models, adapter folders, merged exports
portable.py             the code in a folder for the hub
card_parts.py           its card: metadata, README of a merged model
move.py                 an adapter that reads out, moved to another LLM without training
"""


def register() -> None:
    """Make transformers' Auto classes know the model type `blsp`; calling it again changes nothing.

    AutoConfig, AutoModel, AutoModelForMultimodalLM and AutoProcessor then load a checkpoint folder of this project,
    and so do pipelines: `blsp.register(); pipeline("any-to-any", model="models/blsp-tiny")`.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoProcessor

    from blsp.model.configuration_blsp import BlspConfig
    from blsp.model.modeling_blsp import BlspForConditionalGeneration, BlspModel
    from blsp.model.processing_blsp import BlspProcessor

    AutoConfig.register(BlspConfig.model_type, BlspConfig, exist_ok=True)
    AutoModel.register(BlspConfig, BlspModel, exist_ok=True)
    AutoModelForMultimodalLM.register(BlspConfig, BlspForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(BlspConfig, BlspProcessor, exist_ok=True)
