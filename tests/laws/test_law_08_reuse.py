"""Law 8, in the model and in decoding: reusing a prefix's key/values, and computing logits only where they are
read, change nothing but the time. (In training, with activation checkpointing: test_law_08_training.py.)"""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import FAMILIES, TOLERANCE, speech_like

from blsp.llm.decoding import Decoding, Request, decode
from blsp.llm.language_model import decoder_of, embed, logits_of
from blsp.llm.prefix import compute_prefix
from blsp.model.configuration_blsp import AUDIO_TOKEN

FAMILY = pytest.mark.parametrize("family", FAMILIES)


@FAMILY
@torch.no_grad()
def test_a_shared_prefix_changes_no_state(pair_of, family: str) -> None:
    model, _ = pair_of("conv", family)
    prefix_ids, ids = torch.randint(3, 300, (21,)), torch.randint(3, 300, (4, 15))
    prefix = compute_prefix(model, prefix_ids.tolist())
    assert len(prefix) == 21
    found = decoder_of(model)(
        inputs_embeds=embed(model, ids),
        position_ids=torch.arange(21, 36).expand(4, -1),
        past_key_values=prefix.expand(4),
        use_cache=True,
    ).last_hidden_state
    whole = torch.cat([prefix_ids.expand(4, -1), ids], dim=1)
    expected = decoder_of(model)(input_ids=whole).last_hidden_state[:, 21:]
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[family])


@torch.no_grad()
def test_the_batch_shares_one_copy_of_the_prefix(pair_of) -> None:
    model, _ = pair_of()
    prefix = compute_prefix(model, range(10, 30))
    cache = prefix.expand(64)
    assert cache.get_seq_length() == 20
    for layer, (keys, _) in zip(cache.layers, prefix.layers, strict=True):
        assert layer.keys.shape[0] == 64
        assert layer.keys.data_ptr() == keys.data_ptr()
    before = [keys.clone() for keys, _ in prefix.layers]
    ids = torch.randint(3, 300, (64, 3))
    decoder_of(model)(input_ids=ids, past_key_values=cache, use_cache=True)
    assert all(torch.equal(keys, kept) for (keys, _), kept in zip(prefix.layers, before, strict=True))


@FAMILY
@torch.no_grad()
def test_a_shared_prefix_changes_no_answer(pair_of, family: str) -> None:
    model, _ = pair_of("conv", family)
    prefix_ids, ids = torch.randint(3, 300, (21,)), torch.randint(3, 300, (3, 9))
    prefix = compute_prefix(model, prefix_ids.tolist())
    decoding = Decoding(max_new_tokens=15, top_k_logprobs=5)
    shared = [Request(row, embed(model, ids[row]), prefix, decoding) for row in range(3)]
    whole = [Request(r, embed(model, torch.cat([prefix_ids, ids[r]])), None, decoding) for r in range(3)]
    found, expected = decode(model, shared, 3), decode(model, whole, 3)
    for row in range(3):
        assert found[row].ids == expected[row].ids
        torch.testing.assert_close(found[row].top_logp, expected[row].top_logp, rtol=0, atol=TOLERANCE[family])


@FAMILY
@torch.no_grad()
def test_logits_only_where_they_are_read(pair_of, family: str) -> None:
    model, processor = pair_of("grounded", family)
    texts = [f"say{AUDIO_TOKEN} again", f"louder{AUDIO_TOKEN}"]
    clips = [speech_like(1.0), speech_like(2.0)]
    inputs = processor(text=texts, audio=clips, sampling_rate=16000)
    whole = model(**inputs)
    for kept, where in ((1, slice(-1, None)), (7, slice(-7, None)), (torch.tensor([0, 4, 9]), [0, 4, 9])):
        found = model(**inputs, logits_to_keep=kept).logits
        torch.testing.assert_close(found, whole.logits[:, where], rtol=0, atol=TOLERANCE[family])
    states = model(**inputs, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(logits_of(model, states), whole.logits, rtol=0, atol=TOLERANCE[family])


def test_checkpointed_activations_give_the_same_loss_and_gradients(pair_of) -> None:
    """`forward` with labels, speech in the prompt, and gradients through the frozen LLM into the adapter."""
    model, processor = pair_of("conv")
    inputs = processor(text=f"say{AUDIO_TOKEN} again", audio=speech_like(1.0), sampling_rate=16000)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.audio_token_id, -100)
    parameters = list(model.model.multi_modal_projector.parameters())
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.model.language_model.train()
        loss = model(**inputs, labels=labels).loss
        results.append([loss.detach(), *torch.autograd.grad(loss, parameters)])
    model.gradient_checkpointing_disable()
    model.eval()
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert all(bool(gradient.any()) for gradient in results[0][1:])
