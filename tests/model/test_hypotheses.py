"""Prefix beam search compared with a list of all paths; likelihoods compared with the LLM run token by token."""

from __future__ import annotations

import copy
from collections import defaultdict
from itertools import groupby, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import FAMILIES

from blsp.llm import language_model
from blsp.llm.attention import use_cpu_attention
from blsp.llm.language_model import UnsupportedModelError, log_probabilities, stop_ids
from blsp.llm.prefix import compute_prefix
from blsp.model import hypotheses as hypotheses_module
from blsp.model.adapter_parts import Hypothesis
from blsp.model.hypotheses import LANGUAGE, LENGTH, choose, log_likelihoods, n_best


def collapsed(path: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(each - 1 for each, _ in groupby(path) if each)


@given(seed=st.integers(0, 10_000), frames=st.integers(1, 5))
@settings(max_examples=30)
def test_with_a_wide_beam_every_sequence_has_the_sum_of_its_paths(seed: int, frames: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_probs = (2 * torch.randn(frames, 4, generator=generator)).log_softmax(dim=-1)
    whole: dict[tuple[int, ...], float] = defaultdict(float)
    for path in product(range(4), repeat=frames):
        whole[collapsed(path)] += float(sum(log_probs[t, c] for t, c in enumerate(path)).exp())
    found = n_best(log_probs, beam=1000)
    assert {each.tokens for each in found} == set(whole)
    for each in found:
        assert torch.tensor(each.log_prob).exp().item() == pytest.approx(whole[each.tokens], abs=1e-5)
    assert [each.log_prob for each in found] == sorted((e.log_prob for e in found), reverse=True)


def test_sure_blanks_are_passed_over_and_separate_equal_tokens() -> None:
    certain = torch.full((3, 3), -20.0)
    certain[0, 1] = certain[1, 0] = certain[2, 1] = 0.0
    best = n_best(certain.log_softmax(dim=-1), beam=4)[0]
    assert best.tokens == (0, 0) and best.log_prob == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_likelihoods_are_those_of_the_plain_llm(pair_of, family: str) -> None:
    model, _ = pair_of("grounded", family)
    prefix = compute_prefix(model, [5, 6, 7])
    sequences = [[8, 9, 10], [11], [], [12, 13], [8, 9], [8, 9, 14, 15], [9, 10]]
    for ids, found in zip(sequences, log_likelihoods(model, prefix, sequences), strict=True):
        logits = model(input_ids=torch.tensor([[5, 6, 7, *ids]])).logits[0].float().log_softmax(dim=-1)
        expected = sum(float(logits[2 + i, token]) for i, token in enumerate(ids))
        assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_a_large_tree_never_has_all_its_logits_at_once(pair_of, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    model, _ = pair_of("grounded")
    prefix = compute_prefix(model, [5, 6, 7])
    sequences = [[8, 9, 10, 11], [11, 8], [], [12, 13, 14], [8, 9, 14, 15], [9, 10]]
    whole, seen = log_likelihoods(model, prefix, sequences), []

    def counted(llm, hidden: torch.Tensor) -> torch.Tensor:
        seen.append(len(hidden))
        return log_probabilities(llm, hidden)

    monkeypatch.setattr(hypotheses_module, "log_probabilities", counted)
    monkeypatch.setattr(language_model, "CHUNK_LOGITS", rows * model.config.text_config.vocab_size)
    assert log_likelihoods(model, prefix, sequences) == pytest.approx(whole, abs=1e-9)
    assert max(seen) == rows and sum(seen) == 9  # the root, and every token that another one follows


@pytest.mark.parametrize("name", ["eager", "sdpa", "cpu"])
def test_likelihoods_do_not_depend_on_the_attention(pair_of, name: str) -> None:
    model = copy.deepcopy(pair_of("grounded")[0])
    prefix, sequences = compute_prefix(model, [5, 6, 7]), [[8, 9], [8, 10, 11], [12]]
    expected = log_likelihoods(model, prefix, sequences)
    use_cpu_attention(model.get_decoder())
    model.get_decoder().set_attn_implementation(name)
    assert log_likelihoods(model, prefix, sequences) == pytest.approx(expected, abs=1e-5)


def test_attention_that_would_misread_the_tree_s_mask_is_refused(pair_of, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair_of("grounded")
    prefix = compute_prefix(model, [5, 6, 7])
    monkeypatch.setattr(model.get_decoder().config, "_attn_implementation", "flash_attention_2")
    with pytest.raises(UnsupportedModelError, match=r"flash_attention_2.*--rescore never, or .* sdpa"):
        log_likelihoods(model, prefix, [[8, 9], [8, 10]])


@torch.no_grad()
def test_the_llm_decides_between_hypotheses_that_sound_alike(pair_of) -> None:
    model, _ = pair_of("grounded")
    prefix = compute_prefix(model, [5, 6, 7])
    hypotheses = [Hypothesis((token, 20), -1.0) for token in range(30, 60)]
    likelihoods = log_likelihoods(model, prefix, [each.tokens for each in hypotheses])
    best = likelihoods.index(max(likelihoods))
    assert choose(model, prefix, [hypotheses]) == [hypotheses[best].tokens]
    louder = Hypothesis((3,), LANGUAGE * 1000 + LENGTH)
    assert choose(model, prefix, [[*hypotheses, louder]]) == [(3,)]


@pytest.mark.parametrize("nodes", [1, 50, 10_000])
@torch.no_grad()
def test_clips_together_are_chosen_for_as_each_alone(pair_of, monkeypatch: pytest.MonkeyPatch, nodes: int) -> None:
    monkeypatch.setattr(hypotheses_module, "NODES", nodes)
    model, _ = pair_of("grounded")
    prefix = compute_prefix(model, [5, 6, 7])
    clips = [[Hypothesis((first, second), -1.0) for second in range(20, 40)] for first in (8, 9, 8, 10, 11)]
    assert choose(model, prefix, clips) == [choose(model, prefix, [each])[0] for each in clips]


@torch.no_grad()
def test_without_a_prefix_a_sequence_follows_an_end_of_text(pair_of) -> None:
    """A chat template may put nothing before the speech."""
    model, _ = pair_of("grounded")
    end, ids = stop_ids(model)[0], [8, 9, 7]
    logp = model(input_ids=torch.tensor([[end, *ids]])).logits[0].log_softmax(dim=-1)
    expected = sum(float(logp[i, token]) for i, token in enumerate(ids))
    assert log_likelihoods(model, None, [ids, []]) == pytest.approx([expected, 0.0], abs=1e-6)
