"""A micro-batch against the same thing written the long way."""

from dataclasses import replace

import pytest
import torch
from support.training_examples import make_examples, silent

from blsp.llm.language_model import embed
from blsp.llm.prefix import PrefixCache
from blsp.training import step
from blsp.training.losses import ce_loss, kl_loss
from blsp.training.step import Counts, Objective

TIGHT = dict(rtol=0, atol=1e-9)


def _one_by_one(model, examples, vectors_of) -> list[torch.Tensor]:
    """Logits at response positions of each example: whole sequence, no cache, no padding."""
    found = []
    for example, vectors in zip(examples, vectors_of, strict=True):
        frame = example.template
        parts = [
            embed(model, frame.prefix_ids),
            vectors,
            embed(model, [*frame.suffix_ids, *example.response[:-1]]),
        ]
        hidden = model.model.language_model(inputs_embeds=torch.cat(parts)[None]).last_hidden_state
        found.append(model.compute_logits(hidden)[0, -len(example.response) :])
    return found


def _vectors(model, examples) -> list[torch.Tensor]:
    heard = model.listen([step.speech_states(model, [example])[0][0] for example in examples])
    return [each.vectors for each in heard]


@pytest.mark.parametrize("adapter", ["conv", "stack", "grounded"])
@pytest.mark.parametrize("loss", ["ce", "kl"])
@pytest.mark.parametrize("order", ["speech-first", "instruction-first"])
def test_sums_and_gradients_are_those_of_the_plain_computation(
    pair_of, adapter: str, loss: str, order: str
) -> None:
    model, processor = pair_of(adapter)
    examples = make_examples(processor, 5, order=order)
    sums = step.run(model, examples, Objective(loss), PrefixCache(model))
    parameters = list(model.model.multi_modal_projector.parameters())
    ours = torch.autograd.grad(sums.response, parameters, allow_unused=True)

    logits = _one_by_one(model, examples, _vectors(model, examples))
    if loss == "ce":
        terms = [ce_loss(each, torch.tensor(e.response))[0] for each, e in zip(logits, examples, strict=True)]
    else:
        read = _one_by_one(model, examples, [embed(model, e.transcript) for e in examples])
        terms = [kl_loss(s, t.detach())[0] for s, t in zip(logits, read, strict=True)]
    expected = torch.stack(terms).sum()
    theirs = torch.autograd.grad(expected, parameters, allow_unused=True)
    torch.testing.assert_close(sums.response, expected, **TIGHT)
    assert sum(g is not None for g in ours) >= 4
    for mine, plain in zip(ours, theirs, strict=True):
        assert (mine is None) == (plain is None)
        if mine is not None:
            torch.testing.assert_close(mine, plain, rtol=1e-9, atol=1e-9)


def test_counts_are_known_before_the_sums(pair_of) -> None:
    _, processor = pair_of("grounded")
    examples = make_examples(processor, 3)
    examples[1] = silent(examples[1], response=[])
    counts = step.counts_of(examples, Objective("ce", ctc_weight=0.3))
    assert counts.responses == len(examples[0].response) + len(examples[2].response)
    assert counts.tokens == len(examples[0].readout) + 1 + len(examples[2].readout)
    assert step.counts_of(examples, Objective("ctc", ctc_weight=1.0)).responses == 0


def test_no_speech_takes_cross_entropy_on_the_set_sentence_also_under_kl(pair_of) -> None:
    model, processor = pair_of("conv")
    examples = [replace(e, readout=None) for e in make_examples(processor, 3)]
    examples[0] = silent(examples[0], response=[5, 6, 7, 2])
    llm = PrefixCache(model)
    mixed = step.run(model, examples, Objective("kl"), llm)
    alone = step.run(model, examples[:1], Objective("ce"), llm)
    others = step.run(model, examples[1:], Objective("kl"), llm)
    torch.testing.assert_close(mixed.response, alone.response + others.response, **TIGHT)


def test_grounded_runs_no_llm_for_no_speech(pair_of, monkeypatch) -> None:
    model, processor = pair_of("grounded")
    examples = [silent(e, response=[]) for e in make_examples(processor, 2)]
    monkeypatch.setattr(step, "run_after_prefix", lambda *_: pytest.fail("the LLM was run"))
    sums = step.run(model, examples, Objective("ce", ctc_weight=0.3), PrefixCache(model))
    assert sums.ctc > 0 and sums.response == 0
    step.objective_value(sums, Counts(0, 2), Objective("ce", ctc_weight=0.3)).backward()
    model.zero_grad()


def test_stored_teacher_with_the_whole_vocabulary_equals_the_teacher_run_here(pair_of) -> None:
    model, processor = pair_of("conv")
    examples = make_examples(processor, 4)
    read = _one_by_one(model, examples, [embed(model, e.transcript) for e in examples])
    stored = []
    for example, logits in zip(examples, read, strict=True):
        logp, ids = torch.log_softmax(logits.detach() / 2, -1).sort(-1, descending=True)
        stored.append(replace(example, teacher=(ids.numpy(), logp.numpy())))
    llm = PrefixCache(model)
    online = step.run(model, examples, Objective("kl", temperature=2.0), llm).response
    offline = step.run(model, stored, Objective("kl", temperature=2.0, stored_teacher=True), llm).response
    torch.testing.assert_close(online, offline, **TIGHT)


def test_padding_is_counted(pair_of) -> None:
    model, processor = pair_of("conv")
    examples = make_examples(processor, 4)
    sums = step.run(model, examples, Objective("ce"), PrefixCache(model))
    true = sums.positions - sums.padding
    alone = [step.run(model, [example], Objective("ce"), PrefixCache(model)) for example in examples]
    assert true == sum(each.positions for each in alone) and all(each.padding == 0 for each in alone)
