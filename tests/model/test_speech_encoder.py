"""The encoder's input and output against Whisper's own, as transformers computes them."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import save_whisper, speech_like
from transformers import WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from blsp.model.speech_encoder import encode_speech, encoder_frames, mel_features, mel_frames

SECONDS = (0.1, 0.3333, 1.0, 7.77, 29.9)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> tuple[WhisperEncoder, WhisperFeatureExtractor]:
    folder = save_whisper(tmp_path_factory.mktemp("encoder") / "whisper")
    tower = WhisperEncoder.from_pretrained(folder, dtype=torch.float64, key_mapping={r"^model\.encoder\.": ""})
    return tower.eval(), WhisperFeatureExtractor.from_pretrained(folder)


@pytest.mark.parametrize("seconds", SECONDS)
@pytest.mark.parametrize("mels", [80, 128])
def test_mel_features_are_whispers_own_cut_to_the_true_length(seconds: float, mels: int) -> None:
    extractor = WhisperFeatureExtractor(feature_size=mels)
    clip = speech_like(seconds)
    found, mask = mel_features(extractor, [clip])
    expected = extractor(clip, sampling_rate=16000, return_tensors="pt").input_features
    frames = mel_frames(len(clip))
    assert found.shape == (1, mels, frames) == (1, mels, int(mask.sum()))
    torch.testing.assert_close(found, expected[:, :, :frames], rtol=0, atol=1e-5)


def test_mel_features_of_a_batch_are_those_of_each_clip() -> None:
    extractor = WhisperFeatureExtractor(feature_size=16)
    clips = [speech_like(seconds, seed) for seed, seconds in enumerate(SECONDS)]
    features, mask = mel_features(extractor, clips)
    for row, clip in enumerate(clips):
        alone, _ = mel_features(extractor, [clip])
        assert torch.equal(features[row, :, : alone.shape[2]], alone[0])
        assert not features[row, :, alone.shape[2] :].any()
        assert int(mask[row].sum()) == alone.shape[2]


@torch.no_grad()
def test_full_window_is_whispers_own_output_cropped(whisper) -> None:
    tower, extractor = whisper
    clips = [speech_like(seconds, seed) for seed, seconds in enumerate(SECONDS)]
    features, mask = mel_features(extractor, clips, full_window=True)
    assert features.shape[2] == 3000
    states, lengths = encode_speech(tower, features, mask, full_window=True)
    own = extractor(clips, sampling_rate=16000, return_tensors="pt").input_features.double()
    expected = tower(own).last_hidden_state
    for row, clip in enumerate(clips):
        frames = encoder_frames(mel_frames(len(clip)))
        assert int(lengths[row]) == frames
        torch.testing.assert_close(states[row, :frames], expected[row, :frames], rtol=0, atol=1e-4)
        assert not states[row, frames:].any()


@torch.no_grad()
def test_thirty_seconds_true_length_is_whispers_own_output(whisper) -> None:
    tower, _ = whisper
    features = torch.randn(2, 16, 3000, dtype=torch.float64)
    states, lengths = encode_speech(tower, features, torch.ones(2, 3000, dtype=torch.bool))
    assert lengths.tolist() == [1500, 1500]
    torch.testing.assert_close(states, tower(features).last_hidden_state, rtol=0, atol=1e-9)


@torch.no_grad()
def test_full_window_demands_whole_windows(whisper) -> None:
    """Zeros are not the mel features of silence: padding must come from `mel_features`."""
    tower, _ = whisper
    with pytest.raises(ValueError, match="3000"):
        encode_speech(tower, torch.randn(1, 16, 100), torch.ones(1, 100, dtype=torch.bool), full_window=True)
