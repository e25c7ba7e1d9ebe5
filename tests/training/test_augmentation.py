"""Augmentation is a function of its key; each kind changes what it should."""

import numpy as np
import pytest

from blsp.training.augmentation import MASK_EVERY, MASK_FRAMES, add_noise, augment, hide_spans

CLIP = (0.3 * np.sin(np.arange(16_000) * 0.05)).astype(np.float32)


def test_the_same_key_gives_the_same_samples() -> None:
    kinds = ("speed", "volume", "noise")
    np.testing.assert_array_equal(augment(CLIP, kinds, (1, 2, 3)), augment(CLIP, kinds, (1, 2, 3)))
    assert len({augment(CLIP, kinds, (1, 2, row)).tobytes() for row in range(6)}) == 6


def test_nothing_asked_nothing_changed() -> None:
    np.testing.assert_array_equal(augment(CLIP, (), (0,)), CLIP)


def test_speed_changes_the_length_by_a_tenth_at_most() -> None:
    lengths = {len(augment(CLIP, ("speed",), (0, row))) for row in range(30)}
    assert lengths == {16_000, round(16_000 / 1.1), round(16_000 / 0.9)}


def test_volume_stays_inside_full_scale() -> None:
    loud = [np.abs(augment(CLIP * 3, ("volume",), (row,))).max() for row in range(30)]
    assert max(loud) <= 1 and min(loud) < 0.5


@pytest.mark.parametrize("length", [1, 2, 1601])
def test_noise_is_as_far_below_the_speech_as_it_says(length: int) -> None:
    noisy = add_noise(CLIP[100 : 100 + length], np.random.default_rng(0))
    assert noisy.shape == (length,) and np.isfinite(noisy).all()
    ratio = 20 * np.log10(np.std(CLIP) / np.std(add_noise(CLIP, np.random.default_rng(1)) - CLIP))
    assert 7 < ratio < 36


def test_mask_sets_short_spans_to_zero_and_changes_nothing_else() -> None:
    features = np.random.default_rng(0).standard_normal((300, 4)).astype(np.float16) + 10
    masked = hide_spans(features, (1, 2, 3))
    hidden = (masked == 0).all(axis=1)
    assert 0 < hidden.sum() <= 300 // MASK_EVERY * MASK_FRAMES
    np.testing.assert_array_equal(masked[~hidden], features[~hidden])
    assert not (features == 0).any()  # the cached array is not written to
    np.testing.assert_array_equal(masked, hide_spans(features, (1, 2, 3)))
    assert not np.array_equal(masked, hide_spans(features, (1, 2, 4)))
