"""A frozen LLM that is too large for one device, spread over the ranks (FSDP2).

In:  a folder of safetensors, the LLM's configuration, the `Runtime` of a rank.
Out: the LLM. Each rank has read only its own part of the layers; a layer is gathered while it runs.
Try: ``torchrun --nproc-per-node 2 -m blsp generate --shard-llm --model M --manifest in.jsonl --out out.jsonl``
Flow: weights/folder.py -> **sharding.py** -> model/loading.py

Embeddings, final norm and head stay whole on each rank: they are called apart from the layers (prefix, response logits)
and are small beside them. With several nodes each node holds the whole LLM, spread over its own devices, so that layers
do not cross the network; with one device a node it is spread over all of them.

Every rank must run the layers equally often, or the others wait for ever. Training arranges its passes
(training/loop.py); elsewhere `run_together` lets ranks that wait take part in the passes of the others.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from blsp.distributed import Runtime, announce_pass, share_passes
from blsp.llm.language_model import UnsupportedModelError, decoder_of
from blsp.llm.prefix import run_after_prefix
from blsp.weights.folder import FolderError, open_tensors, weight_files


def load_sharded(folder: Path, config: PretrainedConfig, runtime: Runtime) -> PreTrainedModel:
    """The LLM of a folder, frozen; this rank's part of each layer, and the rest whole.

    Raises FolderError where the files lack a tensor under the name that the model gives it.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):  # buffers are not in the files
        llm = AutoModelForCausalLM.from_config(
            config, dtype=runtime.dtype, attn_implementation=runtime.attention, trust_remote_code=False
        )
    llm = llm.eval().requires_grad_(False)
    llm.tie_weights()  # a tied head has no tensor of its own in the files
    _shard_layers(llm, runtime)
    parameters = dict(llm.named_parameters())  # tied ones once
    loaded: dict[str, Tensor] = {}
    for path in weight_files(folder):
        with open_tensors(path) as file:  # one at a time, its tensors copied: a mapped file counts as memory
            for name in parameters.keys() & set(file.keys()):
                stored, parameter = file.get_slice(name), parameters[name]
                if stored.get_shape() != list(parameter.shape):
                    raise FolderError(
                        f"{path}: {name} is {stored.get_shape()}, but config.json makes it {list(parameter.shape)}; "
                        "fetch the folder again"
                    )
                loaded[name] = _read_part(stored, parameter, runtime)
    if missing := sorted(parameters.keys() - loaded.keys()):
        raise FolderError(
            f"{folder}: has no tensor {missing[0]}, so its layers cannot be read apart; leave out --shard-llm"
        )
    llm.load_state_dict(loaded, strict=False, assign=True)
    llm.tie_weights()
    for module in llm.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(runtime.device))
    if (folder / "generation_config.json").exists():
        llm.generation_config = GenerationConfig.from_pretrained(folder)
    return llm.requires_grad_(False)


def _shard_layers(llm: PreTrainedModel, runtime: Runtime) -> None:
    """Wrap each decoder layer, and the decoder as their root; everything else stays whole."""
    from torch.distributed.fsdp import fully_shard

    decoder = decoder_of(llm)
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UnsupportedModelError(
            f"{type(llm).__name__}: its decoder has no list named `layers` to spread over ranks"
        )
    mesh = _mesh(runtime)
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    in_layers = {id(parameter) for parameter in layers.parameters()}
    whole = {parameter for parameter in decoder.parameters() if id(parameter) not in in_layers}
    fully_shard(decoder, mesh=mesh, ignored_params=whole)


def _mesh(runtime: Runtime) -> Any:
    """The devices that hold one LLM, and where there are several nodes, the nodes that hold one each."""
    from torch.distributed.device_mesh import init_device_mesh

    local = int(os.environ.get("LOCAL_WORLD_SIZE", runtime.world))  # set by torchrun
    if 1 < local < runtime.world and runtime.world % local == 0:
        shape, names = (runtime.world // local, local), ("nodes", "local")
        return init_device_mesh(runtime.device.type, shape, mesh_dim_names=names)
    return init_device_mesh(runtime.device.type, (runtime.world,))


def _read_part(stored: Any, parameter: Tensor, runtime: Runtime) -> nn.Parameter:
    """This rank's part of a stored tensor, in the form of `parameter`, which is on the meta device."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not isinstance(parameter, DTensor):
        return nn.Parameter(stored[:].to(runtime.device, runtime.dtype, copy=True), requires_grad=False)
    mesh, placements = parameter.device_mesh, parameter.placements
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    first, count = offset[0], shape[0]  # FSDP cuts along the first dimension
    part = stored[first : first + count].to(runtime.device, runtime.dtype, copy=True)
    whole = DTensor.from_local(part, mesh, placements, shape=parameter.shape, stride=parameter.stride())
    return nn.Parameter(whole, requires_grad=False)


def run_together(llm: PreTrainedModel) -> None:
    """Let ranks that have nothing to ask the sharded LLM take part in the passes of the others, without gradient."""
    decoder, weight = decoder_of(llm), llm.get_input_embeddings().weight
    empty = torch.zeros(1, 1, weight.shape[1], dtype=weight.dtype, device=weight.device)
    asked = True

    def announce(*_: Any) -> None:
        if asked:
            announce_pass()

    @torch.no_grad()
    def empty_pass() -> None:
        nonlocal asked
        asked = False
        try:
            decoder(inputs_embeds=empty, use_cache=False)
        finally:
            asked = True

    decoder.register_forward_pre_hook(announce)
    share_passes(empty_pass)


def dummy_pass(llm: PreTrainedModel) -> None:
    """Forward and backward over one position, without using the result: this rank's part in the others' pass."""
    weight = llm.get_input_embeddings().weight
    embeds = torch.zeros(1, 1, weight.shape[1], dtype=weight.dtype, device=weight.device, requires_grad=True)
    run_after_prefix(llm, None, embeds).last_hidden_state.sum().backward()
