"""The recipe's augmentation and no-speech clips: the same seed gives the same samples, and nothing breaks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from augment import EFFECTS, RATE, augment, chance_for
from containers import decode
from no_speech import noise, silence

CLIP = Path(__file__).parents[1] / "clips" / "hello.wav"


@pytest.fixture(scope="module")
def wave() -> np.ndarray:
    return decode(CLIP)


def test_augmentation_depends_on_seed_and_clip_alone(wave: np.ndarray) -> None:
    once, done = augment(wave, 1, "a")
    again, done_again = augment(wave, 1, "a")
    assert done == done_again and np.array_equal(once, again)
    assert any(augment(wave, 1, name)[1] != done for name in "bcdefg")


@pytest.mark.parametrize("effect", sorted(EFFECTS))
@pytest.mark.parametrize("number", range(6))
def test_every_effect_gives_finite_speech_of_like_length(effect: str, number: int, wave: np.ndarray) -> None:
    result = EFFECTS[effect](wave, chance_for(number, effect))
    assert result.dtype == np.float32 and np.isfinite(result).all()
    assert 0.85 * len(wave) <= len(result) <= len(wave) + 2.1 * RATE
    assert np.abs(result).max() > 1e-3


def test_a_telephone_band_has_no_bass_and_no_treble() -> None:
    chance = np.random.default_rng(0)
    while True:  # until the effect draws the telephone
        state = chance.bit_generator.state
        if chance.integers(4) == 0:
            chance.bit_generator.state = state
            break
    power = np.abs(np.fft.rfft(EFFECTS["band"](chance.standard_normal(RATE).astype(np.float32), chance))) ** 2
    assert power[:150].sum() + power[4500:].sum() < 0.02 * power.sum()


@pytest.mark.parametrize("make", [silence, noise])
def test_no_speech_clips_are_finite_and_within_full_scale(make) -> None:
    for number in range(20):
        clip = make(RATE // 2, {}, chance_for(number, "x"))
        assert clip.dtype == np.float32 and len(clip) == RATE // 2 and np.abs(clip).max() <= 1
