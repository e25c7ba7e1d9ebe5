"""Token times: the best path, the places of tokens in an adapter's output, the store, the command."""

from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import speech_like, tiny_blsp
from support.training_examples import write_data
from support.watched_connections import WatchedConnection

from blsp.data.audio import write_wav
from blsp.features import align as alignment
from blsp.features.align import AlignError, TokenTimes, align, best_path, token_places
from blsp.features.cache import FeatureCache
from blsp.features.encode import encoder_id
from blsp.model.checkpoint import save_adapter
from blsp.settings import AlignSettings
from blsp.weights.digest import find_weights


def test_best_path_is_the_best_of_all_paths() -> None:
    generator = np.random.default_rng(0)
    for classes in ([1, 2], [1, 1], [2], [2, 1, 2]):
        scores = generator.standard_normal((6, 3)).astype(np.float32)
        spelled = {}
        for path in itertools.product(range(3), repeat=6):
            runs = [label for label, _ in itertools.groupby(path) if label]
            if runs == classes:
                spelled[path] = sum(scores[frame, label] for frame, label in enumerate(path))
        best = max(spelled, key=spelled.__getitem__)
        frames, ends = 0, []
        for label, run in itertools.groupby(best):
            length = len(list(run))
            if label:
                ends.append((frames, frames + length - 1))
            frames += length
        np.testing.assert_allclose(best_path(scores, classes), ends)


def test_a_long_transcript_is_aligned() -> None:
    scores = np.zeros((200, 3), np.float32)
    runs = best_path(scores, [1, 2] * 90)
    assert runs is not None and (np.diff(runs[:, 0]) > 0).all()


def test_too_many_tokens_have_no_path() -> None:
    assert best_path(np.zeros((2, 3), np.float32), [1, 2, 1]) is None
    assert best_path(np.zeros((2, 3), np.float32), [1, 1]) is None  # a blank must stand between them


@given(st.lists(st.integers(0, 400), max_size=20), st.integers(1, 40))
def test_places_increase_and_fit(times: list[int], places: int) -> None:
    found = token_places(np.array(sorted(times), np.int16), places, 8, 0.0)
    if len(times) > places:
        assert found is None
        return
    assert found is not None and len(found) == len(times)
    assert all(0 <= place < places for place in found)
    assert (np.diff(found) > 0).all()


def test_tokens_go_to_the_nearest_place_and_make_room_on_both_sides() -> None:
    assert token_places(np.array([0, 11, 13, 40]), 9, 8, 0.0).tolist() == [0, 1, 2, 5]
    assert token_places(np.array([24, 24, 24]), 9, 8, 0.0).tolist() == [2, 3, 4]
    assert token_places(np.array([7, 8]), 9, 8, 3.5).tolist() == [0, 1]  # stack: place 0 holds frames 0 to 7


@pytest.fixture
def grounded_folder(tiny_models_folder, tmp_path) -> str:
    model, processor = tiny_blsp(tiny_models_folder, adapter="grounded")
    save_adapter(model, processor, tmp_path / "grounded", dtype=torch.float64)
    return str(tmp_path / "grounded")


def test_align_fills_the_store_and_a_second_run_adds_nothing(grounded_folder, tiny_whisper, tmp_path, capsys) -> None:
    data = write_data(tmp_path / "data", rows=5)
    settings = AlignSettings(str(data), tmp_path / "features", grounded_folder)
    align(settings)
    said = capsys.readouterr().out
    aligned = int(said.split("aligned ")[1].split()[0])
    assert aligned >= 3
    store = TokenTimes(FeatureCache(tmp_path / "features", encoder_id(find_weights(tiny_whisper).sha256)))
    assert len(store) == aligned
    align(settings)
    assert f"aligned 0 clips, {aligned} were aligned before" in capsys.readouterr().out


def test_only_a_grounded_adapter_aligns(tiny_models_folder, tmp_path) -> None:
    model, processor = tiny_blsp(tiny_models_folder, adapter="conv")
    save_adapter(model, processor, tmp_path / "conv")
    data = write_data(tmp_path / "data", rows=1)
    with pytest.raises(AlignError, match="reads out"):
        align(AlignSettings(str(data), tmp_path / "features", str(tmp_path / "conv")))


def test_the_store_tells_transcripts_and_clips_apart(tiny_whisper, tmp_path) -> None:
    store = TokenTimes(FeatureCache(tmp_path, encoder_id(find_weights(tiny_whisper).sha256)))
    store.add([(b"a" * 16, [1, 2], np.array([4, 9], np.int16))])
    assert store.get(b"a" * 16, [1, 2]).tolist() == [4, 9]
    assert store.get(b"a" * 16, [1, 3]) is None
    assert store.get(b"b" * 16, [1, 2]) is None


def test_a_clip_whose_times_cannot_be_stored_is_listed(grounded_folder, tmp_path, monkeypatch, capsys) -> None:
    assert np.int16(alignment.MOST_FRAMES) == alignment.MOST_FRAMES
    data = write_data(tmp_path / "data", rows=3)
    write_wav(data.parent / "1.wav", speech_like(3.0, seed=1))
    settings = AlignSettings(str(data), tmp_path / "features", grounded_folder)
    align(settings)  # as a version did that stored times of any length
    monkeypatch.setattr(alignment, "MOST_FRAMES", 100)
    capsys.readouterr()
    align(settings)
    assert "aligned 0 clips, 2 were aligned before; 1 could not be" in capsys.readouterr().out
    (listed,) = (tmp_path / "features" / "continued.align.skipped.jsonl").read_text().splitlines()
    assert json.loads(listed)["id"] == "clip-1" and "it is longer than 2 s" in listed


def test_a_clip_that_cannot_be_encoded_is_listed_with_the_reason(grounded_folder, tmp_path) -> None:
    data = write_data(tmp_path / "data", rows=3)
    (data.parent / "0.wav").write_bytes(b"not audio")
    for _ in range(2):
        align(AlignSettings(str(data), tmp_path / "features", grounded_folder))
        (skip_list,) = (tmp_path / "features").glob("*.skipped.jsonl")
        (listed,) = skip_list.read_text().splitlines()
        assert skip_list.name == "continued.align.skipped.jsonl"
        assert json.loads(listed)["id"] == "clip-0" and "0.wav" in json.loads(listed)["reason"]


def test_threads_take_turns_in_the_store(tiny_whisper, tmp_path) -> None:
    store = TokenTimes(FeatureCache(tmp_path, encoder_id(find_weights(tiny_whisper).sha256)))
    store.add([(b"a" * 16, [token], np.array([token], np.int16)) for token in range(200)])
    store._database = watched = WatchedConnection(store._database)
    with ThreadPoolExecutor(8) as threads:
        times = threads.map(lambda token: store.get(b"a" * 16, [token]).tolist(), range(200))
        assert list(times) == [[token] for token in range(200)]
    assert watched.most == 1


def test_a_clip_that_cannot_hold_its_transcript_is_listed(grounded_folder, tmp_path, capsys) -> None:
    data = write_data(tmp_path / "data", rows=2)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[0]["text"] = "hello world " * 60
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    align(AlignSettings(str(data), tmp_path / "features", grounded_folder))
    assert "1 could not be" in capsys.readouterr().out
    (listed,) = (tmp_path / "features" / "continued.align.skipped.jsonl").read_text().splitlines()
    assert json.loads(listed)["id"] == "clip-0" and "does not fit" in listed
