"""Audio from any container, rate and source is the same 16 kHz signal; other files raise a clear error."""

from __future__ import annotations

import base64
import io
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blsp.data.audio import SAMPLE_RATE, AudioError, is_silent, load_audio, probe_audio, write_wav

SECONDS = 3.0
ENCODINGS = [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "PCM_U8"), ("FLAC", "PCM_16"), ("AIFF", "PCM_24")]
ENCODINGS += [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")]
LOSSLESS = {"PCM_16": 1e-4, "FLOAT": 1e-6, "PCM_24": 1e-6, "PCM_U8": 0.016}
RATES = [8_000, 11_025, 16_000, 44_100, 48_000]


def tone(rate: int, seconds: float = SECONDS) -> np.ndarray:
    """A chord that swells and fades, below 1 kHz, so that every rate and codec can hold it; (N,) float32."""
    time = np.arange(round(rate * seconds)) / rate
    chord = sum(np.sin(2 * np.pi * pitch * time + pitch) for pitch in (220.0, 447.0, 893.0))
    return (0.25 * np.sin(np.pi * time / seconds) ** 2 * chord).astype(np.float32)


def encode(audio: np.ndarray, rate: int, container: str, subtype: str | None = None) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, audio, rate, format=container, subtype=subtype)
    return out.getvalue()


# --- the same signal from every format --------------------------------------------------------------------


@pytest.mark.parametrize(("container", "subtype"), ENCODINGS)
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("channels", [1, 2])
def test_every_encoding_is_the_same_signal(container: str, subtype: str, rate: int, channels: int) -> None:
    if subtype == "OPUS" and rate in (11_025, 44_100):
        pytest.skip("Opus has no such rate")
    clip = np.repeat(tone(rate)[:, None], channels, axis=1)
    audio = load_audio(encode(clip, rate, container, subtype))
    assert audio.dtype == np.float32 and audio.shape == (SECONDS * SAMPLE_RATE,)
    assert audio.flags.c_contiguous
    error = np.abs(audio - tone(SAMPLE_RATE))
    if subtype in LOSSLESS:
        assert error.max() < LOSSLESS[subtype]
    else:
        assert np.sqrt(np.mean(error**2)) < 0.02  # lossy, but in its place: one sample off is 0.03


def test_every_source_is_the_same_signal(tmp_path: Path) -> None:
    wav = encode(tone(22_050), 22_050, "WAV", "FLOAT")
    path = tmp_path / "clip.wav"
    path.write_bytes(wav)
    expected = load_audio(path)
    uri = "data:audio/wav;base64," + base64.b64encode(wav).decode()
    for source in (str(path), wav, bytearray(wav), memoryview(wav), uri):
        np.testing.assert_array_equal(load_audio(source), expected)
    np.testing.assert_array_equal(load_audio(tone(22_050), sampling_rate=22_050), expected)


@pytest.mark.parametrize("kind", [np.int8, np.int16, np.int32, np.uint8, np.float16, np.float64])
def test_arrays_of_any_type_and_layout(kind: type) -> None:
    clip = tone(SAMPLE_RATE).astype(np.float64)
    info = np.iinfo(kind) if np.issubdtype(kind, np.integer) else None
    scaled = clip if info is None else clip * 2.0 ** (info.bits - 1) + (0 if info.min else 2 ** (info.bits - 1))
    stereo = np.stack([scaled, scaled]).astype(kind)
    for array in (stereo[0], stereo, stereo.T):
        audio = load_audio(array, sampling_rate=SAMPLE_RATE)
        assert np.abs(audio - clip).max() < (0.01 if np.dtype(kind).itemsize == 1 else 1e-3)


def test_the_mean_of_the_channels() -> None:
    left, right = tone(SAMPLE_RATE), np.zeros(48_000, dtype=np.float32)
    audio = load_audio(np.stack([left, right], axis=1), sampling_rate=SAMPLE_RATE)
    np.testing.assert_allclose(audio, left / 2, atol=1e-7)


def test_the_callers_array_stays_the_callers() -> None:
    array = tone(SAMPLE_RATE)
    load_audio(array, sampling_rate=SAMPLE_RATE)[:] = 1.0
    np.testing.assert_array_equal(array, tone(SAMPLE_RATE))


# --- cuts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("container", "subtype"), [e for e in ENCODINGS if e[1] != "PCM_U8"])
@pytest.mark.parametrize("rate", RATES)
def test_a_cut_is_the_slice_of_the_whole(container: str, subtype: str, rate: int, tmp_path: Path) -> None:
    if subtype == "OPUS" and rate in (11_025, 44_100):
        pytest.skip("Opus has no such rate")
    clip = np.concatenate([tone(rate, 4.0), tone(rate, 4.0)[::-1]])
    path = tmp_path / "clip"
    path.write_bytes(encode(clip, rate, container, subtype))
    whole = load_audio(path)
    for start, duration in [(0.0, 0.5), (0.01, 1.0), (1.23456, 0.777), (5.0, 3.0), (7.9, 0.1), (6.6666, None)]:
        begin = round(start * SAMPLE_RATE)
        end = len(whole) if duration is None else round((start + duration) * SAMPLE_RATE)
        cut = load_audio(path, start=start, duration=duration)
        assert len(cut) == end - begin
        np.testing.assert_allclose(cut, whole[begin:end], atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([*RATES, 12_345, 22_050, 96_000]), st.floats(0.0, 1.9), st.floats(0.001, 1.0))
def test_any_cut_of_any_rate(rate: int, start: float, duration: float) -> None:
    clip = tone(rate, 3.0)
    whole = load_audio(clip, sampling_rate=rate)
    cut = load_audio(clip, sampling_rate=rate, start=start, duration=duration)
    begin = round(start * SAMPLE_RATE)
    assert len(cut) == round((start + duration) * SAMPLE_RATE) - begin
    np.testing.assert_allclose(cut, whole[begin : begin + len(cut)], atol=1e-5)


@pytest.mark.parametrize("name", ["hello.wav", "sorry.flac", "france.opus", "dinosaur.mp3"])
def test_a_cut_of_real_speech(name: str) -> None:
    path = Path(__file__).parents[1] / "clips" / name
    whole = load_audio(path)
    assert abs(len(whole) / SAMPLE_RATE - probe_audio(path).seconds) < 0.001 and not is_silent(whole)
    for start in (0.0, 0.3333, 0.71):
        begin, end = round(start * SAMPLE_RATE), round((start + 0.5) * SAMPLE_RATE)
        np.testing.assert_allclose(load_audio(path, start=start, duration=0.5), whole[begin:end], atol=1e-5)


def test_a_cut_may_pass_the_end_by_a_rounding_only() -> None:
    clip = tone(SAMPLE_RATE)
    assert len(load_audio(clip, sampling_rate=SAMPLE_RATE, start=2.5, duration=0.55)) == 8_000
    with pytest.raises(AudioError, match=r"ends at 3\.500 s, the recording at 3\.000 s"):
        load_audio(clip, sampling_rate=SAMPLE_RATE, start=2.5, duration=1.0)
    with pytest.raises(AudioError, match="past its end"):
        load_audio(clip, sampling_rate=SAMPLE_RATE, start=3.0)


def test_a_cut_reads_only_what_it_needs(tmp_path: Path) -> None:
    """Damage after the cut does not matter to it, and damage inside does."""
    path = tmp_path / "clip.flac"
    flac = encode(np.tile(tone(SAMPLE_RATE), 20), SAMPLE_RATE, "FLAC")
    path.write_bytes(flac[: len(flac) // 2])
    assert len(load_audio(path, start=1.0, duration=2.0)) == 32_000
    with pytest.raises(AudioError, match=r"clip\.flac: (truncated|damaged)"):
        load_audio(path)


# --- probing, silence, writing ----------------------------------------------------------------------------


@pytest.mark.parametrize(("container", "subtype"), ENCODINGS)
def test_probe(container: str, subtype: str, tmp_path: Path) -> None:
    path = tmp_path / "clip"
    path.write_bytes(encode(np.stack([tone(48_000)] * 2, axis=1), 48_000, container, subtype))
    info = probe_audio(path)
    assert (info.seconds, info.sampling_rate, info.channels, info.format) == (3.0, 48_000, 2, container)


def test_silence_is_loaded_and_told() -> None:
    silence = load_audio(np.zeros(8_000, dtype=np.int16), sampling_rate=8_000)
    assert is_silent(silence) and is_silent(silence + 0.1) and is_silent(silence[:0])
    silence[5_000:5_320] = 0.01 * tone(SAMPLE_RATE)[24_000:24_320]
    assert not is_silent(silence)
    assert is_silent(silence, threshold_db=-30.0)


def test_written_wav_comes_back(tmp_path: Path) -> None:
    write_wav(tmp_path / "clip.wav", tone(SAMPLE_RATE))
    np.testing.assert_allclose(load_audio(tmp_path / "clip.wav"), tone(SAMPLE_RATE), atol=2**-16)
    write_wav(tmp_path / "clip.wav", np.array([2.0, -2.0] * 50))
    assert load_audio(tmp_path / "clip.wav").tolist() == [32767 / 32768, -1.0] * 50
    assert os.listdir(tmp_path) == ["clip.wav"]


# --- streams of unknown length; headers that state a wrong length -------------------------------------------


def flac_of_length(samples: int) -> bytes:
    """A FLAC of 48,000 samples whose header says otherwise (0: unknown). 36 bits from byte 21 on."""
    flac = bytearray(encode(tone(SAMPLE_RATE), SAMPLE_RATE, "FLAC"))
    flac[21] = (flac[21] & 0xF0) | samples >> 32
    flac[22:26] = (samples & 0xFFFFFFFF).to_bytes(4, "big")
    return bytes(flac)


def test_streams_without_a_length() -> None:
    assert len(load_audio(flac_of_length(0))) == 48_000
    assert probe_audio(flac_of_length(0)).seconds == 3.0
    assert len(load_audio(flac_of_length(0), start=2.0, duration=0.5)) == 8_000
    with pytest.raises(AudioError, match=r"cannot go to 5\.000 s"):
        load_audio(flac_of_length(0), start=5.0)
    wav = bytearray(encode(tone(SAMPLE_RATE), SAMPLE_RATE, "WAV"))
    data = wav.index(b"data")
    wav[4:8] = wav[data + 4 : data + 8] = b"\xff\xff\xff\xff"
    assert len(load_audio(bytes(wav))) == 48_000


def test_a_header_that_promises_too_much() -> None:
    with pytest.raises(AudioError, match="promises 68719476735 samples"):
        load_audio(flac_of_length(2**36 - 1))
    with pytest.raises(AudioError, match=r"truncated|damaged"):
        load_audio(flac_of_length(5_000_000))


def test_no_more_than_the_longest() -> None:
    bomb = encode(np.zeros(SAMPLE_RATE * 60, dtype=np.int16), SAMPLE_RATE, "FLAC")
    with pytest.raises(AudioError, match="60 s of audio; at most 10 s"):
        load_audio(bomb, longest=10.0)
    assert len(load_audio(bomb, start=30.0, duration=5.0, longest=10.0)) == 80_000


# --- malformed input: always an AudioError that names the source --------------------------------------------


def refused(source: object, *, name: str, **cut: float) -> str:
    with pytest.raises(AudioError) as raised:
        load_audio(source, **cut)  # type: ignore[arg-type]
    message = str(raised.value)
    assert name in message and "\n" not in message and len(message) < 600
    return message


WAV = encode(tone(8_000, 0.5), 8_000, "WAV")


def wav_header(**changed: int) -> bytes:
    """The same clip with fields of its format chunk changed."""
    values = {"channels": 1, "rate": 8_000, "per_second": 16_000, "align": 2, "bits": 16} | changed
    return WAV[:22] + struct.pack("<HIIHH", *values.values()) + WAV[36:]


MALFORMED: dict[str, bytes] = {
    "empty": b"",
    "text": b"This is not audio. " * 100,
    "json": b'{"id": "a"}\n' * 20,
    "html error page": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "git lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "png": b"\x89PNG\r\n\x1a\n" + bytes(200),
    "zip": b"PK\x03\x04" + bytes(200),
    "mp4": b"\x00\x00\x00\x18ftypM4A " + bytes(200),
    "zeros": bytes(5_000),
    "ones": b"\xff" * 5_000,
    "wrong magic": b"RIFX" + WAV[4:],
    "header only": WAV[:44],
    "half a header": WAV[:30],
    "four bytes": WAV[:4],
    "no data chunk": WAV[:36],
    "no samples": encode(np.zeros(0, dtype=np.int16), 8_000, "WAV"),
    "no samples, flac": encode(np.zeros(0, dtype=np.int16), 8_000, "FLAC"),
    "zero channels": wav_header(channels=0),
    "many channels": wav_header(channels=65_535),
    "rate of zero": wav_header(rate=0),
    "rate of one": wav_header(rate=1),
    "absurd rate": wav_header(rate=2**31 - 1),
    "zero bits": wav_header(bits=0),
    "data past the end": WAV[:40] + struct.pack("<I", 10**8) + WAV[44:],
    "only NaN": encode(np.full(800, np.nan, dtype=np.float32), 8_000, "WAV", "FLOAT"),
    "one NaN": encode(np.array([0.0] * 500 + [np.nan] + [0.0] * 300), 8_000, "WAV", "DOUBLE"),
    "infinite": encode(np.array([0.0, np.inf, -np.inf] * 300), 16_000, "WAV", "FLOAT"),
    "beyond float32": encode(np.full(800, 1e300), 16_000, "WAV", "DOUBLE"),
    "mat5": encode(tone(8_000, 0.5), 8_000, "MAT5"),
    "flac of nothing": b"fLaC" + bytes(100),
    "ogg of nothing": b"OggS" + bytes(100),
    "ogg without audio": b"OggS\x00\x02" + bytes(8) + b"\x01\x00\x00\x00" + bytes(8) + b"\x01\x05hello",
    "ID3 alone": b"ID3\x04\x00\x00\x00\x00\x00\x0a" + bytes(10),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_files(kind: str, tmp_path: Path) -> None:
    for suffix in (".wav", ".mp3", ".flac", ".ogg", ".raw", ".gsm", ".au", ""):
        path = tmp_path / f"clip{suffix}"
        path.write_bytes(MALFORMED[kind])
        refused(path, name=str(path))
        with pytest.raises(AudioError, match="clip"):
            if "NaN" in kind or "inf" in kind or "beyond" in kind:
                load_audio(path)  # the header is in order
            else:
                probe_audio(path)
    refused(MALFORMED[kind], name=f"audio of {len(MALFORMED[kind])} bytes")


@pytest.mark.parametrize(
    ("container", "subtype"),
    [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("AIFF", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)],
)
@pytest.mark.parametrize("kept", [0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97])
def test_truncated_files(container: str, subtype: str | None, kept: float, tmp_path: Path) -> None:
    whole = encode(tone(16_000, 6.0), 16_000, container, subtype)
    path = tmp_path / "clip"
    path.write_bytes(whole[: int(kept * len(whole))])
    refused(path, name=str(path))
    refused(path.read_bytes(), name="audio of")


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path, tmp_path / "missing.wav", tmp_path / "pipe", tmp_path / "dangling", "/dev/null"):
        refused(path, name=str(path))
    refused("", name="''")
    refused("a\0b.wav", name="a\0b.wav")
    refused("long" * 2_000, name="longlong")


@pytest.mark.parametrize(
    "uri",
    [
        "data:",
        "data:audio/wav;base64",
        "data:audio/wav;base64,",
        "data:audio/wav;base64,AAAA",
        "data:audio/wav;base64,not base64!",
        "data:audio/wav;base64,UklGR",
        "data:audio/wav,plain%20text",
        "data:audio/wav;base64,ÜÖÄ",
    ],
)
def test_data_uris_that_hold_no_audio(uri: str) -> None:
    refused(uri, name="data")


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(0, dtype=np.float32),
        np.zeros((0, 2), dtype=np.float32),
        np.zeros((100, 0), dtype=np.float32),
        np.zeros((2, 3, 4), dtype=np.float32),
        np.ones(()),
        np.array([True, False] * 50),
        np.array(["a", "b"]),
        np.array([1 + 2j] * 50),
        np.array([None] * 50),
        np.array([np.nan] * 50),
        np.array([1e300] * 50),
    ],
)
def test_arrays_that_are_no_audio(array: np.ndarray) -> None:
    with pytest.raises(AudioError, match="audio array"):
        load_audio(array, sampling_rate=SAMPLE_RATE)


def test_an_array_needs_a_sensible_rate() -> None:
    with pytest.raises(AudioError, match="needs its sampling_rate"):
        load_audio(tone(8_000))
    for rate in (0, -16_000, 10, 10**9):
        with pytest.raises(AudioError, match=f"sampling rate {rate} Hz"):
            load_audio(tone(8_000), sampling_rate=rate)


@pytest.mark.parametrize("start", [-1.0, -1e-9, float("nan"), float("inf"), -float("inf"), 1e300, 10**400, 0.5])
def test_a_start_outside_the_clip(start: float) -> None:
    refused(WAV, name="audio of", start=start)


@pytest.mark.parametrize("duration", [0.0, -1.0, 1e-9, float("nan"), float("inf"), 1e300, 10**400, 0.7])
def test_a_duration_outside_the_clip(duration: float) -> None:
    refused(WAV, name="audio of", duration=duration)


def damage(generator: random.Random, whole: bytes) -> bytes:
    """One of the things that happen to files."""
    data = bytearray(whole)
    place, length = generator.randrange(len(data)), generator.randrange(1, 200)
    ways: list[Callable[[], bytes | bytearray]] = [
        lambda: data[:place],
        lambda: data[place:],
        lambda: data[:place] + data[place + length :],
        lambda: data[:place] + generator.randbytes(length) + data[place + length :],
        lambda: data[:place] + generator.randbytes(length) + data[place:],
        lambda: generator.randbytes(64) + data[64:],
        lambda: data[:16] + generator.randbytes(30) + data[46:],
        lambda: data[:place] + bytes(length) + data[place + length :],
    ]
    return bytes(generator.choice(ways)())


@pytest.mark.parametrize("seed", range(8))
def test_damaged_files_are_audio_or_an_audio_error(seed: int, tmp_path: Path) -> None:
    """240 damaged clips: whatever still decodes is finite, mono and 16 kHz; the rest is refused by name."""
    generator = random.Random(seed)
    path = tmp_path / "clip"
    for container, subtype in [("WAV", None), ("FLAC", None), ("OGG", None), ("OGG", "OPUS"), ("MP3", None)]:
        whole = encode(tone(8_000, 1.0), 8_000, container, subtype)
        for _ in range(6):
            path.write_bytes(damage(generator, whole))
            try:
                audio = load_audio(path)
            except AudioError as error:
                assert str(path) in str(error)
            else:
                assert audio.ndim == 1 and len(audio) and np.isfinite(audio).all()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from([b"", b"RIFF\x10\0\0\0WAVE", b"fLaC", b"OggS", b"ID3", b"\xff\xfb\x90\xc4", WAV[:44], WAV[:20]]),
    st.binary(max_size=300),
)
def test_any_bytes_are_audio_or_an_audio_error(head: bytes, tail: bytes) -> None:
    try:
        audio = load_audio(head + tail)
    except AudioError as error:
        assert "audio of" in str(error)
    else:
        assert audio.ndim == 1 and len(audio) and np.isfinite(audio).all()
