"""Law 3: batched equals one by one, for any mix of lengths: in encoding, in the adapters, in generation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import FAMILIES, IM_END, TOLERANCE, speech_like, tiny_blsp

from blsp.llm.decoding import Decoding, Request, decode
from blsp.llm.language_model import embed
from blsp.llm.prefix import compute_prefix
from blsp.model.speech_encoder import encode_speech, mel_features, mel_frames

ADAPTERS = ("conv", "stack", "grounded")
LENGTHS = (7, 1, 40, 16, 33)  # encoder frames


def _same(found: torch.Tensor, expected: torch.Tensor, atol: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def _mel(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Random features (B, 16, Tm), not zero where invalid, and their mask."""
    mask = torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]
    return torch.randn(len(lengths), 16, max(lengths), dtype=torch.float64), mask


def _check_encoder(tower: torch.nn.Module, lengths: list[int]) -> None:
    features, mask = _mel(lengths)
    states, frames = encode_speech(tower, features, mask)
    for row, length in enumerate(lengths):
        alone, alone_frames = encode_speech(tower, features[row : row + 1, :, :length], mask[row : row + 1, :length])
        assert frames[row] == alone_frames[0] == (length + 1) // 2 == alone.shape[1]
        _same(states[row, : alone.shape[1]], alone[0])
        assert not states[row, alone.shape[1] :].any()


@given(lengths=st.lists(st.integers(1, 120), min_size=1, max_size=6))
@torch.no_grad()
def test_encoder(pair_of, lengths: list[int]) -> None:
    _check_encoder(pair_of()[0].model.audio_tower, lengths)


@torch.no_grad()
def test_encoder_beyond_a_window(pair_of) -> None:
    _check_encoder(pair_of()[0].model.audio_tower, [3001, 250, 3000, 6107, 2999])


@torch.no_grad()
def test_encoder_padded_to_30_seconds(pair_of) -> None:
    model, processor = pair_of()
    clips = [speech_like(seconds) for seconds in (0.4, 3.01, 31.5)]
    batch = encode_speech(
        model.model.audio_tower, *mel_features(processor.feature_extractor, clips, full_window=True), full_window=True
    )
    for row, clip in enumerate(clips):
        features, mask = mel_features(processor.feature_extractor, [clip], full_window=True)
        alone, frames = encode_speech(model.model.audio_tower, features, mask, full_window=True)
        assert batch[1][row] == frames[0]
        _same(batch[0][row, : frames[0]], alone[0])


@pytest.mark.parametrize("adapter", ADAPTERS)
@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=6))
@torch.no_grad()
def test_adapters(pair_of, adapter: str, lengths: list[int]) -> None:
    model, _ = pair_of(adapter)
    torch.manual_seed(len(lengths))
    states = torch.randn(len(lengths), max(lengths), 16, dtype=torch.float64) * 3
    batch = model.model.listen(states, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        alone = model.model.listen(states[row : row + 1, :length], torch.tensor([length]))
        places = int(alone.num_audio_tokens[0])
        assert int(batch.num_audio_tokens[row]) == places == alone.vectors.shape[1]
        _same(batch.vectors[row, :places], alone.vectors[0])
        assert torch.equal(batch.valid[row, :places], alone.valid[0])
        assert not batch.valid[row, places:].any()
        assert batch.speech[row] == alone.speech[0]
        if alone.log_probs is not None and batch.log_probs is not None:
            _same(batch.log_probs[row, :places], alone.log_probs[0])
            assert batch.readout[row] == alone.readout[0]


def _requests(model: torch.nn.Module, count: int, *, prefixed: bool) -> list[Request]:
    """Prompts of 1 to 40 tokens, some after one of two shared prefixes; answers of up to 12 tokens."""
    generator = torch.Generator().manual_seed(5)
    prefixes = [compute_prefix(model, range(10, 10 + length)) for length in (9, 20)]
    requests = []
    for key in range(count):
        length = int(torch.randint(1, 41, (1,), generator=generator))
        ids = torch.randint(3, 300, (length,), generator=generator)
        prefix = ([None, *prefixes])[key % 3] if prefixed else None
        decoding = Decoding(max_new_tokens=4 + key % 9, stop_ids=tuple(range(2, 320, 9)), top_k_logprobs=4)
        requests.append(Request(key, embed(model, ids).detach(), prefix, decoding))
    return requests


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [3, 16])
@torch.no_grad()
def test_decoding(pair_of, family: str, batch_size: int) -> None:
    model, _ = pair_of("conv", family)
    requests = _requests(model, 16, prefixed=True)
    together = decode(model, requests, batch_size)
    finishes = set()
    for request in requests:
        alone = decode(model, [request], 1)[request.key]
        found = together[request.key]
        assert (found.ids, found.finish) == (alone.ids, alone.finish)
        assert len(found.top_ids) == len(found.ids) + (found.finish == "stop")
        _same(found.top_logp, alone.top_logp, TOLERANCE[family])
        finishes.add(found.finish)
    assert finishes == {"stop", "length"}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_decoding_equals_generate_of_transformers(pair_of, family: str) -> None:
    model, _ = pair_of("conv", family)
    # with these ids no family generates the placeholder, which generate() would refuse as speech without a recording
    ids = torch.randint(3, 300, (5, 17), generator=torch.Generator().manual_seed(2))
    requests = [Request(row, embed(model, ids[row]), None, Decoding(30, stop_ids=(IM_END,))) for row in range(5)]
    found = decode(model, requests, batch_size=5)
    expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False)
    for row in range(5):
        answer = expected[row, 17:].tolist()
        answer = answer[: answer.index(IM_END)] if IM_END in answer else answer
        assert found[row].ids == answer


@pytest.mark.parametrize("adapter", ADAPTERS)
@torch.no_grad()
def test_generate_hears_the_same_in_a_batch(pair_of, adapter: str) -> None:
    model, processor = pair_of(adapter)
    clips = [speech_like(seconds, seed) for seed, seconds in enumerate((0.5, 2.2, 1.3))]
    prompts = [f"{'please ' * i}repeat<|audio|><|im_end|>\n" for i in range(3)]
    together = processor(text=prompts, audio=clips, sampling_rate=16000)
    settings = {"max_new_tokens": 15, "do_sample": False}
    batch = model.generate(**together, **settings)[:, together["input_ids"].shape[1] :]
    for row in range(3):
        single = processor(text=prompts[row], audio=clips[row], sampling_rate=16000)
        answer = model.generate(**single, **settings)[0, single["input_ids"].shape[1] :]
        assert batch[row, : len(answer)].tolist() == answer.tolist()


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_on_either_side(pair_of, adapter: str, side: str) -> None:
    model, processor = pair_of(adapter)
    clips = [speech_like(seconds, seed) for seed, seconds in enumerate((0.5, 2.2))]
    prompts = ["repeat<|audio|> now", "please repeat all this<|audio|> and more"]
    singles = [processor(text=t, audio=c, sampling_rate=16000) for t, c in zip(prompts, clips, strict=True)]
    width = max(single["input_ids"].shape[1] for single in singles)

    def padded(name: str) -> torch.Tensor:
        rows = [single[name][0] for single in singles]
        gaps = [width - len(row) for row in rows]
        return torch.stack(
            [torch.nn.functional.pad(r, (g, 0) if side == "left" else (0, g)) for r, g in zip(rows, gaps, strict=True)]
        )

    features, mask = mel_features(processor.feature_extractor, clips)
    batch = model(
        input_ids=padded("input_ids"),
        attention_mask=padded("attention_mask"),
        input_features=features,
        input_features_mask=mask,
    ).logits
    for row, single in enumerate(singles):
        text = single["input_ids"][0] != model.config.audio_token_id
        kept = padded("attention_mask")[row].bool()
        _same(batch[row, kept][text], model(**single).logits[0, text])


@pytest.mark.parametrize("full_window", [False, True])
@torch.no_grad()
def test_training_hears_each_clip_on_its_true_length(tiny_models_folder, full_window: bool) -> None:
    from blsp.inference.listener import Listener
    from blsp.llm.prompt import PromptTemplate
    from blsp.training.examples import Example
    from blsp.training.step import speech_states

    model, processor = tiny_blsp(tiny_models_folder, full_window=full_window)
    clips = [speech_like(seconds) for seconds in (0.4, 2.01)]
    examples = []
    for clip in clips:
        mel, _ = mel_features(processor.feature_extractor, [clip], full_window=full_window)
        example = Example(
            "a", 1.0, PromptTemplate((), ()), [], [], False, mel=mel[0].numpy(), mel_frames=mel_frames(len(clip))
        )
        examples.append(example)
    states, lengths = speech_states(model, examples)
    expected = Listener(model, processor).encode(clips)
    assert lengths.tolist() == [len(alone) for alone in expected]
    for row, alone in enumerate(expected):
        _same(states[row, : len(alone)], alone)
