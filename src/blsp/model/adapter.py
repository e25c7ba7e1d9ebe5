"""Modality adapters: the only part that is trained. `ADAPTERS` is the dict of all of them.

In:  encoder states (B, T, E) at 50 frames/s and their lengths (B,).
Out: `AdapterOutput`: vectors in the LLM's embedding space (B, S, D), S a function of T alone.
Try: `build_adapter(config)(states, lengths, table)`
Flow: encoder states → **vectors** → the LLM.

`conv` is the paper's (§2.2 and its released code). `stack` joins neighbouring frames and applies a SwiGLU
MLP, as most later systems do. `grounded` (grounded.py) reads the speech out over the LLM's own tokens.

A new adapter is one entry in `ADAPTERS`, here or from a plugin (docs/extending.md). It is an `nn.Module` with

    __init__(speech_width, text_width, *, embedding_std, …)  options come from `--adapter-options`; an adapter
                                                             that reads out also gets `classes`
    strides        how much shorter the sequence gets, stride by stride (each rounds up)
    first_centre   optional: the encoder frame in the middle of the first vector (default: of its own frames)
    start_around(mean)       optional: start at the mean (D,) of the LLM's embeddings
    fresh_options  optional: options of a new adapter that differ from the defaults of the class
    reads_out      True: it gives one vector for each token that it reads out, knows clips without speech,
                   and also has what grounded.py has: `hidden_states`, `logits`, `spell` and `widen`
    forward(states, lengths, table) -> AdapterOutput         table (K-1, D): embeddings of the read-out
                                                             vocabulary; None unless the adapter reads out

Shapes: B clips, T encoder frames, S audio tokens, E encoder width, D LLM width, K read-out classes.
"""

import inspect
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file

from blsp.llm.language_model import valid_mask
from blsp.model.adapter_parts import AdapterOutput, ConvStack, num_audio_tokens, plain_output
from blsp.model.configuration_blsp import BlspConfig, CheckpointError
from blsp.model.grounded import GroundedAdapter, token_strings
from blsp.model.weight_samples import LORA


class AdapterError(ValueError):
    """An adapter that cannot be made; the message names it, the option and the allowed values."""


class ConvAdapter(nn.Module):
    """The paper's adapter: 3 × (Conv1d k5 s2 p2 + GLU), bottleneck with residual, LayerNorm; 6.25 vectors/s.

    47,467,520 parameters for E = 768, D = 4096. `embedding_std` sets the LayerNorm's first gain, and `start_around`
    its first bias, so that the first vectors are distributed like the LLM's own embeddings. If a user gives the option
    `embedding_std`, the bias starts at 0.
    """

    reads_out: ClassVar[bool] = False
    first_centre: ClassVar[float] = 0.0  # with padding 2 a kernel of 5 is centred on its first frame

    def __init__(
        self, speech_width: int, text_width: int, *, bottleneck: int = 512, embedding_std: float = 1.0
    ) -> None:
        super().__init__()
        self.strides = [2, 2, 2]
        self.stack = ConvStack([speech_width, speech_width, speech_width, text_width], self.strides)
        self.down = nn.Linear(text_width, bottleneck, bias=False)
        self.up = nn.Linear(bottleneck, text_width, bias=False)
        self.norm = nn.LayerNorm(text_width)
        nn.init.constant_(self.norm.weight, embedding_std)

    def start_around(self, mean: Tensor) -> None:
        """Set the first bias: the mean (D,) of the LLM's embeddings, which makes up most of their length."""
        self.norm.bias.data.copy_(mean)

    def forward(self, states: Tensor, lengths: Tensor, table: Tensor | None = None) -> AdapterOutput:
        hidden, lengths = self.stack(states, lengths)  # (B, S, D)
        hidden = self.norm(hidden + self.up(nn.functional.gelu(self.down(hidden))))
        return plain_output(hidden, lengths)


class StackAdapter(nn.Module):
    """`frames` neighbouring encoder frames joined, then RMSNorm and a SwiGLU MLP (8 frames: 6.25 vectors/s).

    norm: the last norm: `layer`, which has a bias, or `rms` (in folders from before December 2026).
    """

    reads_out: ClassVar[bool] = False
    fresh_options: ClassVar[dict[str, Any]] = {"norm": "layer"}

    def __init__(
        self,
        speech_width: int,
        text_width: int,
        *,
        frames: int = 8,
        hidden: int = 2048,
        norm: str = "rms",
        embedding_std: float = 1.0,
    ) -> None:
        super().__init__()
        self.strides = [frames]
        self.norm_in = nn.RMSNorm(speech_width * frames)
        self.gate_up = nn.Linear(speech_width * frames, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, text_width, bias=False)
        if norm not in ("layer", "rms"):
            raise ValueError(f"norm={norm}: must be layer or rms")
        self.norm = nn.LayerNorm(text_width) if norm == "layer" else nn.RMSNorm(text_width)
        nn.init.constant_(self.norm.weight, embedding_std)

    def start_around(self, mean: Tensor) -> None:
        """Set the first bias, if the norm has one: the mean (D,) of the LLM's embeddings."""
        if isinstance(self.norm, nn.LayerNorm):
            self.norm.bias.data.copy_(mean)

    def forward(self, states: Tensor, lengths: Tensor, table: Tensor | None = None) -> AdapterOutput:
        (frames,) = self.strides
        states = states * valid_mask(lengths, states.shape[1])[:, :, None]
        missing = -states.shape[1] % frames  # zeros that complete the last group of frames
        stacked = nn.functional.pad(states, (0, 0, 0, missing)).unflatten(1, (-1, frames)).flatten(2)
        gate, up = self.gate_up(self.norm_in(stacked)).chunk(2, dim=-1)  # (B, S, hidden) each
        hidden = self.norm(self.down(nn.functional.silu(gate) * up))  # (B, S, D)
        return plain_output(hidden, num_audio_tokens(lengths, self.strides))


ADAPTERS: dict[str, Any] = {"conv": ConvAdapter, "stack": StackAdapter, "grounded": GroundedAdapter}


def adapter_class(name: str) -> Any:
    """The class of the adapter `name`; AdapterError if there is none."""
    if name not in ADAPTERS:
        raise AdapterError(
            f"adapter {name!r}: must be one of {', '.join(ADAPTERS)}; add your own "
            "to blsp.model.adapter.ADAPTERS in a module, and name the module in BLSP_PLUGINS"
        )
    return ADAPTERS[name]


def default_options(adapter: str) -> dict[str, Any]:
    """The options of the adapter's class with their defaults. Users cannot set `classes`."""
    parameters = list(inspect.signature(adapter_class(adapter)).parameters.values())[2:]
    return {item.name: item.default for item in parameters if item.name != "classes"}


def check_options(adapter: str, names: Iterable[str]) -> None:
    """Raise AdapterError for an option that the adapter's class does not have."""
    allowed = default_options(adapter)
    if unknown := [name for name in names if name not in allowed]:
        listed = ", ".join(f"{name}={value}" for name, value in allowed.items())
        raise AdapterError(f"adapter {adapter!r} has no option {unknown[0]!r}; it has {listed}")


def build_adapter(config: BlspConfig) -> Any:
    """A newly initialised adapter, as the configuration describes it.

    If it reads out a part of the LLM's vocabulary, it also has `vocabulary`, the token ids of its classes
    (see `set_vocabulary`), which are saved with its weights.
    """
    kind = adapter_class(config.adapter)
    options = dict(config.adapter_options or {})
    check_options(config.adapter, options)
    if kind.reads_out:
        options["classes"] = config.readout_size or config.text_config.vocab_size
        if options["classes"] > config.text_config.vocab_size:
            raise AdapterError(
                f"{options['classes']} tokens to read out, but the LLM has {config.text_config.vocab_size}"
            )
    try:
        adapter = kind(config.audio_config.d_model, config.text_config.hidden_size, **options)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise AdapterError(f"adapter {config.adapter!r} cannot be made with {options}: {error}") from error
    if kind.reads_out and config.readout_size is not None:
        rows = config.readout_vocabulary or range(config.readout_size)  # a stored adapter's own replace these
        set_vocabulary(adapter, config, [(token,) * config.readout_tokens for token in rows])
    return adapter


def set_vocabulary(adapter: Any, config: BlspConfig, rows: Sequence[Sequence[int]]) -> None:
    """Store the LLM's tokens of each row of the read-out table; nothing, where they are its whole vocabulary.

    The buffer `vocabulary` is (K-1,) where each row is one token, else (K-1, P), filled up with -1.
    """
    whole = len(rows) == config.text_config.vocab_size
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows], dtype=torch.int32)
    ids = ids.to(next(adapter.parameters()).device)
    adapter.register_buffer("vocabulary", None if whole else ids[:, 0] if width == 1 else ids)
    config.readout_size, config.readout_tokens = (None, 1) if whole else (len(rows), width)


def readout_rows(vocabulary: Tensor) -> list[tuple[int, ...]]:
    """The LLM's tokens of each row of the read-out table, from the buffer `vocabulary`."""
    return [tuple(token for token in row if token >= 0) for row in vocabulary.reshape(len(vocabulary), -1).tolist()]


def mean_embeddings(embedding: nn.Embedding, vocabulary: Tensor) -> Tensor:
    """(K-1, D): the mean embedding of each row's tokens, from the buffer `vocabulary`."""
    if vocabulary.ndim == 1:
        return embedding(vocabulary.long())
    written = vocabulary >= 0  # (K-1, P)
    # a column at a time: (K-1, P, D) at once would be several times the table
    columns = zip(vocabulary.clamp(min=0).long().T, written.T, strict=True)
    total = sum(embedding(tokens) * here[:, None] for tokens, here in columns)  # (K-1, D)
    return total / written.sum(dim=1, keepdim=True)


def widen_readout(adapter: Any, config: BlspConfig, tokens: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> None:
    """Add these LLM tokens to the read-out vocabulary."""
    if config.readout_size is None:
        return
    known = readout_rows(adapter.vocabulary)
    rows = sorted({*known, *((token,) for token in tokens)})
    if len(rows) > len(known):
        number = {row: index for index, row in enumerate(rows)}
        adapter.widen([number[row] for row in known], ["".join(token_strings(tokenizer, row)) for row in rows])
        set_vocabulary(adapter, config, rows)


def load_adapter(folder: str | Path, config: BlspConfig) -> Any:
    """The trained adapter of a folder, in float32; CheckpointError if tensors are missing or do not fit."""
    state = adapter_state(folder, config)
    try:
        with torch.device("meta"):  # compare the shapes before memory is allocated
            build_adapter(config).load_state_dict(state, strict=True, assign=True)
        adapter = build_adapter(config)
        adapter.load_state_dict(state, strict=True)
    except (RuntimeError, AdapterError) as error:
        raise CheckpointError(f"{folder}: its tensors do not fit its config.json: {error}") from error
    check_adapter(folder, adapter, config)
    return adapter


def check_adapter(folder: str | Path, adapter: nn.Module, config: BlspConfig) -> None:
    """Raise CheckpointError for weights that are not finite, and for read-out tokens that the LLM does not have."""
    for name, tensor in adapter.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{folder}: {name} holds NaN or infinite weights; take an earlier checkpoint")
    vocabulary = getattr(adapter, "vocabulary", None)
    size = config.text_config.vocab_size
    if vocabulary is not None and not all(row and max(row) < size for row in readout_rows(vocabulary)):
        raise CheckpointError(f"{folder}: reads out token {int(vocabulary.max())}, but the LLM has {size} tokens")


def adapter_state(folder: str | Path, config: BlspConfig) -> dict[str, Tensor]:
    """An adapter folder's tensors under the adapter's own names, with weights in float32.

    Folders from before November 2026 have the read-out vocabulary in config.json; it becomes a tensor here.
    """
    stored = load_file(str(cached_file(str(folder), "model.safetensors")))  # loading has checked the file
    prefix = "model.multi_modal_projector."
    state = {
        name.removeprefix(prefix): as_dtype(tensor, torch.float32)
        for name, tensor in stored.items()
        if not (config.lora and LORA in name)
    }
    if config.readout_vocabulary is not None:
        state.setdefault("vocabulary", torch.tensor(config.readout_vocabulary, dtype=torch.int32))
    return state


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights in `dtype`; integers (token ids, spelling) do not change."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def check_loaded(folder: Any, model: Any, missing: Collection[str]) -> None:
    """Raise `CheckpointError` when a merged checkpoint lacks tensors of the model.

    A read-out vocabulary in config.json (before November 2026) is moved into the adapter.
    """
    config = model.config
    if config.readout_vocabulary is not None:
        adapter = getattr(model, model.base_model_prefix, model).multi_modal_projector
        set_vocabulary(adapter, config, [(token,) for token in config.readout_vocabulary])
        config.readout_vocabulary = None
        missing = [name for name in missing if not name.endswith("multi_modal_projector.vocabulary")]
    if missing:
        raise CheckpointError(f"{folder}: {sorted(missing)[0]} is missing from it; export or download it again")
