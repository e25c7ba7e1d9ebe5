"""An LLM that is spread over two ranks: the same numbers, its own part of the files alone, no rank left waiting."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import save_language_model, speech_like, tiny_blsp
from test_distributed import run_ranks
from transformers import AutoModelForCausalLM

import blsp
from blsp.continuation.topk import topk_folder
from blsp.continuation.writer import write_continuations
from blsp.data.audio import write_wav
from blsp.distributed import find_runtime
from blsp.inference.generate import generate
from blsp.model.checkpoint import save_adapter
from blsp.model.loading import load_language_model
from blsp.settings import ContinueSettings, GenerateSettings
from blsp.weights.digest import find_weights

LOAD = """
from blsp.distributed import find_runtime, barrier, leave
from blsp.model.loading import load_language_model
from blsp.weights.digest import find_weights
from blsp.llm.sharding import run_together
import torch
runtime = find_runtime("cpu", "float64", shard_llm=True)
llm, _ = load_language_model(find_weights({folder!r}), runtime)
"""
PASSES = """
run_together(llm)
for number in range(3 if runtime.rank == 0 else 1):
    with torch.no_grad():
        logits = llm(torch.tensor([[5, 6, 7 + number]])).logits
barrier(runtime)
layers = list(llm.model.layers.parameters())
print(sum(each.to_local().numel() for each in layers), sum(each.numel() for each in layers), logits.sum().item())
leave(runtime)
"""


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_two_ranks_hold_half_of_the_layers_each_and_compute_what_one_does(tiny_llm, family: str) -> None:
    folder = tiny_llm(family)
    printed = [text.splitlines()[-1].split() for text in run_ranks(LOAD.format(folder=folder) + PASSES)]
    llm, _ = load_language_model(find_weights(folder), find_runtime("cpu", "float64"))
    for (own, whole, total), last in zip(printed, (9, 7), strict=True):  # rank 0 asked more often
        assert 0.4 < int(own) / int(whole) < 0.6
        with torch.no_grad():
            expected = llm(torch.tensor([[5, 6, last]])).logits.sum().item()
        assert float(total) == pytest.approx(expected, abs=1e-9)


def test_several_files_and_several_nodes(tmp_path: Path) -> None:
    folder = save_language_model(tmp_path / "llm", "llama")
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    whole.save_pretrained(folder, max_shard_size="50KB")
    assert (Path(folder) / "model.safetensors.index.json").exists()
    (Path(folder) / "model.safetensors").unlink(missing_ok=True)
    nodes = "import os\nos.environ['LOCAL_WORLD_SIZE'] = '2'\n" + LOAD.format(folder=folder)
    nodes += "print(tuple(llm.model.layers[0].mlp.up_proj.weight.device_mesh.shape))\n" + PASSES
    printed = [text.splitlines() for text in run_ranks(nodes, world=4)]
    assert [lines[0] for lines in printed] == ["(2, 2)"] * 4
    with torch.no_grad():
        expected = [whole(torch.tensor([[5, 6, last]])).logits.sum().item() for last in (9, 7, 7, 7)]
    assert [float(lines[-1].split()[2]) for lines in printed] == pytest.approx(expected, abs=1e-9)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = save_language_model(tmp_path / "llm", "llama")
    tensors = load_file(Path(folder, "model.safetensors"))
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, Path(folder, "model.safetensors"), metadata={"format": "pt"})
    program = LOAD.format(folder=folder).replace("llm, _ =", "try:\n    llm, _ =")
    program += "except ValueError as error:\n    print(error)\n"
    for text in run_ranks(program):
        assert "layers.1.mlp.up_proj.weight" in text and "--shard-llm" in text


GRADIENTS = """
from transformers import AutoModelForCausalLM
from torch.distributed.tensor import DTensor
torch.manual_seed(0)
ids = torch.randint(0, 64, (2, 9))
def run(llm):
    embeds = llm.get_input_embeddings()(ids).clone().requires_grad_()
    with torch.no_grad():  # a prompt's prefix is constant
        prefix = llm.model(inputs_embeds=embeds[:, :4], use_cache=True)
    hidden = llm.model(inputs_embeds=embeds[:, 4:], past_key_values=prefix.past_key_values).last_hidden_state
    logits = llm.lm_head(hidden)
    return logits.detach(), torch.autograd.grad(logits.logsumexp(-1).sum(), embeds)[0]
whole = run(AutoModelForCausalLM.from_pretrained({folder!r}, dtype=torch.float64).eval().requires_grad_(False))
assert all(isinstance(p, DTensor) for p in llm.model.layers.parameters())
for a, b in zip(whole, run(llm)):
    torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
llm.train()
llm.gradient_checkpointing_enable({{"use_reentrant": False}})
embeds = llm.get_input_embeddings()(ids).requires_grad_()
def gradient():
    hidden = llm.model(inputs_embeds=embeds).last_hidden_state
    return torch.autograd.grad(llm.lm_head(hidden).sum(), embeds)[0]
recomputed = gradient()
llm.gradient_checkpointing_disable()
llm.eval()
torch.testing.assert_close(recomputed, gradient(), atol=1e-12, rtol=0)
print("equal")
leave(runtime)
"""


def test_gradients_are_the_same_also_after_a_prefix_and_with_checkpointed_activations(tiny_llm) -> None:
    printed = run_ranks((LOAD + GRADIENTS).format(folder=tiny_llm("llama")))
    assert [text.splitlines()[-1] for text in printed] == ["equal", "equal"]


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    rows = []
    for number in range(7):
        write_wav(tmp_path / f"{number}.wav", speech_like(0.4 + 0.2 * number, number))
        rows.append({"id": str(number), "audio": f"{number}.wav", "text": "one two three"[: 3 + 2 * number]})
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "in.jsonl"


def test_generate_and_score_only_write_what_one_process_writes(
    manifest: Path, tiny_models_folder: Path, tiny_llm
) -> None:
    blsp.register()
    folder = manifest.parent
    save_adapter(
        *tiny_blsp(tiny_models_folder, adapter="grounded", runtime=find_runtime("cpu", "float32")), folder / "m"
    )
    answer = GenerateSettings(
        manifest=str(manifest),
        out=folder / "one.jsonl",
        model=str(folder / "m"),
        instruction="repeat",
        max_new_tokens=6,
        batch_size=1,
        dtype="float64",
    )
    score = ContinueSettings(
        manifest=str(manifest),
        out=folder / "c.jsonl",
        llm=tiny_llm("llama"),
        max_new_tokens=6,
        batch_size=2,
        dtype="float64",
    )
    generate(answer)
    program = f"""
from pathlib import PosixPath
from dataclasses import replace
from blsp.settings import *
from blsp.inference.generate import generate
generate(replace({answer!r}, shard_llm=True, out=PosixPath({str(folder / "two.jsonl")!r})))
"""
    run_ranks(program)
    assert (folder / "two.jsonl").read_text() == (folder / "one.jsonl").read_text()

    write_continuations(score)
    for name in ("one", "two"):
        for suffix in ("", ".meta.json"):
            (folder / f"{name}-c.jsonl{suffix}").write_bytes((folder / f"c.jsonl{suffix}").read_bytes())
    write_continuations(_scoring(score, folder / "one-c.jsonl"))
    program = f"""
from pathlib import PosixPath
from dataclasses import replace
from blsp.settings import *
from blsp.continuation.writer import write_continuations
write_continuations(replace({_scoring(score, folder / "two-c.jsonl")!r}, shard_llm=True))
"""
    run_ranks(program)
    for name in ("ids.u32", "logp.f16", "index.npy"):
        one, two = ((topk_folder(folder / f"{each}-c.jsonl") / name).read_bytes() for each in ("one", "two"))
        assert one == two


def _scoring(settings: ContinueSettings, out: Path) -> ContinueSettings:
    return replace(settings, out=out, score_only=True, top_k=4)
