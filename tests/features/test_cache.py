"""The feature cache: written entries are found; incomplete, damaged or changed ones are not."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blsp.data.manifest import Utterance
from blsp.features import cache as feature_cache
from blsp.features import content_hashes
from blsp.features.cache import FeatureCache, FeaturesError
from blsp.features.content_hashes import FILE, open_index, read_log

WIDTH = 6


def states_of(number: int) -> np.ndarray:
    return np.random.default_rng(number).standard_normal((1 + number % 5, WIDTH)).astype(np.float16)


def key_of(number: int) -> bytes:
    return np.random.default_rng(1000 + number).bytes(16)


def filled(folder: Path, numbers: range, rank: int = 0) -> FeatureCache:
    cache = FeatureCache(folder, "encoder")
    with cache.writer(rank, WIDTH) as writer:
        for number in numbers:
            writer.add(key_of(number), states_of(number))
    return cache


def shard_of(folder: Path, suffix: str) -> Path:
    (path,) = folder.glob(f"*/*{suffix}")
    return path


def test_what_was_added_is_there_at_once_and_later(tmp_path: Path) -> None:
    for cache in (filled(tmp_path, range(20)), FeatureCache(tmp_path, "encoder")):
        assert cache.lengths([key_of(3), b"x" * 16, key_of(4)]).tolist() == [4, 0, 5]
        for number in range(20):
            assert cache.has(key_of(number))
            found = cache.get(key_of(number))
            np.testing.assert_array_equal(found, states_of(number))
            assert found.dtype == np.float16 and not found.flags.writeable


def test_an_empty_cache_has_nothing(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, "encoder")
    assert len(cache) == 0 and not cache.has(key_of(0)) and cache.lengths([key_of(0)]).tolist() == [0]
    with pytest.raises(FeaturesError, match="blsp encode"):
        cache.get(key_of(0))


def test_encoders_do_not_see_each_others_features(tmp_path: Path) -> None:
    filled(tmp_path, range(3))
    assert not FeatureCache(tmp_path, "another encoder").has(key_of(0))


def test_features_of_another_shape_are_refused(tmp_path: Path) -> None:
    cache = filled(tmp_path, range(1))
    with pytest.raises(ValueError, match="wide"):
        cache.writer(0, WIDTH + 1)
    for wrong in (states_of(1)[:, :-1], states_of(1).astype(np.float32), states_of(1)[:0]):
        with pytest.raises(ValueError, match=f"{WIDTH}"), cache.writer() as writer:
            writer.add(key_of(1), wrong)


def test_a_full_shard_is_followed_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "SHARD_BYTES", 100)
    filled(tmp_path, range(20))
    assert len(list(tmp_path.glob("*/*.f16"))) > 5
    cache = FeatureCache(tmp_path, "encoder")
    assert all(np.array_equal(cache.get(key_of(n)), states_of(n)) for n in range(20))


def test_many_keys_are_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "UNINDEXED_KEYS", 3)
    cache = FeatureCache(tmp_path, "encoder")
    with cache.writer(0, WIDTH) as writer:
        for number in range(20):
            writer.add(key_of(number), states_of(number))
            assert cache.has(key_of(number)) and len(cache._unindexed) <= 3
            np.testing.assert_array_equal(cache.get(key_of(number // 2)), states_of(number // 2))


def test_several_processes_write_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=filled, args=(tmp_path, range(r * 20, r * 20 + 30), r)) for r in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    cache = FeatureCache(tmp_path, "encoder")
    assert len(cache) == 70
    assert all(np.array_equal(cache.get(key_of(n)), states_of(n)) for n in range(70))


@given(suffix=st.sampled_from([".f16", ".idx"]), share=st.floats(0, 1), stamped=st.booleans())
def test_a_torn_shard_gives_what_is_whole_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, share: float, stamped: bool
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    filled(folder, range(12))
    if not stamped:  # the writer was killed
        shard_of(folder, ".ok").unlink()
    path = shard_of(folder, suffix)
    size = int(share * path.stat().st_size)
    os.truncate(path, size)
    ends = np.cumsum([states_of(n).nbytes if suffix == ".f16" else 32 for n in range(12)])
    cache = FeatureCache(folder, "encoder")
    for number in range(12):
        assert cache.has(key_of(number)) == (ends[number] <= size)
        if ends[number] <= size:
            np.testing.assert_array_equal(cache.get(key_of(number)), states_of(number))
    shutil.rmtree(folder)


def flip_byte(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x40
    path.write_bytes(content)


def test_damage_is_seen_when_the_cache_is_opened(tmp_path: Path) -> None:
    filled(tmp_path, range(12))
    flip_byte(shard_of(tmp_path, ".f16"), states_of(0).nbytes + 1)  # in the second entry
    for _ in range(2):
        cache = FeatureCache(tmp_path, "encoder")
        assert [n for n in range(12) if not cache.has(key_of(n))] == [1]
    with cache.writer() as writer:
        writer.add(key_of(1), states_of(1))
    cache = FeatureCache(tmp_path, "encoder")
    assert all(np.array_equal(cache.get(key_of(n)), states_of(n)) for n in range(12))


def test_damage_that_leaves_the_files_looks_is_seen_when_it_is_read(tmp_path: Path) -> None:
    filled(tmp_path, range(12))
    path = shard_of(tmp_path, ".f16")
    before = path.stat()
    flip_byte(path, 1)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    cache = FeatureCache(tmp_path, "encoder")
    assert cache.has(key_of(0))
    with pytest.raises(FeaturesError, match="blsp encode"):
        cache.get(key_of(0))
    np.testing.assert_array_equal(cache.get(key_of(1)), states_of(1))
    assert not FeatureCache(tmp_path, "encoder").has(key_of(0)), "and is known from then on"


def test_sound_shards_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path, range(12))
    monkeypatch.setattr(feature_cache, "is_sound", lambda *_: pytest.fail("checked again"))
    assert len(FeatureCache(tmp_path, "encoder")) == 12


def test_worker_processes_can_be_handed_a_cache(tmp_path: Path) -> None:
    cache = pickle.loads(pickle.dumps(filled(tmp_path, range(3))))
    np.testing.assert_array_equal(cache.get(key_of(2)), states_of(2))


# --- keys ---------------------------------------------------------------------------------------------------


@pytest.fixture
def row(tmp_path: Path) -> Utterance:
    path = tmp_path / "a.wav"
    path.write_bytes(b"some audio")
    age(path)
    return Utterance(id="a", audio=str(path), text="")


def age(path: Path) -> None:
    past = path.stat().st_mtime_ns - 60 * 10**9
    os.utime(path, ns=(past, past))


def test_a_key_is_what_is_heard_and_by_whom(tmp_path: Path, row: Utterance) -> None:
    cache = FeatureCache(tmp_path / "cache", "encoder")
    copy = tmp_path / "folder of another name"
    copy.write_bytes(Path(row.audio).read_bytes())
    same = [row, replace(row, id="b", text="x"), replace(row, audio=str(copy)), replace(row, start=0.0)]
    assert len({cache.key(each) for each in same}) == 1
    others = [replace(row, start=0.5), replace(row, duration=0.5), replace(row, audio="data:audio/wav;base64,AA")]
    keys = {cache.key(each) for each in [row, *others]}
    keys.add(FeatureCache(tmp_path / "cache", "another encoder").key(row))
    Path(row.audio).write_bytes(b"more audio")
    keys.add(cache.key(row))
    assert len(keys) == 6 and all(len(key) == 16 for key in keys)


def test_a_file_is_hashed_once(tmp_path: Path, row: Utterance, monkeypatch: pytest.MonkeyPatch) -> None:
    first = FeatureCache(tmp_path / "cache", "encoder")
    key = first.key(row)
    monkeypatch.setattr(content_hashes.hashlib, "file_digest", lambda *_: pytest.fail("hashed again"))
    for cache in (first, FeatureCache(tmp_path / "cache", "encoder")):
        assert cache.key(row) == key
    assert FeatureCache(tmp_path / "cache", "another encoder").key(row) != key


def test_a_file_of_this_moment_is_hashed_again(tmp_path: Path, row: Utterance) -> None:
    os.utime(row.audio)
    key = FeatureCache(tmp_path / "cache", "encoder").key(row)
    stat = os.stat(row.audio)
    Path(row.audio).write_bytes(Path(row.audio).read_bytes()[::-1])
    os.utime(row.audio, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    assert FeatureCache(tmp_path / "cache", "encoder").key(row) != key


def test_a_file_that_cannot_be_read_has_a_key_of_its_own(tmp_path: Path, row: Utterance) -> None:
    cache = FeatureCache(tmp_path / "cache", "encoder")
    Path(row.audio).unlink()
    assert not cache.has(cache.key(row)) and len(cache.key(row)) == 16


def test_audio_that_is_gone_or_elsewhere_is_known_by_its_row(tmp_path: Path, row: Utterance) -> None:
    key = FeatureCache(tmp_path / "cache", "encoder").key(row)
    Path(row.audio).unlink()
    cache = FeatureCache(tmp_path / "cache", "encoder")
    elsewhere = replace(row, audio=f"/another/disk/{Path(row.audio).name}")
    assert cache.key(row) == cache.key(elsewhere) == key
    for other in (
        replace(row, id="b"),
        replace(row, text="b"),
        replace(row, start=0.5),
        replace(row, audio="/x/y.wav"),
    ):
        assert cache.key(other) != key


def test_rows_that_look_alike_are_not_taken_for_each_other(tmp_path: Path, row: Utterance) -> None:
    (tmp_path / "noisy").mkdir()
    noisy = replace(row, audio=str(tmp_path / "noisy" / Path(row.audio).name))
    Path(noisy.audio).write_bytes(b"the same words in noise")
    cache = FeatureCache(tmp_path / "cache", "encoder")
    keys = cache.keys([row, noisy])
    for again in (cache, FeatureCache(tmp_path / "cache", "encoder")):
        assert again.keys([row, noisy]) == again.keys([row, noisy], check=False) == keys
    Path(row.audio).unlink()
    again = FeatureCache(tmp_path / "cache", "encoder")
    assert again.key(row) not in keys and again.key(noisy) == keys[1]


def test_known_rows_are_not_looked_at_without_a_check(
    tmp_path: Path, row: Utterance, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = FeatureCache(tmp_path / "cache", "encoder").key(row)
    cache = FeatureCache(tmp_path / "cache", "encoder")
    monkeypatch.setattr(content_hashes, "version_of", lambda _: pytest.fail("looked at the file"))
    assert cache.key(row, check=False) == key


# --- the index ----------------------------------------------------------------------------------------------


def records_of(keys: list[bytes]) -> np.ndarray:
    return np.array([(key, bytes([number % 256]) * 16) for number, key in enumerate(keys)], dtype=FILE)


few = st.binary(min_size=1, max_size=2).map(lambda end: bytes(16 - len(end)) + end)
zero_ended = st.binary(min_size=1, max_size=2).map(lambda start: start + bytes(16 - len(start)))
KEYS = st.lists(few | zero_ended | st.binary(min_size=16, max_size=16), max_size=60)


@given(written=KEYS, asked=KEYS)
def test_the_index_finds_what_was_written_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, written: list[bytes], asked: list[bytes]
) -> None:
    folder = tmp_path_factory.mktemp("index")
    index = open_index(folder, "a", lambda: records_of(written))
    assert len(index) == len(set(written))
    everything = [*written, *asked]
    for key, row in zip(everything, index.find(everything), strict=True):
        if key in written:
            assert index.records["content"][row].tobytes()[0] == len(written) - 1 - written[::-1].index(key), (
                "the last stays"
            )
            assert index.keys[row].ljust(16, b"\0") == key
        else:
            assert row == -1
    assert len(list(folder.iterdir())) == 2, "nothing is left over"
    shutil.rmtree(folder)


def test_the_index_is_made_once_for_the_same_logs(tmp_path: Path) -> None:
    keys = [key_of(number) for number in range(300)]  # enough to be mapped
    open_index(tmp_path, "a", lambda: records_of(keys[:200]))
    again = open_index(tmp_path, "a", lambda: pytest.fail("made again"))
    assert (again.find(keys[:2]) >= 0).all() and not again.records.flags.writeable
    (tmp_path / "index-0123.sorted").write_bytes(b"of an earlier version")
    newer = open_index(tmp_path, "b", lambda: records_of(keys))
    assert len(newer) == 300 and len(list(tmp_path.iterdir())) == 2, "the old ones are removed"
    assert (again.find(keys[:2]) >= 0).all(), "a process that has it open keeps it"


def test_half_a_record_at_the_end_does_not_count(tmp_path: Path) -> None:
    log = tmp_path / "log"
    content = records_of([key_of(1), key_of(2)]).tobytes()
    for size in range(len(content) + 1):
        log.write_bytes(content[:size])
        assert len(read_log(log, FILE)) == size // FILE.itemsize


def test_a_cache_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """The files as they were written before November 2026: key halves as numbers, an index of another kind."""
    cache = FeatureCache(tmp_path, "encoder")
    (cache.folder / "encoder.json").write_text('{"encoder_id": "encoder", "width": 6}')
    (cache.folder / "index-00.sorted").write_bytes(b"")
    old = np.dtype([("high", "<u8"), ("low", "<u8"), ("offset", "<u8"), ("frames", "<u4"), ("crc", "<u4")])
    shard, offset, records = b"", 0, []
    for number in range(8):
        content = states_of(number).tobytes()
        high, low = np.frombuffer(key_of(number), dtype="<u8")
        records.append((high, low, offset, len(states_of(number)), zlib.crc32(content)))
        shard, offset = shard + content, offset + len(content)
    (cache.folder / "0000-1-1.f16").write_bytes(shard)
    (cache.folder / "0000-1-1.idx").write_bytes(np.array(records, dtype=old).tobytes())
    again = FeatureCache(tmp_path, "encoder")
    for number in range(8):
        np.testing.assert_array_equal(again.get(key_of(number)), states_of(number))
