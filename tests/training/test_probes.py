"""The probes: zero for equal routes, sensitive to every difference, and without effect on the model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.tiny_models import tiny_blsp
from support.training_examples import make_examples

from blsp.llm.language_model import embed
from blsp.llm.prefix import PrefixCache
from blsp.model.adapter_parts import AdapterOutput
from blsp.training import probes
from blsp.training.probes import Probe


def test_divergence_is_zero_where_the_speech_is_the_transcript_s_embeddings(pair_of, monkeypatch) -> None:
    model, processor = pair_of("conv")
    examples = make_examples(processor, 4)

    def listen(states, lengths):  # an adapter that has learnt everything
        batch = seen.pop(0)
        vectors = torch.nn.utils.rnn.pad_sequence([embed(model, e.transcript) for e in batch], batch_first=True)
        places = torch.tensor([len(e.transcript) for e in batch])
        valid = torch.arange(vectors.shape[1])[None, :] < places[:, None]
        return AdapterOutput(vectors, places, valid, places > 0)

    seen = [[examples[i] for i in numbers] for numbers in probes.micro_batches(examples, 200)]
    monkeypatch.setattr(model.model, "listen", listen)
    divergence, agreement = probes.divergence(Probe("train", examples), examples, PrefixCache(model), positions=200)
    assert divergence == pytest.approx(0, abs=1e-12) and agreement == 1.0


def test_divergence_does_not_depend_on_how_the_clips_are_cut_up(pair_of, monkeypatch) -> None:
    model, processor = pair_of("conv")
    examples = [*make_examples(processor, 3), *make_examples(processor, 3, order="instruction-first", seed=1)]
    with torch.no_grad():
        probe, llm = Probe("train", examples), PrefixCache(model)
        whole = probes.divergence(probe, examples, llm, positions=100_000)
        monkeypatch.setattr(probes, "transcript_states", lambda *_: pytest.fail("the transcript was read again"))
        single = probes.divergence(probe, examples, llm, positions=1)
    assert whole == pytest.approx(single, abs=1e-9) and whole[0] > 0.01


def test_exchanged_speech_says_something_else(pair_of) -> None:
    _, processor = pair_of("conv")
    examples = make_examples(processor, 3)
    asked_twice = [replace(example, response=[9, 2]) for example in examples]
    copies = [replace(example, id=f"{example.id}/augmented-1") for example in examples]
    texts = {example.mel.shape: example.text for example in examples}
    exchanged = probes.exchange_speech([*examples, *asked_twice, *copies])
    assert len(exchanged) == 9
    for example in exchanged:
        assert texts[example.mel.shape] != example.text
    assert probes.exchange_speech([examples[0], copies[0]]) == []


def test_measure_names_what_it_found_and_leaves_the_adapter_learning(tmp_path) -> None:
    model, processor = tiny_blsp(tmp_path, adapter="grounded")
    model.model.multi_modal_projector.train()
    examples = make_examples(processor, 3)
    found = probes.measure(Probe("held_out", examples), PrefixCache(model), processor.tokenizer, 500)
    assert set(found) == {f"held_out_{name}" for name in ("kl", "top1", "kl_shuffled", "wer")}
    assert model.model.multi_modal_projector.training
    assert probes.measure(Probe("train", []), PrefixCache(model), processor.tokenizer, 500) == {}


def test_a_clip_without_a_transcript_has_no_text_route_to_be_compared_with(pair_of) -> None:
    model, processor = pair_of("grounded")
    examples = make_examples(processor, 4)
    untold = [replace(example, id=f"untold-{example.id}", transcript=[], text="") for example in examples]
    llm, tokenizer = PrefixCache(model), processor.tokenizer
    mixed = [example for pair in zip(untold, examples, strict=True) for example in pair]
    found, plain = (probes.measure(Probe("held_out", each), llm, tokenizer, 500) for each in (mixed, examples))
    assert found == pytest.approx(plain, abs=1e-6)
    assert probes.measure(Probe("held_out", untold), llm, tokenizer, 500) == {}


def test_tokens_are_found_where_the_speech_is_their_embeddings(pair_of, monkeypatch) -> None:
    model, processor = pair_of("conv")
    examples = [replace(e, places=np.arange(len(e.transcript))) for e in make_examples(processor, 3)]
    hearing = iter([examples[0], examples[1], examples[1]])  # the third clip is taken for the second

    def listen(states, lengths):
        vectors = embed(model, [*next(hearing).transcript, *[5] * 20])[None] * 1.5
        return AdapterOutput(vectors, lengths, torch.ones(vectors.shape[:2], dtype=torch.bool), lengths > 0)

    monkeypatch.setattr(model.model, "listen", listen)
    examples[2] = replace(examples[2], transcript=[299] * len(examples[2].transcript))
    right = len(examples[0].transcript) + len(examples[1].transcript)
    count = right + len(examples[2].transcript)
    assert probes.tokens_found(examples, model) == pytest.approx(right / count)
