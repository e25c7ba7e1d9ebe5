"""The configuration of a BLSP model: which frozen parts, which adapter between them.

In:  the configurations of a Whisper-family encoder and of a decoder-only LLM, and the adapter's name and options.
Out: `BlspConfig`, which names the frozen parts (and the digests of their tensors) without containing them.
Try: `BlspConfig.from_pretrained("models/blsp-tiny").text_model_id`
Flow: model/ — first thing that is read when a checkpoint folder is opened.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.whisper import WhisperConfig

from blsp.llm.instructions import NO_SPEECH_SENTENCE

AUDIO_TOKEN = "<|audio|>"


class BlspConfig(PretrainedConfig):
    """Configuration of `BlspForConditionalGeneration`.

    Args:
        audio_config, text_config: configurations of the frozen encoder and the frozen LLM (dict or object).
        audio_token_id: id of the placeholder in `input_ids`; outside the LLM's vocabulary, never embedded.
        audio_model_id, text_model_id: where the frozen parts are loaded from (folder, hub id or `embedded:` name).
        audio_model_sha256, text_model_sha256: tensor digests; an adapter fits these weights and no namesakes.
        adapter: `conv` (the paper's), `stack` or `grounded`.
        adapter_options: keyword arguments of that adapter's class in `adapter.py` or `grounded.py`.
        readout_vocabulary: LLM token ids that `grounded` reads out; None is the whole vocabulary.
        no_speech_sentence: what is answered when a clip holds no speech.
        full_window: True pads the encoder's input to 30 s as the paper does; False uses true lengths.
        adapter_only: True when the folder holds the adapter's tensors alone; `blsp export` writes False.
    """

    model_type = "blsp"
    sub_configs = {"audio_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012  transformers' convention

    audio_config: Any = None
    text_config: Any = None
    audio_token_id: int | None = None
    audio_model_id: str | None = None
    text_model_id: str | None = None
    audio_model_sha256: str | None = None
    text_model_sha256: str | None = None
    adapter: str = "conv"
    adapter_options: dict | None = None
    readout_vocabulary: list[int] | None = None
    no_speech_sentence: str = NO_SPEECH_SENTENCE
    full_window: bool = False
    adapter_only: bool = True
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.audio_config = _config(self.audio_config, default=WhisperConfig)
        self.text_config = _config(self.text_config, default=AutoConfig.for_model("llama").__class__)
        self.adapter_options = dict(self.adapter_options or {})
        if self.audio_token_id is None:
            self.audio_token_id = self.text_config.vocab_size
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__post_init__(**kwargs)


def _config(value: Any, default: type) -> PretrainedConfig:
    """A configuration object from an object, a dict with `model_type`, or nothing."""
    if value is None:
        return default()
    if isinstance(value, dict):
        return AutoConfig.for_model(**value)
    return value
