"""A micro-batch compared with the same computation without its savings."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.training_examples import make_examples, silent

from blsp.llm.language_model import embed
from blsp.llm.prefix import PrefixCache
from blsp.training import step
from blsp.training.losses import ce_loss, kl_loss
from blsp.training.step import Objective

TIGHT = dict(rtol=0, atol=1e-9)


def _one_by_one(model, examples, vectors_of) -> list[torch.Tensor]:
    """Logits at response positions of each example: whole sequence, no cache, no padding."""
    found = []
    for example, vectors in zip(examples, vectors_of, strict=True):
        frame = example.template
        parts = [embed(model, frame.prefix_ids), vectors, embed(model, [*frame.suffix_ids, *example.response[:-1]])]
        hidden = model.model.language_model(inputs_embeds=torch.cat(parts)[None]).last_hidden_state
        found.append(model.compute_logits(hidden)[0, -len(example.response) :])
    return found


def _vectors(model, examples) -> list[torch.Tensor]:
    heard = model.listen([step.speech_states(model, [example])[0][0] for example in examples])
    return [each.vectors for each in heard]


@pytest.mark.parametrize("adapter", ["conv", "stack", "grounded"])
@pytest.mark.parametrize("loss", ["ce", "kl"])
@pytest.mark.parametrize("order", ["speech-first", "instruction-first"])
def test_sums_and_gradients_are_those_of_the_plain_computation(pair_of, adapter: str, loss: str, order: str) -> None:
    model, processor = pair_of(adapter)
    examples = make_examples(processor, 5, order=order)
    sums = step.run(model, examples, Objective({loss: 1.0}), PrefixCache(model))
    parameters = list(model.model.multi_modal_projector.parameters())
    ours = torch.autograd.grad(sums.terms[loss], parameters, allow_unused=True)

    logits = _one_by_one(model, examples, _vectors(model, examples))
    if loss == "ce":
        terms = [ce_loss(each, torch.tensor(e.response)) for each, e in zip(logits, examples, strict=True)]
    else:
        read = _one_by_one(model, examples, [embed(model, e.transcript) for e in examples])
        terms = [kl_loss(s, t.detach()) for s, t in zip(logits, read, strict=True)]
    expected = torch.stack(terms).sum()
    theirs = torch.autograd.grad(expected, parameters, allow_unused=True)
    torch.testing.assert_close(sums.terms[loss], expected, **TIGHT)
    assert sum(g is not None for g in ours) >= 4
    for mine, plain in zip(ours, theirs, strict=True):
        assert (mine is None) == (plain is None)
        if mine is not None:
            torch.testing.assert_close(mine, plain, rtol=1e-9, atol=1e-9)


def test_counts_are_known_before_the_sums(pair_of) -> None:
    _, processor = pair_of("grounded")
    examples = make_examples(processor, 3)
    examples[1] = silent(examples[1], response=[])
    counts = step.counts_of(examples, Objective({"ce": 1.0, "ctc": 0.3}))
    assert counts["ce"] == len(examples[0].response) + len(examples[2].response)
    assert counts["ctc"] == len(examples[0].readout) + 1 + len(examples[2].readout)
    assert step.counts_of(examples, Objective({"ctc": 1.0})).keys() == {"ctc"}


def test_no_speech_takes_cross_entropy_on_the_set_sentence_also_under_kl(pair_of) -> None:
    model, processor = pair_of("conv")
    examples = [replace(e, readout=None) for e in make_examples(processor, 3)]
    examples[0] = silent(examples[0], response=[5, 6, 7, 2])
    llm = PrefixCache(model)
    mixed = step.run(model, examples, Objective({"kl": 1.0}), llm)
    alone = step.run(model, examples[:1], Objective({"ce": 1.0}), llm)
    others = step.run(model, examples[1:], Objective({"kl": 1.0}), llm)
    torch.testing.assert_close(mixed.terms["kl"], alone.terms["ce"] + others.terms["kl"], **TIGHT)


def test_grounded_runs_no_llm_for_no_speech(pair_of, monkeypatch) -> None:
    model, processor = pair_of("grounded")
    examples = [silent(e, response=[]) for e in make_examples(processor, 2)]
    monkeypatch.setattr(step, "run_after_prefix", lambda *_: pytest.fail("the LLM was run"))
    sums = step.run(model, examples, Objective({"ce": 1.0, "ctc": 0.3}), PrefixCache(model))
    assert sums.terms["ctc"] > 0 and sums.terms["ce"] == 0
    step.objective_value(sums, {"ce": 0, "ctc": 2}, Objective({"ce": 1.0, "ctc": 0.3})).backward()
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
    online = step.run(model, examples, Objective({"kl": 1.0}, temperature=2.0), llm).terms["kl"]
    offline = step.run(model, stored, Objective({"kl": 1.0}, temperature=2.0, stored_teacher=True), llm).terms["kl"]
    torch.testing.assert_close(online, offline, **TIGHT)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kl_is_scaled_by_the_square_of_the_temperature_and_the_set_answer_is_not(pair_of, temperature: float) -> None:
    model, processor = pair_of("conv")
    examples = [replace(e, readout=None) for e in make_examples(processor, 3)]
    examples[0] = silent(examples[0], response=[5, 6, 7, 2])
    prefixes, objective = PrefixCache(model), Objective({"kl": 1.0}, temperature)
    sums = step.run(model, examples, objective, prefixes)
    value = step.objective_value(sums, step.counts_of(examples, objective), objective)
    speech = _one_by_one(model, examples, _vectors(model, examples))
    text = _one_by_one(model, examples[1:], [embed(model, e.transcript) for e in examples[1:]])
    textbook = sum(kl_loss(s, t, temperature) for s, t in zip(speech[1:], text, strict=True))
    set_answer = ce_loss(speech[0], torch.tensor(examples[0].response))
    tokens = sum(len(example.response) for example in examples)
    torch.testing.assert_close(value, (temperature**2 * textbook + set_answer) / tokens, **TIGHT)


def test_each_term_has_its_weight_and_its_own_divisor(pair_of) -> None:
    model, processor = pair_of("grounded")
    examples = make_examples(processor, 3)
    values = {}
    for weight in (0.0, 0.3, 2.0):
        objective = Objective({"ce": 1.0, "ctc": weight})
        sums = step.run(model, examples, objective, PrefixCache(model))
        counts = step.counts_of(examples, objective)
        values[weight] = step.objective_value(sums, counts, objective)
    ctc = sums.terms["ctc"] / sum(len(example.readout) for example in examples)
    assert ctc > 0
    for weight, value in values.items():
        torch.testing.assert_close(value, values[0.0] + weight * ctc, **TIGHT)


def test_padding_is_counted(pair_of) -> None:
    model, processor = pair_of("conv")
    examples = make_examples(processor, 4)
    sums = step.run(model, examples, Objective({"ce": 1.0}), PrefixCache(model))
    true = sums.positions - sums.padding
    alone = [step.run(model, [example], Objective({"ce": 1.0}), PrefixCache(model)) for example in examples]
    assert true == sum(each.positions for each in alone) and all(each.padding == 0 for each in alone)


def test_the_embed_term_is_the_textbook_sum_over_places(pair_of) -> None:
    model, processor = pair_of("conv")
    filler = 5
    examples = [replace(e, readout=None) for e in make_examples(processor, 3)]
    examples[0] = replace(examples[0], places=np.array([1, 3])[: len(examples[0].transcript)])
    examples[0] = replace(examples[0], transcript=examples[0].transcript[: len(examples[0].places)])
    examples[1] = replace(silent(examples[1], response=[]), places=np.empty(0, np.int64))
    sums = step.run(model, examples, Objective({"embed": 1.0}, filler=filler), PrefixCache(model))

    # the third example has no token times: it is left out
    table = model.get_input_embeddings().weight
    mean = table.mean(dim=0)
    expected = torch.zeros((), dtype=table.dtype)
    for example, vectors in zip(examples[:2], _vectors(model, examples), strict=False):
        tokens = dict(zip(example.places.tolist(), example.transcript, strict=True))
        for place, vector in enumerate(vectors):
            token = tokens.get(place, filler)
            cosines = torch.cosine_similarity(vector - mean, table - mean, dim=-1)
            nll = -torch.log_softmax(15 * cosines, dim=-1)[token]
            error = (vector - table[token]).square().mean() / (table - mean).square().mean()
            expected = expected + (0.3 if token == filler else 1.0) * (nll + error)
    torch.testing.assert_close(sums.terms["embed"], expected, rtol=1e-9, atol=1e-9)
    counts = step.counts_of(examples, Objective({"embed": 1.0}))
    assert counts == {"embed": len(examples[0].transcript) + 1}


def test_embed_ctc_leaves_out_what_does_not_fit_and_hears_silence_as_filler(pair_of) -> None:
    model, processor = pair_of("conv")
    fitting, refused = make_examples(processor, 2)
    fitting = replace(fitting, transcript=fitting.transcript[:1], fits=True)
    quiet = replace(silent(fitting, response=[]), transcript=[], fits=True)
    objective, prefixes = Objective({"embed-ctc": 1.0}, filler=5), PrefixCache(model)
    parts = [step.run(model, examples, objective, prefixes).terms["embed-ctc"] for examples in ([fitting], [quiet])]
    whole = step.run(model, [fitting, refused, quiet], objective, prefixes).terms["embed-ctc"]
    torch.testing.assert_close(whole, sum(parts), **TIGHT)
    assert step.run(model, [refused], objective, prefixes).terms["embed-ctc"] == 0
    assert step.counts_of([fitting, refused, quiet], objective) == {"embed-ctc": 2}

    # Silence has one placement: the filler everywhere
    known = replace(quiet, places=np.empty(0, np.int64))
    embed_loss = step.run(model, [known], Objective({"embed": 1.0}, filler=5), prefixes).terms["embed"]
    torch.testing.assert_close(parts[1], embed_loss, **TIGHT)


def test_embed_weight_is_counted_beside_the_response(pair_of) -> None:
    model, processor = pair_of("stack")
    examples = [replace(e, readout=None, fits=True) for e in make_examples(processor, 3)]
    examples = [replace(e, transcript=e.transcript[:1]) for e in examples]
    alone, both = Objective({"ce": 1.0}), Objective({"ce": 1.0, "embed-ctc": 0.2})
    prefixes = PrefixCache(model)
    sums, counts = step.run(model, examples, both, prefixes), step.counts_of(examples, both)
    plain = step.objective_value(sums, counts, alone)
    added = step.objective_value(sums, counts, both) - plain
    torch.testing.assert_close(added, 0.2 * sums.terms["embed-ctc"] / 3, **TIGHT)
    assert added.item() > 0
