"""New adapters: the distribution of their first vectors, and the centres of their places in the speech."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import tiny_blsp

from blsp.llm.language_model import embed
from blsp.model.adapter import ConvAdapter, StackAdapter
from blsp.model.adapter_parts import place_centres


@pytest.mark.parametrize("adapter", ["conv", "stack"])
def test_a_fresh_adapter_starts_around_the_mean_of_the_embeddings(tiny_models_folder, adapter: str) -> None:
    model, _ = tiny_blsp(tiny_models_folder, adapter=adapter)
    table = model.model.embedding_table()
    norm = model.model.multi_modal_projector.norm
    torch.testing.assert_close(norm.bias, table.mean(dim=0), rtol=1e-5, atol=1e-6)
    spread = (table - table.mean(dim=0)).std()
    torch.testing.assert_close(norm.weight, spread.expand_as(norm.weight), rtol=1e-4, atol=1e-5)


def test_a_spread_that_is_given_is_around_zero_as_in_the_paper(tiny_models_folder) -> None:
    model, _ = tiny_blsp(tiny_models_folder, adapter="conv", adapter_options={"embedding_std": 1})
    norm = model.model.multi_modal_projector.norm
    assert norm.weight.eq(1).all() and norm.bias.eq(0).all()


@pytest.mark.parametrize(("adapter", "reach"), [(ConvAdapter(4, 8, bottleneck=2), 14), (StackAdapter(4, 8), 3.5)])
def test_a_place_hears_the_frames_around_its_centre(adapter: ConvAdapter | StackAdapter, reach: float) -> None:
    states = torch.randn(1, 96, 4, requires_grad=True)
    place = 5
    adapter(states, torch.tensor([96])).vectors[0, place].square().sum().backward()
    heard = states.grad[0].abs().sum(dim=1).nonzero().flatten()
    frames_per_place, first_centre = place_centres(adapter)
    centre = first_centre + place * frames_per_place
    assert (int(heard[0]), int(heard[-1])) == (centre - reach, centre + reach)


def test_a_stack_adapter_of_an_older_folder_keeps_its_rms_norm() -> None:
    old, fresh = StackAdapter(4, 8), StackAdapter(4, 8, norm="layer")
    assert isinstance(old.norm, torch.nn.RMSNorm) and "norm.bias" not in old.state_dict()
    assert isinstance(fresh.norm, torch.nn.LayerNorm)
    old.start_around(torch.ones(8))  # nothing to set
    with pytest.raises(ValueError, match="layer or rms"):
        StackAdapter(4, 8, norm="batch")


def test_what_a_fresh_stack_adapter_is_stands_in_its_configuration(tiny_models_folder) -> None:
    model, _ = tiny_blsp(tiny_models_folder, adapter="stack")
    assert model.config.adapter_options["norm"] == "layer"
    model, _ = tiny_blsp(tiny_models_folder, adapter="stack", adapter_options={"norm": "rms"})
    assert isinstance(model.model.multi_modal_projector.norm, torch.nn.RMSNorm)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_moments_are_those_of_what_the_llm_gets_for_its_tokens(tiny_models_folder, family: str) -> None:
    model, _ = tiny_blsp(tiny_models_folder, family=family, adapter="conv")
    table = embed(model, range(model.config.text_config.vocab_size))
    mean, variance = model.model.embedding_moments()
    torch.testing.assert_close(model.model.embedding_table(), table)
    torch.testing.assert_close(mean, table.mean(dim=0))
    assert variance == pytest.approx(((table - table.mean(dim=0)) ** 2).mean().item())
