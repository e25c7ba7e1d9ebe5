"""The weights of the LLM in 16, 8 and 4 bits: similar answers, smaller tensors, and clear errors."""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from blsp import cli, settings
from blsp.distributed import find_runtime
from blsp.inference import listener
from blsp.llm import quantise
from blsp.llm.language_model import UnsupportedModelError, decoder_of, kl_divergence
from blsp.llm.quantise import Int8Linear, set_weights
from blsp.model.loading import load_language_model
from blsp.weights.digest import find_weights


@pytest.mark.parametrize(("weights", "divergence"), [("bfloat16", 0.01), ("int8", 0.02), ("int4", 0.5)])
@pytest.mark.parametrize("family", ["llama", "qwen2"])  # Qwen 2 has biases, and a head of its own
def test_the_llm_answers_nearly_as_before(
    tiny_llm: Callable[[str], str], family: str, weights: str, divergence: float
) -> None:
    pytest.importorskip("torchao")
    folder = find_weights(tiny_llm(family))
    ids = torch.arange(3, 40)[None]
    llm, _ = load_language_model(folder, find_runtime("cpu", "float32"))
    before = llm(ids).logits[0].log_softmax(-1)
    llm, _ = load_language_model(folder, find_runtime("cpu", "float32", weights))
    assert {parameter.dtype for parameter in llm.parameters()} == {torch.bfloat16}
    assert llm.get_output_embeddings().weight.dtype == torch.bfloat16
    after = llm(ids).logits[0].float().log_softmax(-1)
    assert 0 < kl_divergence(before, after).mean() < divergence


@pytest.mark.parametrize("has", [True, False])
def test_bfloat16_warns_where_the_processor_emulates_it(
    tiny_llm: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, has: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has})
    set_weights(AutoModelForCausalLM.from_pretrained(tiny_llm("llama")), "bfloat16")
    assert ("emulates bfloat16" in caplog.text) == (not has)


def test_int8_layers_multiply_as_their_weights_say() -> None:
    pytest.importorskip("torchao")
    layer = nn.Linear(64, 32).bfloat16()
    inputs, exact = torch.randn(2, 3, 64).bfloat16(), layer.weight.float().clone()
    packed = quantise._converter("int8", "cpu")(layer)
    assert isinstance(packed, Int8Linear) and packed.int8.dtype == torch.int8
    wanted = inputs.float() @ exact.T + layer.bias.float()
    torch.testing.assert_close(packed(inputs).float(), wanted, rtol=0.02, atol=0.05)


def test_a_missing_kernel_is_noticed_at_load(tiny_llm: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    llm = AutoModelForCausalLM.from_pretrained(tiny_llm("llama"))

    def missing(*_: Any) -> torch.Tensor:
        raise NotImplementedError("not implemented for this CPU")

    monkeypatch.setattr(torch, "_weight_int8pack_mm", missing)
    with pytest.raises(UnsupportedModelError, match=r"--weights int8: .* cannot be computed on cpu: not .* bfloat16"):
        set_weights(llm, "int8")


def test_int4_leaves_layers_that_no_kernel_takes(tiny_llm: Callable[[str], str]) -> None:
    pytest.importorskip("torchao")
    llm = AutoModelForCausalLM.from_pretrained(tiny_llm("llama"))
    odd = decoder_of(llm).layers[0].mlp.up_proj = nn.Linear(33, 64)
    set_weights(llm, "int4")
    assert type(odd.weight) is nn.Parameter and "Int4" in type(decoder_of(llm).layers[1].mlp.up_proj.weight).__name__


def test_a_machine_without_torchao_is_told_what_to_install(
    tiny_llm: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = AutoModelForCausalLM.from_pretrained(tiny_llm("llama"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setattr("blsp.inference.chat.chat", lambda _: set_weights(llm, "int4"))
    assert cli.main(["chat"]) == 1
    assert "pip install 'blsp[quant]'" in capsys.readouterr().err


COMMANDS = {
    "chat": [],
    "serve": ["--port", "0"],
    "generate": ["--manifest", "in.jsonl", "--out", "out.jsonl"],
    "transcribe": ["a.wav"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_flag_reaches_the_model(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    class Reached(Exception):
        """The model would be loaded now."""

    def load_blsp(folder: Any, runtime: Any, *_: Any) -> None:
        raise Reached(runtime.weights)

    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"id": "a", "text": "hello"}\n', encoding="utf-8")
    monkeypatch.setattr(listener, "load_blsp", load_blsp)
    parsed = cli.parse(command, [*COMMANDS[command], "--weights", "int4"])
    function = getattr(__import__(cli.COMMANDS[command].module, fromlist=["_"]), cli.COMMANDS[command].function)
    with pytest.raises(Reached, match="int4"):
        function(parsed)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_format_is_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.parse(command, [*COMMANDS[command], "--weights", "int2"])
    assert stopped.value.code == 2 and "int4" in capsys.readouterr().err
    with pytest.raises(ValueError, match="'int2' are not known; choose one of bfloat16, int8, int4"):
        find_runtime("cpu", weights="int2")


def test_training_and_judging_have_one_format_of_their_own() -> None:
    for kind in (settings.TrainSettings, settings.EvaluateSettings):
        assert "weights" not in {field.name for field in dataclasses.fields(kind)}
