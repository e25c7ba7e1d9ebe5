"""Tiny random models of every family we promise to drive, as the folders a user would name.

In:  a family's name. Out: Hugging Face folders of an LLM and a Whisper, or the BLSP model made of them.
Try: `model, processor = tiny_blsp(tmp_path, family="gemma2", adapter="grounded")`

All are float32 on disk; `tiny_blsp` gives float64, in which the laws hold to 1e-9. Gemma 2 stays in float32:
its capped attention takes the softmax in float32 whatever the model's type, and masks overflow there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM as CausalLM
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    WhisperConfig,
    WhisperFeatureExtractor,
)
from transformers.models.whisper import WhisperForConditionalGeneration

from blsp.distributed import Runtime
from blsp.model.checkpoint import new_blsp
from blsp.model.modeling_blsp import BlspForConditionalGeneration
from blsp.model.processing_blsp import BlspProcessor
from blsp.model.speech_encoder import mel_features
from blsp.weights.digest import find_weights

SPOKEN = "how many days are in a week what is the capital of france please repeat the following words hello world"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCABULARY = 320  # some more than the tokenizer has, as in Qwen
END_OF_TEXT, IM_START, IM_END = 0, 1, 2


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with 300 tokens and the ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SPOKEN] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.3,  # large, so that a random model writes something else at every step
    "bos_token_id": END_OF_TEXT,
    "eos_token_id": IM_END,
    "pad_token_id": END_OF_TEXT,
}
_GEMMA: dict[str, Any] = {
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 12,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "initializer_range": 0.1,
}
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**_SIZES),
    "qwen3": lambda: Qwen3Config(**_SIZES, head_dim=8),
    "gemma2": lambda: Gemma2Config(**_SIZES | _GEMMA, final_logit_softcapping=30.0, attn_logit_softcapping=50.0),
    "gemma3": lambda: Gemma3TextConfig(**_SIZES | _GEMMA),
}


TOLERANCE = {family: 1e-9 for family in FAMILIES} | {"gemma2": 1e-4}


def runtime_of(family: str) -> Runtime:
    """The CPU, in the type in which the laws are checked for this family."""
    dtype = torch.float32 if family == "gemma2" else torch.float64
    return Runtime(device=torch.device("cpu"), dtype=dtype, rank=0, world=1)


def save_language_model(folder: Path, family: str, seed: int = 1) -> str:
    """A random LLM of `family` with the tiny tokenizer, as a folder."""
    torch.manual_seed(seed)
    llm = CausalLM.from_config(FAMILIES[family]())
    llm.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def save_whisper(folder: Path, seed: int = 2) -> str:
    """A random Whisper, decoder and all, as a folder."""
    torch.manual_seed(seed)
    sizes = {"encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    decoder = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "vocab_size": 64}
    ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0}
    config = WhisperConfig(d_model=16, num_mel_bins=16, init_std=0.2, **sizes, **decoder, **ids)
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=16).save_pretrained(folder)
    return str(folder)


ADAPTER_OPTIONS: dict[str, dict[str, Any]] = {
    "conv": {"bottleneck": 8},
    "stack": {"hidden": 16},
    "grounded": {"bottleneck": 8, "hidden": 16, "layers": 2, "scale": 30.0},
}


def tiny_blsp(
    folder: Path, *, family: str = "llama", adapter: str = "conv", runtime: Runtime | None = None, **kwargs: Any
) -> tuple[BlspForConditionalGeneration, BlspProcessor]:
    """A BLSP model between a random Whisper and a random LLM that lie in `folder` (made when missing)."""
    audio, text = folder / "whisper", folder / family
    if not audio.exists():
        save_whisper(audio)
    if not text.exists():
        save_language_model(text, family)
    options = {**ADAPTER_OPTIONS[adapter], **kwargs.pop("adapter_options", {})}
    if adapter == "grounded":
        kwargs.setdefault("readout_vocabulary", list(range(3, 300)))
    runtime = runtime or runtime_of(family)
    model, processor = new_blsp(
        find_weights(audio), find_weights(text), runtime, adapter=adapter, adapter_options=options, **kwargs
    )
    model = model.to(runtime.dtype)
    if adapter == "grounded":
        _liven(model, processor)
    return model, processor


def speech_like(seconds: float, seed: int = 0) -> np.ndarray:
    """(N,) float32 at 16 kHz: noise that swells and fades like syllables."""
    generator = np.random.default_rng(seed)
    time = np.arange(int(seconds * 16000)) / 16000
    return (generator.standard_normal(len(time)) * 0.1 * (1 + np.sin(20 * time + seed))).astype(np.float32)


@torch.no_grad()
def _liven(model: BlspForConditionalGeneration, processor: BlspProcessor) -> None:
    """Make a random read-out vary from frame to frame, with about half of its frames blank."""
    adapter = model.model.multi_modal_projector
    for module in adapter.modules():
        if isinstance(module, torch.nn.Conv1d | torch.nn.Linear):
            module.weight *= 4
    features = mel_features(processor.feature_extractor, [speech_like(4.0, seed) for seed in range(4)])
    log_probs = model.get_audio_features(*features).adapter.log_probs.flatten(0, 1)  # (F, K)
    adapter.blank.bias += (log_probs[:, 1:].amax(dim=1) - log_probs[:, 0]).median()
