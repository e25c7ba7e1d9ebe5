"""`blsp encode`: every clip once, the same numbers whenever it is killed, nothing that cannot be heard."""

from __future__ import annotations

import io
import os
import random
import re
import shutil
import signal
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import soundfile
import torch
from support.full_disk import run_with_room
from test_distributed import run_ranks
from tqdm import tqdm

from blsp.data.addresses import Shard
from blsp.data.audio import load_audio, write_wav
from blsp.data.jobs import JobError, SkippedLog, lock_job
from blsp.data.manifest import Manifest, Utterance, read_rows, write_manifest
from blsp.distributed import Runtime
from blsp.features import encode as encoding
from blsp.features.cache import FeatureCache
from blsp.features.encode import (
    Clip,
    Encoder,
    Progress,
    batches_of,
    encode,
    encoder_id,
    in_order,
    missing_rows,
    read_clips,
)
from blsp.model.loading import load_speech_encoder
from blsp.model.speech_encoder import encode_speech, encoder_frames, mel_features, mel_frames
from blsp.settings import EncodeSettings
from blsp.weights.digest import find_weights

RUNTIME = Runtime(torch.device("cpu"), torch.float32)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Twenty clips of noise, 0.1 to 2 s."""
    return write_clips(tmp_path, [0.1 + 0.1 * n for n in range(20)])


def write_clips(folder: Path, seconds: Sequence[float]) -> Path:
    rng = np.random.default_rng(0)
    rows = []
    for number, length in enumerate(seconds):
        path = folder / f"{number}.wav"
        write_wav(path, 0.1 * rng.standard_normal(round(length * 16_000)))
        rows.append(Utterance(id=f"clip-{number}", audio=path.name, text="noise"))
    write_manifest(folder / "clips.jsonl", rows)
    return folder / "clips.jsonl"


def settings(manifest: Path, ears: str, cache: Path, **more: object) -> EncodeSettings:
    return EncodeSettings(manifest=str(manifest), audio_model=ears, cache=cache, device="cpu", **more)  # type: ignore[arg-type]


def content(cache: Path, manifest: Path, ears: str) -> list[bytes]:
    opened = FeatureCache(cache, encoder_id(find_weights(ears).sha256))
    return [opened.get(key).tobytes() for row in Manifest(manifest) if opened.has(key := opened.key(row))]


def records(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.glob("*/*.idx")) // 32


def test_every_clip_has_its_encoders_states(manifest: Path, tiny_whisper: str, tmp_path: Path) -> None:
    assert encode(settings(manifest, tiny_whisper, tmp_path / "cache")) is None
    cache = FeatureCache(tmp_path / "cache", encoder_id(find_weights(tiny_whisper).sha256))
    tower, extractor = load_speech_encoder(find_weights(tiny_whisper), RUNTIME)
    rows = list(Manifest(manifest))
    lengths = cache.lengths([cache.key(row) for row in rows])
    for row, length in zip(rows, lengths, strict=True):
        audio = load_audio(row.audio)
        assert length == encoder_frames(mel_frames(len(audio)))
        with torch.inference_mode():
            states, _ = encode_speech(tower, *mel_features(extractor, [audio]))
        np.testing.assert_array_equal(cache.get(cache.key(row)), states[0].half().numpy())


def test_a_second_run_and_a_second_manifest_encode_nothing(
    manifest: Path, tiny_whisper: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encode(settings(manifest, tiny_whisper, tmp_path / "cache", limit=12))
    rows = [row.to_json() | {"behaviour": b, "order": "speech-first"} for row in Manifest(manifest) for b in "ab"]
    write_manifest(tmp_path / "continued.jsonl", [*rows, {"id": "text only", "text": "x"}])
    encode(settings(tmp_path / "continued.jsonl", tiny_whisper, tmp_path / "cache"))
    encode(settings(manifest, tiny_whisper, tmp_path / "cache"))
    encoded = [line.split(",")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("encoded")]
    assert encoded == ["encoded 12 clips", "encoded 8 clips", "encoded 0 clips"]
    assert records(tmp_path / "cache") == 20


def test_broken_clips_are_listed_with_the_reason(
    manifest: Path, tiny_whisper: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "3.wav").write_bytes(b"not audio")
    (tmp_path / "4.wav").unlink()
    rows = [*Manifest(manifest), Utterance(id="cut", audio=str(tmp_path / "5.wav"), text="", start=99.0)]
    write_manifest(tmp_path / "broken.jsonl", rows)
    encode(settings(tmp_path / "broken.jsonl", tiny_whisper, tmp_path / "cache"))
    listed = {row["id"]: row for _, row in read_rows(tmp_path / "cache" / "broken.skipped.jsonl")}
    assert set(listed) == {"clip-3", "clip-4", "cut"}
    assert "no such file" in listed["clip-4"]["reason"] and "99" in listed["cut"]["reason"]
    printed = capsys.readouterr().out
    assert "skipped 3 rows" in printed and "broken.skipped.jsonl" in printed
    assert records(tmp_path / "cache") == 18
    encode(settings(manifest, tiny_whisper, tmp_path / "cache", limit=3))
    assert not (tmp_path / "cache" / "clips.skipped.jsonl").exists()


def test_a_manifest_of_which_no_clip_can_be_read_fails(manifest: Path, tiny_whisper: str, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.wav").unlink()
    cache = tmp_path / "cache"
    with pytest.raises(JobError, match=r"no clip could be encoded: skipped 3 rows.*clips.skipped.jsonl"):
        encode(settings(manifest, tiny_whisper, cache, limit=3))
    with lock_job(cache / "clips"), pytest.raises(JobError, match=f"process {os.getpid()} on "):
        encode(settings(manifest, tiny_whisper, cache))
    encode(settings(manifest, tiny_whisper, cache))


def test_silence_under_a_transcript_is_listed_and_speech_of_opposite_phase_is_heard(
    tiny_whisper: str, tmp_path: Path
) -> None:
    tone = 0.3 * np.sin(np.arange(16_000) / 10)
    soundfile.write(tmp_path / "opposite.wav", np.stack([tone, -tone], axis=1), 16_000)
    write_wav(tmp_path / "silent.wav", np.zeros(16_000))
    rows = [
        Utterance(id="opposite", audio="opposite.wav", text="hello"),
        Utterance(id="silent", audio="silent.wav", text="hello"),
        Utterance(id="no speech", audio="silent.wav", text="", start=0.1, extra={"no_speech": True}),
    ]
    write_manifest(tmp_path / "clips.jsonl", rows)
    encode(settings(tmp_path / "clips.jsonl", tiny_whisper, tmp_path / "cache"))
    ((_, row),) = read_rows(tmp_path / "cache" / "clips.skipped.jsonl")
    assert (row["id"], row["reason"]) == ("silent", "silence under a transcript: hello")
    assert records(tmp_path / "cache") == 2


def test_rows_that_an_english_encoder_cannot_understand_are_named(
    manifest: Path, tiny_whisper: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    languages = ["fr", "en", "en-GB", "de", "English", None]
    rows = [row.to_json() | {"language": it} for row, it in zip(Manifest(manifest), languages, strict=False)]
    write_manifest(tmp_path / "mixed.jsonl", rows, relative_to=tmp_path)
    encode(settings(tmp_path / "mixed.jsonl", tiny_whisper, tmp_path / "cache"))
    told = f"{tiny_whisper} knows English only, and of the first 6 rows 2 are in de, fr"
    assert told in capsys.readouterr().err
    encode(settings(manifest, tiny_whisper, tmp_path / "cache"))
    assert "English" not in capsys.readouterr().err


def test_a_cache_that_is_removed_ends_the_job(
    manifest: Path, tiny_whisper: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = Progress.stored

    def remove(progress: Progress, clip: Clip) -> None:
        stored(progress, clip)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)

    monkeypatch.setattr(Progress, "stored", remove)
    with pytest.raises(FileNotFoundError, match=r"\.f16: was removed with its content"):
        encode(settings(manifest, tiny_whisper, tmp_path / "cache"))


def test_a_full_disk_is_named_and_the_same_command_goes_on(manifest: Path, tiny_whisper: str, tmp_path: Path) -> None:
    encode(settings(manifest, tiny_whisper, tmp_path / "whole"))
    job = settings(manifest, tiny_whisper, tmp_path / "cache")
    sizes = [path.stat().st_size for path in (tmp_path / "whole").glob("*/*.f16")]
    error = run_with_room(lambda: encode(job), sizes[0] // 2, tmp_path / "told")
    shard = r"cache/\w+/[\w-]+\.f16"
    assert re.search(shard + r": no room for it: about [\d,]+ bytes for \d+ more rows are needed, [\d,]+ bytes", error)
    encode(job)
    assert content(tmp_path / "cache", manifest, tiny_whisper) == content(tmp_path / "whole", manifest, tiny_whisper)


def test_a_changed_clip_is_encoded_again(manifest: Path, tiny_whisper: str, tmp_path: Path) -> None:
    encode(settings(manifest, tiny_whisper, tmp_path / "cache"))
    before = content(tmp_path / "cache", manifest, tiny_whisper)
    write_wav(tmp_path / "7.wav", 0.1 * np.random.default_rng(9).standard_normal(16_000))
    encode(settings(manifest, tiny_whisper, tmp_path / "cache"))
    after = content(tmp_path / "cache", manifest, tiny_whisper)
    assert [a == b for a, b in zip(before, after, strict=True)] == [n != 7 for n in range(20)]


def test_a_damaged_entry_is_encoded_again(manifest: Path, tiny_whisper: str, tmp_path: Path) -> None:
    encode(settings(manifest, tiny_whisper, tmp_path / "cache"))
    before = content(tmp_path / "cache", manifest, tiny_whisper)
    (shard,) = (tmp_path / "cache").glob("*/*.f16")
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged[:-5])
    encode(settings(manifest, tiny_whisper, tmp_path / "cache"))
    assert content(tmp_path / "cache", manifest, tiny_whisper) == before
    assert records(tmp_path / "cache") == 22


def test_killed_ten_times_it_ends_with_the_same_bytes(manifest: Path, tiny_whisper: str, tmp_path: Path) -> None:
    begun = time.perf_counter()
    encode(settings(manifest, tiny_whisper, tmp_path / "whole"))
    whole = time.perf_counter() - begun
    chance, kills = random.Random(0), 0
    for _ in range(10):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a fork beside threads that are idle
            child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            encode(settings(manifest, tiny_whisper, tmp_path / "killed"))
            os._exit(0)
        time.sleep(chance.uniform(0.2, 0.9) * whole)
        os.kill(child, signal.SIGKILL)
        kills += os.waitpid(child, 0)[1] == signal.SIGKILL
    assert kills > 0
    encode(settings(manifest, tiny_whisper, tmp_path / "killed"))
    expected = content(tmp_path / "whole", manifest, tiny_whisper)
    assert content(tmp_path / "killed", manifest, tiny_whisper) == expected
    assert records(tmp_path / "killed") == 20, "nothing was encoded twice"


def test_two_ranks_share_the_rows(manifest: Path, tiny_whisper: str, tmp_path: Path) -> None:
    program = (
        "from pathlib import Path\nfrom blsp.settings import EncodeSettings\n"
        "from blsp.features.encode import encode\n"
        f"encode(EncodeSettings(manifest={str(manifest)!r}, audio_model={tiny_whisper!r}, "
        f"cache=Path({str(tmp_path / 'two')!r}), device='cpu'))\n"
    )
    first, second = run_ranks(program)
    assert "encoded 20 clips" in first and not second
    encode(settings(manifest, tiny_whisper, tmp_path / "one"))
    two, one = (content(tmp_path / name, manifest, tiny_whisper) for name in ("two", "one"))
    assert two == one and records(tmp_path / "two") == 20
    assert len(list((tmp_path / "two").glob("*/*.f16"))) == 2


def test_a_failing_encoder_ends_the_job(
    manifest: Path, tiny_whisper: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(encoding, "encode_speech", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        encode(settings(manifest, tiny_whisper, tmp_path / "cache"))
    assert torch.get_num_threads() == 1


def test_numbers_that_are_none_are_not_kept(
    manifest: Path, tiny_whisper: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflow(
        tower: object, mel: torch.Tensor, mask: torch.Tensor, **_: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = (mask.sum(1) + 1) // 2
        return torch.full((len(mel), int(lengths.max()), 16), 1e9), lengths

    monkeypatch.setattr(encoding, "encode_speech", overflow)
    with pytest.raises(JobError, match="skipped 20 rows"):
        encode(settings(manifest, tiny_whisper, tmp_path / "cache"))
    assert records(tmp_path / "cache") == 0
    assert "not finite" in next(read_rows(tmp_path / "cache" / "clips.skipped.jsonl"))[1]["reason"]


# --- batches, as an accelerator takes them ------------------------------------------------------------------


@pytest.fixture
def encoder(tiny_whisper: str) -> Encoder:
    return Encoder(*load_speech_encoder(find_weights(tiny_whisper), RUNTIME), RUNTIME)


def read(encoder: Encoder, manifest: Path, tmp_path: Path) -> list[Clip]:
    cache, rows = FeatureCache(tmp_path / "cache", "an encoder"), list(Manifest(manifest))
    with SkippedLog(tmp_path / "out") as skipped, ThreadPoolExecutor(2) as pool:
        progress = Progress(skipped, tqdm(file=io.StringIO()))
        return list(read_clips(pool, encoder, missing_rows(pool, cache, [rows], progress), progress))


def test_a_batch_equals_its_clips_alone(manifest: Path, encoder: Encoder, tmp_path: Path) -> None:
    clips = read(encoder, manifest, tmp_path)
    assert len(clips) == 20
    for clip, states in zip(clips, encoder.states(clips), strict=True):
        (alone,) = encoder.states([clip])
        np.testing.assert_allclose(states, alone, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("full_window", [False, True])
def test_a_very_long_clip_is_encoded_in_pieces(
    tmp_path: Path, encoder: Encoder, full_window: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = replace(encoder, full_window=full_window)
    (clip,) = read(encoder, write_clips(tmp_path, [95.3]), tmp_path)
    (whole,) = encoder.states([clip])
    monkeypatch.setattr(encoding, "PIECE_MEL_FRAMES", 3000)
    (pieces,) = encoder.states([clip])
    assert whole.shape == (4765, encoder.tower.config.d_model)
    np.testing.assert_allclose(pieces, whole, atol=2e-3, rtol=2e-3)


def test_batches_hold_like_lengths_within_the_budget(
    manifest: Path, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = read(encoder, manifest, tmp_path)
    random.Random(0).shuffle(clips)
    monkeypatch.setattr(encoding, "SORTED_SECONDS", 8.0)
    batches = list(batches_of(clips, 3.0))
    assert sorted(clip.row.id for batch in batches for clip in batch) == sorted(clip.row.id for clip in clips)
    assert all(len(batch) * max(clip.width for clip in batch) <= 300 for batch in batches)
    assert len(batches) < 15 and len(list(batches_of(clips, 0.01))) == 20, "above the budget: alone"


def test_work_is_begun_ahead_and_given_in_order() -> None:
    begun: list[int] = []

    def work(number: int) -> int:
        begun.append(number)
        time.sleep(0.002 * (number % 3))
        return number

    with ThreadPoolExecutor(4) as pool:
        results = in_order(pool, work, range(50), 8)
        assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
        assert len(begun) <= 13
        assert list(results) == list(range(5, 50))


# --- shards and stores ------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["", "memory://encode-test/"])
def test_clips_of_a_shard_are_read_once_in_their_order(
    place: str, manifest: Path, tmp_path: Path, tiny_whisper: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, spans, shard = list(Manifest(manifest)), [], b""
    for row in rows:
        data = Path(row.audio).read_bytes()
        spans.append((len(shard), len(data)))
        shard += data
    url = f"{place}shard.bin"
    with fsspec.open(url if place else f"{tmp_path}/{url}", "wb") as file:
        file.write(shard)
    pieces = [f"{url}#bytes={first}+{length}" for first, length in spans] + [f"{url}#bytes=0+99999999"]
    ids = [*(row.id for row in rows), "torn"]
    write_manifest(tmp_path / "shard.jsonl", [Utterance(n, a, "noise") for n, a in zip(ids, pieces, strict=True)])
    reads: list[str] = []
    read = Shard.read
    monkeypatch.setattr(Shard, "read", lambda self, address: (reads.append(str(address.span)), read(self, address))[1])

    encode(settings(tmp_path / "shard.jsonl", tiny_whisper, tmp_path / "cache"))
    assert reads == [str(span) for span in [*spans, (0, 99999999)]]
    (torn,) = [row for _, row in read_rows(tmp_path / "cache" / "shard.skipped.jsonl")]
    assert torn["id"] == "torn" and "ends" in torn["reason"]

    # the same clips as files, and the shard when it is gone: nothing is encoded again
    encode(settings(manifest, tiny_whisper, tmp_path / "cache"))
    system, path = fsspec.url_to_fs(url if place else f"{tmp_path}/{url}")
    system.rm(path)
    encode(settings(tmp_path / "shard.jsonl", tiny_whisper, tmp_path / "cache"))
    assert records(tmp_path / "cache") == len(rows)
    assert content(tmp_path / "cache", tmp_path / "shard.jsonl", tiny_whisper) == content(
        tmp_path / "cache", manifest, tiny_whisper
    )
