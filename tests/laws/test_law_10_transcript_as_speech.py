"""Law 10: when the speech vectors are the transcript's own token embeddings, the routes do not differ at all;
for `grounded` that is what one-hot posteriors give."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import FAMILIES, TOLERANCE, tiny_blsp

from blsp.inference.listener import Listener, Question
from blsp.llm.decoding import Decoding, decode
from blsp.llm.language_model import embed
from blsp.llm.prompt import ORDERS, transcript_ids
from blsp.model.adapter_parts import BLANK, AudioEmbeds
from blsp.model.grounded import read_out

FEW = torch.finfo(torch.float64).min  # the logarithm of a probability of 0


def _one_hot(classes: list[int], count: int) -> torch.Tensor:
    """Log-probabilities (S, K) that are certain of `classes`."""
    return torch.full((len(classes), count), FEW, dtype=torch.float64).scatter(1, torch.tensor(classes)[:, None], 0.0)


@given(tokens=st.lists(st.integers(0, 296), min_size=1, max_size=20), data=st.data())
def test_one_hot_posteriors_give_the_transcripts_embeddings(pair_of, tokens: list[int], data: st.DataObject) -> None:
    model, _ = pair_of("grounded")
    table = model.model.readout_table()
    frames: list[int] = []
    for token in tokens:
        repeated = bool(frames) and frames[-1] == token + 1  # CTC needs a blank between equal tokens
        frames += [BLANK] * data.draw(st.integers(int(repeated), 2)) + [token + 1] * data.draw(st.integers(1, 3))
    log_probs = _one_hot([*frames, BLANK], len(table) + 1)[None]
    output = read_out(log_probs, torch.tensor([len(frames) + 1]), table)
    assert output.readout == [tokens]
    assert output.speech.all()
    torch.testing.assert_close(output.vectors[0, output.valid[0]], table[tokens], rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("order", ORDERS)
@torch.no_grad()
def test_transcript_embeddings_as_speech_have_no_divergence(pair_of, family: str, order: str) -> None:
    model, processor = pair_of("grounded", family)
    listener = Listener(model, processor)
    text = "what is the capital of france"
    ids = transcript_ids(processor.tokenizer, text)
    classes = [model.model.readout_row()[token] + 1 for token in ids]
    spread = [c for token in classes for c in (BLANK, token, token)]
    table = model.model.readout_table().double()
    output = read_out(_one_hot(spread, len(table) + 1)[None], torch.tensor([len(spread)]), table)
    heard = AudioEmbeds(output.vectors[0, output.valid[0]], len(spread), True)
    question = Question(text=text, instruction="please repeat", order=order)
    decoding = Decoding(max_new_tokens=10, top_k_logprobs=320)
    text_route = decode(model, [listener.request(0, question, None, decoding)], 1)[0]
    speech_route = decode(model, [listener.request(0, question, heard, decoding)], 1)[0]
    assert speech_route.ids == text_route.ids
    by_id = [r.top_logp.gather(1, r.top_ids.argsort(1)).double() for r in (text_route, speech_route)]
    divergence = (by_id[0].exp() * (by_id[0] - by_id[1])).sum(dim=1)
    torch.testing.assert_close(divergence, torch.zeros_like(divergence), rtol=0, atol=TOLERANCE[family])


@torch.no_grad()
def test_placeholders_filled_with_the_transcript_equal_its_ids(pair_of) -> None:
    """The same through Hugging Face's route: `splice` with validity mask against plain `input_ids`."""
    from blsp.model.modeling_blsp import BlspAudioOutput

    model, _ = pair_of("grounded")
    ids = torch.randint(3, 300, (2, 9))
    audio = torch.full((2, 4), model.config.audio_token_id)
    with_places = torch.cat([ids[:, :5], audio, ids[:, 5:]], dim=1)
    valid = torch.tensor([True, True, False, False, True, True, True, False])  # two places, then three
    words = torch.randint(3, 300, (8,))
    heard = BlspAudioOutput(pooler_output=embed(model, words) * valid[:, None], valid=valid)
    embeds, mask = model.model.splice(with_places, heard, None)
    positions = mask.cumsum(1) - 1
    found = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).logits[:, -1]
    for row, kept in enumerate((words[:2], words[4:7])):
        plain = torch.cat([ids[row, :5], kept, ids[row, 5:]])[None]
        torch.testing.assert_close(found[row], model(input_ids=plain).logits[0, -1], rtol=0, atol=1e-9)


@torch.no_grad()
def test_the_read_out_follows_embeddings_that_change(tiny_models_folder) -> None:
    model, _ = tiny_blsp(tiny_models_folder, adapter="grounded")
    first = model.model.readout_table()
    assert model.model.readout_table() is first
    model.get_input_embeddings().weight.mul_(2)
    torch.testing.assert_close(model.model.readout_table(), 2 * first, rtol=0, atol=0)
    assert model.float().model.readout_table().dtype == torch.float32
