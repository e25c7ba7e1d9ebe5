"""The frozen decoder-only LLM: decoder, embeddings, logits and log-probabilities, whatever its family.

In:  any Hugging Face causal LM, or `BlspForConditionalGeneration`, which has the same methods.
Out: its decoder without the head, its embeddings, its logits; an error for a family that BLSP cannot use.
Try: `logits_of(llm, decoder_of(llm)(input_ids).last_hidden_state)`
Flow: **language_model.py** → prefix.py, decoding.py, teacher_forcing.py; the model and the losses.

The head is run apart from the decoder, so that logits are computed only at the positions that need them. Families that
scale or cap their logits are handled. Those without plain key/value attention cannot share a prefix and are refused.

Shapes: V vocabulary, D LLM width, B batch.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from blsp.distributed import send

PLAIN_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
# Llama and most others; Phi; GPT-NeoX; GPT-2, Falcon and BLOOM; MPT
FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f")
CHUNK_LOGITS = 2**24  # the most logits in memory at once: 64 MiB in float32


class UnsupportedModelError(ValueError):
    """A language model or encoder that BLSP cannot use; the message names it and says why."""


def check_supported(config: PretrainedConfig, folder: str = "") -> None:
    """Raise `UnsupportedModelError` unless `config` is a decoder-only LLM with plain key/value attention.

    folder: named in the message.
    """
    name = f"{folder}: {config.model_type}" if folder else config.model_type
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{name}: not a decoder-only language model; take a causal LM such as Llama or Qwen"
        )
    other = set(getattr(config, "layer_types", None) or []) - PLAIN_ATTENTION
    if other or any(hasattr(config, mark) for mark in ("ssm_cfg", "state_size", "mamba_d_state", "attn_layer_period")):
        kinds = ", ".join(sorted(other)) or "state-space"
        raise UnsupportedModelError(f"{name}: has {kinds} layers, whose state cannot be shared as a prefix")
    if getattr(config, "lm_head_multiplier", 1.0) != 1.0 or getattr(config, "mup_width_scale", None) is not None:
        raise UnsupportedModelError(f"{name}: scales its logits in a way that BLSP does not support")


def head_has_bias(config: PretrainedConfig) -> bool:
    """Whether the LLM's vocabulary projection has a bias, as in Phi."""
    with torch.device("meta"):
        head = AutoModelForCausalLM.from_config(config).get_output_embeddings()
    return getattr(head, "bias", None) is not None


def decoder_of(llm: PreTrainedModel) -> nn.Module:
    """The transformer without its head: `decoder(inputs_embeds=…).last_hidden_state` is (B, L, D)."""
    return llm.get_decoder()


def final_norm(llm: PreTrainedModel) -> nn.Module:
    """The norm between the decoder's last layer and the head; raises UnsupportedModelError if its name is unknown."""
    decoder = decoder_of(llm)
    for name in FINAL_NORMS:
        if isinstance(norm := getattr(decoder, name, None), nn.Module):
            return norm
    family = llm.config.get_text_config().model_type
    raise UnsupportedModelError(f"{family}: its decoder has no final norm called {', '.join(FINAL_NORMS)}")


def embed(llm: PreTrainedModel, ids: Any) -> Tensor:
    """Token embeddings (…, D) of a tensor or a list of ids."""
    table = llm.get_input_embeddings()
    return table(send(torch.as_tensor(ids, dtype=torch.long), table.weight.device))


def logits_of(llm: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits (…, V) from the decoder's hidden states (…, D), scaled and capped as the LLM's family does."""
    return scale_logits(llm.config.get_text_config(), llm.get_output_embeddings()(hidden))


def scale_logits(config: PretrainedConfig, logits: Tensor) -> Tensor:
    """Scale or cap the logits: Cohere multiplies them, Granite divides, Gemma 2 caps; others use them as they are."""
    if (factor := getattr(config, "logit_scale", None)) is not None:
        logits = logits * factor
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits


def at_least_float32(logits: Tensor) -> Tensor:
    """Half-precision logits as float32: a softmax over 150,000 logits in bfloat16 is too inexact."""
    return logits if logits.dtype == torch.float64 else logits.float()


def log_probabilities(llm: PreTrainedModel, hidden: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities (…, V) of the next token, from the decoder's hidden states (…, D)."""
    return (at_least_float32(logits_of(llm, hidden)) / temperature).log_softmax(dim=-1)


def rows_per_chunk(vocabulary: int) -> int:
    """How many positions may go through the head at once without more than `CHUNK_LOGITS` logits."""
    return max(1, CHUNK_LOGITS // vocabulary)


def valid_mask(lengths: Tensor, width: int) -> Tensor:
    """(B, width) bool: True before each row's length (B,)."""
    return torch.arange(width, device=lengths.device)[None, :] < lengths[:, None]


def stop_ids(llm: PreTrainedModel) -> tuple[int, ...]:
    """The ids that end an answer, from the generation configuration."""
    ids = llm.generation_config.eos_token_id if llm.generation_config else None
    if ids is None:
        ids = llm.config.get_text_config().eos_token_id
    if ids is None:
        raise UnsupportedModelError(f"{llm.config.model_type}: its configuration names no end-of-sequence token")
    return tuple(ids) if isinstance(ids, (list, tuple)) else (int(ids),)


def kl_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """(N,): KL(teacher || student) in nats at each position, from log-probabilities (N, V) over the whole vocabulary.

    The one formula of the training loss, the probes and the evaluation.
    """
    return (teacher.exp() * (teacher - student)).sum(dim=-1)
