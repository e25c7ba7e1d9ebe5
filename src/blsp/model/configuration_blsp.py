"""Configuration of a BLSP model: its frozen parts and the adapter between them.

In:  the configurations of a Whisper-family encoder and of a decoder-only LLM, and the adapter's name and options.
Out: `BlspConfig`: the names of the frozen parts and the digests of their tensors, not the parts themselves.
Try: `BlspConfig.from_pretrained("models/blsp-tiny").text_model_id`
Flow: config.json → **BlspConfig** → modeling_blsp.py, checkpoint.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.whisper import WhisperConfig
from transformers.utils import cached_file

from blsp.llm.instructions import NO_SPEECH_SENTENCE
from blsp.weights.folder import check_folder, naming_folder

AUDIO_TOKEN = "<|audio|>"


class CheckpointError(ValueError):
    """A folder that cannot be used as a checkpoint; the message names it and what to do."""


class BlspConfig(PretrainedConfig):
    """Configuration of `BlspForConditionalGeneration`.

    Args:
        audio_config, text_config: configurations of the frozen encoder and the frozen LLM (dict or object).
        audio_token_id: id of the placeholder in `input_ids`; outside the LLM's vocabulary, never embedded.
        audio_model_id, text_model_id: where the frozen parts are loaded from (folder, hub id or `embedded:` name).
        audio_model_sha256, text_model_sha256: tensor digests; the adapter fits these weights and no others.
        tokenizer_sha256: digest of the LLM's tokens and their ids; None in folders written before December 2026.
        adapter: a name in `adapter.ADAPTERS`; `conv` is the paper's.
        adapter_options: keyword arguments of that adapter's class.
        readout_size: number of rows of the read-out table; None: the LLM's whole vocabulary. Their token ids are
            a tensor of the adapter, `vocabulary`.
        readout_tokens: the most LLM tokens in one row; more than 1 only after `blsp move`.
        readout_vocabulary: the ids themselves, for a new adapter. It is never written; folders from before
            November 2026 have it in config.json.
        template_args: variables of the LLM's chat template, the same in every prompt, such as enable_thinking.
        no_speech_sentence: the answer to a clip without speech.
        rescore: True: the LLM chooses one of the adapter's likeliest read-outs and answers to it (`Listener`).
        lora: what `blsp train --lora` adds to the frozen parts: their names, its rank and alpha (lora.py).
        full_window: True pads the encoder's input to 30 s as the paper does; False uses true lengths.
        adapter_only: True if the folder holds only the adapter's tensors; `blsp export` writes False.
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
    tokenizer_sha256: str | None = None
    adapter: str = "conv"
    adapter_options: dict | None = None
    readout_size: int | None = None
    readout_tokens: int = 1
    readout_vocabulary: list[int] | None = None
    template_args: dict | None = None
    no_speech_sentence: str = NO_SPEECH_SENTENCE
    rescore: bool = False
    lora: dict | None = None
    full_window: bool = False
    adapter_only: bool = True
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.audio_config = _config(self.audio_config, default=WhisperConfig)
        self.text_config = _config(self.text_config, default=AutoConfig.for_model("llama").__class__)
        self.adapter_options = dict(self.adapter_options or {})
        if self.readout_vocabulary is not None:
            self.readout_size = len(self.readout_vocabulary)
        if self.audio_token_id is None:
            self.audio_token_id = self.text_config.vocab_size
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json: everything but the read-out vocabulary, which is stored with the weights."""
        return {name: value for name, value in super().to_dict().items() if name != "readout_vocabulary"}


def _config(value: Any, default: type) -> PretrainedConfig:
    """A configuration object from an object, a dict with `model_type`, or nothing."""
    if value is None:
        return default()
    if isinstance(value, dict):
        return AutoConfig.for_model(**value)
    return value


def config_file(folder: Any) -> Path:
    """The config.json of a folder or hub id; CheckpointError if there is none."""
    path = cached_file(str(folder), "config.json", _raise_exceptions_for_missing_entries=False)
    if path is None and os.path.lexists(Path(folder) / "config.json"):
        check_folder(Path(folder))
    if path is None:
        raise CheckpointError(f"{folder}: no config.json there; give a folder written by `blsp train` or `blsp export`")
    return Path(path)


def is_adapter_folder(folder: Any) -> bool:
    """Whether a checkpoint holds only the adapter."""
    path = config_file(folder)
    check_folder(path.parent)
    config = json.loads(path.read_text())
    return config.get("model_type") == "blsp" and config.get("adapter_only", False)


def open_config(folder: Any) -> BlspConfig:
    """The configuration of an adapter folder; errors of transformers become a FolderError with its name."""
    with naming_folder(folder):
        return BlspConfig.from_pretrained(config_file(folder).parent)
