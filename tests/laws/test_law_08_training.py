"""Law 8, in training: reusing the prefix's key/values, activation checkpointing (where transformers would
silently
drop them), and computing logits only at response positions and in chunks change nothing but the time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.tiny_models import FAMILIES, TOLERANCE, tiny_blsp
from support.training_examples import make_examples

from blsp.llm import language_model
from blsp.llm.language_model import embed
from blsp.llm.prefix import PrefixCache
from blsp.llm.prompt import PromptTemplate
from blsp.training import step
from blsp.training.examples import Example
from blsp.training.step import Objective

FAMILY = pytest.mark.parametrize("family", FAMILIES)


def _loss_and_gradients(model, examples: list[Example], loss: str, prefixes: PrefixCache) -> list[torch.Tensor]:
    sums = step.run(model, examples, Objective({loss: 1.0}), prefixes)
    return [sums.terms[loss].detach(), *torch.autograd.grad(sums.terms[loss], _adapter(model))]


def _adapter(model) -> list[torch.Tensor]:
    return list(model.model.multi_modal_projector.parameters())


def _plainly(model, examples: list[Example]) -> list[torch.Tensor]:
    """The textbook: every row whole, from its first token, all logits, labels of -100 but at the response."""
    rows = []
    for example in examples:
        states, lengths = step.speech_states(model, [example])
        heard = model.model.listen(states, lengths)
        head, tail = (
            embed(model, example.template.prefix_ids),
            embed(model, [*example.template.suffix_ids, *example.response]),
        )
        embeds = torch.cat([head, heard.vectors[0][heard.valid[0]], tail])[None]
        labels = torch.full(embeds.shape[:2], -100)
        labels[0, -len(example.response) :] = torch.tensor(example.response)
        logits = model(inputs_embeds=embeds).logits[0, :-1]
        rows.append(torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum"))
    total = torch.stack(rows).sum()
    return [total.detach(), *torch.autograd.grad(total, _adapter(model))]


def _same(found: list[torch.Tensor], expected: list[torch.Tensor], family: str = "llama") -> None:
    tolerance = TOLERANCE[family]
    for mine, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=tolerance, atol=tolerance)


@FAMILY
def test_prefix_reuse_and_logits_where_taken(pair_of, family: str) -> None:
    model, processor = pair_of("conv", family)
    examples = make_examples(processor, 4, order="instruction-first")
    _same(_loss_and_gradients(model, examples, "ce", PrefixCache(model)), _plainly(model, examples), family)


@FAMILY
@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_activation_checkpointing(tmp_path, family: str, loss: str) -> None:
    model, processor = tiny_blsp(tmp_path, family=family)
    examples = make_examples(processor, 4)
    plain = _loss_and_gradients(model, examples, loss, PrefixCache(model))
    runs: list[int] = []
    layer = model.model.language_model.layers[0].mlp
    layer.register_forward_pre_hook(lambda *_: runs.append(1))  # the recomputation stops before a hook at its end
    model.model.language_model.activation_checkpointing_enable()
    prefixes = PrefixCache(model)
    _same(_loss_and_gradients(model, examples, loss, prefixes), plain, family)
    # two runs for the student; for kl also the teacher's prefix (once) and the teacher
    assert len(runs) == (2 if loss == "ce" else 4), "activations were kept, or computed too often"
    _same(_loss_and_gradients(model, examples, loss, prefixes), plain, family)


@pytest.mark.parametrize("loss", ["ce", "kl"])
@pytest.mark.parametrize("logits_alive", [1, 320 * 3, 2**24])
def test_chunks_of_the_head(pair_of, monkeypatch, loss: str, logits_alive: int) -> None:
    model, processor = pair_of("conv")
    examples = make_examples(processor, 4)
    whole = _loss_and_gradients(model, examples, loss, PrefixCache(model))
    monkeypatch.setattr(language_model, "CHUNK_LOGITS", logits_alive)
    sizes: list[int] = []
    compute = model.compute_logits
    monkeypatch.setattr(model, "compute_logits", lambda hidden: (sizes.append(len(hidden)), compute(hidden))[1])
    _same(_loss_and_gradients(model, examples, loss, PrefixCache(model)), whole)
    responses = sum(len(example.response) for example in examples)
    assert sum(sizes) == responses * (1 if loss == "ce" else 2)
    assert max(sizes) <= max(1, logits_alive // 320)


@pytest.mark.parametrize("adapter", ["conv", "stack", "grounded"])
def test_a_shared_prefix_serves_several_batches(pair_of, adapter: str) -> None:
    model, processor = pair_of(adapter)
    examples = [replace(e, readout=None) for e in make_examples(processor, 6)]
    prefixes = PrefixCache(model)
    parts = [
        step.run(model, part, Objective({"ce": 1.0}), prefixes).terms["ce"] for part in (examples[:2], examples[2:])
    ]
    whole = step.run(model, examples, Objective({"ce": 1.0}), prefixes).terms["ce"]
    assert len(prefixes) == 1
    torch.testing.assert_close(sum(parts), whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("loss", ["ce", "kl"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_empty_prefix_is_learnt_after(tmp_path, loss: str, checkpointing: bool) -> None:
    """A chat template may put nothing before the speech."""
    model, processor = tiny_blsp(tmp_path)
    examples = make_examples(processor, 3)
    examples = [replace(e, template=PromptTemplate((), e.template.suffix_ids)) for e in examples]
    if checkpointing:
        model.model.language_model.activation_checkpointing_enable()
    prefixes = PrefixCache(model)
    results = _loss_and_gradients(model, examples, loss, prefixes)
    assert len(prefixes) == 0 and all(bool(result.isfinite().all()) for result in results)
    if loss == "ce":
        _same(results, _plainly(model, examples))


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_prefixes_without_reuse_give_the_same(pair_of, loss: str) -> None:
    """A sharded LLM runs the prefix in front of every row."""
    model, processor = pair_of("conv")
    examples = make_examples(processor, 4)
    whole = _loss_and_gradients(model, examples, loss, PrefixCache(model, reuse=False))
    _same(_loss_and_gradients(model, examples, loss, PrefixCache(model)), whole)
