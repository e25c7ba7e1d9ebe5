"""The frozen LLM as training runs it: after a shared prefix, with or without kept activations.

In:  a prompt prefix's ids and right-padded embeddings that follow it. Out: last hidden states, before the head.
Try: `PromptedLLM(model).states(frame.prefix_ids, embeds)`
Flow: training/step.py and probes.py run every pass, the student's and the teacher's, through this.

Letters: B batch, L sequence after the prefix, D LLM width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from blsp.model.language_model import UnsupportedModelError, embed
from blsp.model.modeling_blsp import BlspForConditionalGeneration
from blsp.model.prefix import Prefix, compute_prefix

PREFIXES_KEPT = 64  # data whose every row has an instruction of its own would fill the memory otherwise


@dataclass
class PromptedLLM:
    """The frozen LLM after a prompt's prefix, whose key/values are computed once and shared by every batch.

    checkpoint_activations: keep no activations inside the layers of a pass with gradients; transformers then
    drops the key/values without a word, so the prefix is put before the sequence instead.
    reuse_prefix: False puts it there always (lockstep.py).
    """

    model: BlspForConditionalGeneration
    checkpoint_activations: bool = False
    reuse_prefix: bool = True
    known: OrderedDict[tuple[int, ...], Prefix] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        if self.checkpoint_activations:
            self.model.model.language_model.activation_checkpointing_enable()

    def states(self, prefix_ids: tuple[int, ...], embeds: Tensor) -> Tensor:
        """Last hidden states (B, L, D) of right-padded embeds (B, L, D).

        No mask: causal attention never looks at the padding on the right, whose states nobody reads.
        """
        batch, width = embeds.shape[:2]
        before = len(prefix_ids)
        positions = torch.arange(before + width, device=embeds.device)[None, :].expand(batch, -1)
        decoder = self.model.model.language_model
        checkpointing = self.checkpoint_activations and torch.is_grad_enabled()
        if checkpointing or not self.reuse_prefix:
            whole = torch.cat([embed(self.model, prefix_ids).expand(batch, -1, -1), embeds], dim=1)
            with _checkpointing(decoder) if checkpointing else nullcontext():
                output = decoder(inputs_embeds=whole, position_ids=positions, use_cache=False)
            return output.last_hidden_state[:, before:]
        return decoder(
            inputs_embeds=embeds,
            position_ids=positions[:, before:],
            past_key_values=self._prefix(prefix_ids).expand(batch),
            use_cache=True,
        ).last_hidden_state

    def _prefix(self, ids: tuple[int, ...]) -> Prefix:
        if ids not in self.known:
            self.known[ids] = compute_prefix(self.model, ids)
        self.known.move_to_end(ids)
        if len(self.known) > PREFIXES_KEPT:
            self.known.popitem(last=False)
        return self.known[ids]


@contextmanager
def _checkpointing(decoder: nn.Module) -> Iterator[None]:
    """The layers, not what is inside them, in training mode: they checkpoint, and no dropout wakes up."""
    layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UnsupportedModelError(f"{type(decoder).__name__}: has no layers that can be checkpointed")
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
