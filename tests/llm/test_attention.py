"""Plain products in the place of torch's attention: states and gradients as near to float32's as with torch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from blsp.distributed import find_runtime
from blsp.llm import attention
from blsp.llm.prefix import PrefixCache, run_after_prefix
from blsp.model.loading import load_language_model
from blsp.weights.digest import find_weights


@pytest.mark.parametrize("autocast", [False, True])  # as a training step
@pytest.mark.parametrize("prefix", [(), (5, 6, 7)])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_states_and_gradients_are_those_of_sdpa(
    tiny_llm, monkeypatch, family: str, prefix: tuple[int, ...], autocast: bool
) -> None:
    llm, _ = load_language_model(find_weights(tiny_llm(family)), find_runtime("cpu", "bfloat16"))
    torch.manual_seed(0)
    tokens = torch.randint(3, 60, (4, 9))
    direction = torch.randn(4, 9, llm.config.hidden_size)  # the length of a normalised state does not change

    def run(llm) -> tuple[Tensor, Tensor]:
        embeds = llm.get_input_embeddings()(tokens).detach().requires_grad_()
        hidden = run_after_prefix(llm, PrefixCache(llm).get(prefix), embeds).last_hidden_state
        return hidden.float(), torch.autograd.grad((hidden.float() * direction).sum(), embeds)[0].float()

    assert llm.config._attn_implementation == attention.NAME
    llm.set_attn_implementation("sdpa")
    exact, sdpas = run(copy.deepcopy(llm).float()), run(llm)
    llm.set_attn_implementation(attention.NAME)
    with monkeypatch.context() as patch:
        patch.setattr(attention, "MOST_KEYS", 4)  # longer rows go to torch's own
        torch.testing.assert_close(run(llm), sdpas, atol=0, rtol=0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        short = run(llm)
    for found, by_sdpa, wanted in zip(short, sdpas, exact, strict=True):
        assert not torch.equal(found, by_sdpa)
        assert (found - wanted).norm() < 1.5 * (by_sdpa - wanted).norm()


def test_a_position_that_may_attend_to_nothing_has_finite_gradients() -> None:
    query, key, value = (torch.randn(1, 2, 3, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[[[False, False, False], [True, False, False], [True, True, False]]]])
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = attention.cpu_attention(torch.nn.Identity(), query, key, value, mask)
    output.sum().backward()
    assert bool(output.isfinite().all())
    assert all(bool(each.grad.isfinite().all()) for each in (query, key, value) if each.grad is not None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_without_gradients_the_states_have_the_bits_of_sdpa(tiny_llm, monkeypatch, family: str, dtype: str) -> None:
    llm, _ = load_language_model(find_weights(tiny_llm(family)), find_runtime("cpu", dtype))
    torch.manual_seed(0)
    tokens, calls = torch.randint(3, 60, (3, 7)), []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def noting(*arguments, **options):
        calls.append(options.get("enable_gqa", False))
        return sdpa(*arguments, **options)

    @torch.no_grad()
    def run() -> Tensor:
        embeds = llm.get_input_embeddings()(tokens)
        return run_after_prefix(llm, PrefixCache(llm).get((5, 6, 7)), embeds).last_hidden_state

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", noting)
        ours = run()
    assert any(calls) == (llm.config.num_key_value_heads < llm.config.num_attention_heads)
    llm.set_attn_implementation("sdpa")
    assert torch.equal(ours, run())
