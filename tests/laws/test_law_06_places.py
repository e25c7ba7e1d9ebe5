"""Law 6: placeholders = adapter frames, a function of length alone; beyond 30 s windowed, not cut; invalid
places of `grounded` are masked, and taking them out gives the same numbers; all blank is no speech."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import END_OF_TEXT, FAMILIES, IM_END, TOLERANCE, speech_like, tiny_blsp

from blsp.inference.listener import Listener
from blsp.llm.decoding import Decoding, Request, decode
from blsp.llm.language_model import embed
from blsp.model.adapter import ConvAdapter, StackAdapter
from blsp.model.adapter_parts import num_audio_tokens
from blsp.model.configuration_blsp import AUDIO_TOKEN
from blsp.model.grounded import GroundedAdapter
from blsp.model.speech_encoder import encode_speech, encoder_frames, mel_features, mel_frames

ADAPTERS = ("conv", "stack", "grounded")
SHORTEST, LONGEST = 1600, 480_000  # samples: 0.1 s and 30 s


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_length_has_its_places(pair_of, adapter: str) -> None:
    """Exhaustive over encoder frames: the processor, the strides and the module itself count alike."""
    model, processor = pair_of(adapter)
    frames = range(encoder_frames(mel_frames(SHORTEST)), encoder_frames(mel_frames(LONGEST)) + 1)
    projector = model.model.multi_modal_projector
    lengths = torch.tensor(list(frames))
    counted = _places_of_the_module(projector, lengths)
    for length, places in zip(frames, counted.tolist(), strict=True):
        assert num_audio_tokens(length, projector.strides) == places
        assert processor.num_audio_tokens(320 * length) == processor.num_audio_tokens(320 * (length - 1) + 1) == places


def _places_of_the_module(projector: torch.nn.Module, lengths: torch.Tensor) -> torch.Tensor:
    if isinstance(projector, StackAdapter):
        return projector(torch.zeros(len(lengths), 1, 16, dtype=torch.float64), lengths).num_audio_tokens
    assert isinstance(projector, ConvAdapter | GroundedAdapter)
    return projector.stack(torch.zeros(len(lengths), 1, 16, dtype=torch.float64), lengths)[1]


@pytest.mark.parametrize("adapter", ADAPTERS)
@settings(max_examples=25)
@given(samples=st.integers(SHORTEST, LONGEST))
@torch.no_grad()
def test_placeholders_are_adapter_frames(pair_of, adapter: str, samples: int) -> None:
    model, processor = pair_of(adapter)
    clip = speech_like(samples / 16000 + 0.1)[:samples]
    inputs = processor(text=f"say {AUDIO_TOKEN}!", audio=clip, sampling_rate=16000)
    features, mask = inputs["input_features"], inputs["input_features_mask"]
    heard = model.get_audio_features(features, mask)
    assert int(mask.sum()) == features.shape[2] == mel_frames(samples)
    placed = int((inputs["input_ids"] == model.config.audio_token_id).sum())
    assert (
        placed
        == len(heard.pooler_output)
        == int(heard.adapter.num_audio_tokens[0])
        == processor.num_audio_tokens(samples)
    )
    assert heard.last_hidden_state.shape[1] == encoder_frames(mel_frames(samples))


@torch.no_grad()
def test_more_than_30_seconds_is_windowed_not_cut(pair_of) -> None:
    model, processor = pair_of("stack")
    clip = speech_like(65.3)
    features, mask = mel_features(processor.feature_extractor, [clip])
    states, lengths = encode_speech(model.model.audio_tower, features, mask)
    assert int(lengths[0]) == states.shape[1] == encoder_frames(mel_frames(len(clip)))
    for window in range(3):
        part = features[:, :, 3000 * window : 3000 * (window + 1)]
        alone, _ = encode_speech(model.model.audio_tower, part, torch.ones(1, part.shape[2], dtype=torch.bool))
        found = states[:, 1500 * window : 1500 * (window + 1)]
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-9)
    inputs = processor(text=AUDIO_TOKEN, audio=clip, sampling_rate=16000)
    assert model(**inputs).logits.shape[1] == processor.num_audio_tokens(len(clip)) == 409


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_taking_invalid_places_out_changes_nothing(pair_of, family: str) -> None:
    """Masked places in `forward` and `generate` against the sequence without them in the decode loop."""
    model, processor = pair_of("grounded", family)
    clips = [speech_like(seconds, seed) for seed, seconds in enumerate((1.5, 3.0))]
    inputs = processor(text=[f"say{AUDIO_TOKEN} again", f"{AUDIO_TOKEN} louder"], audio=clips, sampling_rate=16000)
    logits = model(**inputs).logits[:, -1]
    written = model.generate(**inputs, max_new_tokens=12, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    heard = Listener(model, processor).embed_audio(clips)
    for row, (before, after) in enumerate((("say", " again"), ("", " louder"))):
        assert 1 < len(heard[row].vectors) < heard[row].num_audio_tokens
        ids = [processor.tokenizer(text, add_special_tokens=False).input_ids for text in (before, after)]
        embeds = torch.cat([embed(model, ids[0]), heard[row].vectors, embed(model, ids[1])])
        fast = model(inputs_embeds=embeds[None]).logits[0, -1]
        torch.testing.assert_close(logits[row], fast, rtol=0, atol=TOLERANCE[family])
        found = decode(model, [Request(0, embeds, None, Decoding(12, stop_ids=(IM_END,)))], 1)[0].ids
        assert found == [token for token in written[row].tolist() if token not in (IM_END, END_OF_TEXT)]


@torch.no_grad()
def test_a_cache_given_by_the_caller_keeps_the_positions(pair_of) -> None:
    from transformers import DynamicCache

    model, processor = pair_of("grounded")
    inputs = processor(text=f"say{AUDIO_TOKEN} again", audio=speech_like(2.0), sampling_rate=16000)
    whole = model(**inputs).logits
    cache = DynamicCache()
    cached = model(**inputs, past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(cached, whole, rtol=0, atol=1e-9)


@torch.no_grad()
def test_speech_after_a_cached_turn(pair_of) -> None:
    model, processor = pair_of("grounded")
    inputs = processor(text=f"say something{AUDIO_TOKEN} again", audio=speech_like(2.0), sampling_rate=16000)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    first = model(input_ids=ids[:, :3], use_cache=True)
    for known in (mask, None):
        cache = copy.deepcopy(first.past_key_values)
        later = inputs | {"input_ids": ids[:, 3:], "attention_mask": known}
        text = ids[0, 3:] != model.config.audio_token_id
        found = model(**later, past_key_values=cache, use_cache=True).logits[:, text]
        torch.testing.assert_close(found, model(**inputs).logits[:, 3:][:, text], rtol=0, atol=1e-9)


@torch.no_grad()
def test_all_blank_is_no_speech(tiny_models_folder) -> None:
    model, processor = tiny_blsp(tiny_models_folder, adapter="grounded")
    model.model.multi_modal_projector.blank.bias.fill_(1e4)
    listener = Listener(model, processor)
    heard = listener.embed_audio([speech_like(1.0), speech_like(2.0)])
    for clip in heard:
        assert not clip.speech
        assert clip.token_ids == []
        assert len(clip.vectors) == 1
        assert torch.isfinite(clip.vectors).all()
    assert listener.answer(speech_like(1.0)) == model.config.no_speech_sentence
    inputs = processor(text=f"say {AUDIO_TOKEN}!", audio=speech_like(1.0), sampling_rate=16000)
    assert torch.isfinite(model(**inputs).logits).all()


def test_silence_is_no_speech_whatever_the_adapter(pair_of) -> None:
    for adapter in ADAPTERS:
        listener = Listener(*pair_of(adapter))
        assert listener.answer(np.zeros(16000, dtype=np.float32)) == "I could not hear any speech."


def test_the_count_is_checked(pair_of) -> None:
    model, processor = pair_of()
    inputs = processor(text=f"say {AUDIO_TOKEN}!", audio=speech_like(1.0), sampling_rate=16000)
    with pytest.raises(ValueError, match="placeholders"):
        model(**inputs | {"input_ids": torch.cat([inputs["input_ids"][:, :-1], inputs["input_ids"][:, 3:4]], dim=1)})
    with pytest.raises(ValueError, match="no input_features"):
        model(input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match="input_features_mask"):
        model(input_ids=inputs["input_ids"], input_features=inputs["input_features"])
    with pytest.raises(ValueError, match="each clip needs its place"):
        processor(text="no place", audio=speech_like(1.0), sampling_rate=16000)
