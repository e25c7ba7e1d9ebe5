"""The true length of a recording: each file is read to the end that FFmpeg finds, or refused."""

from __future__ import annotations

import io
import json
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from blsp.data import containers
from blsp.data.audio import SAMPLE_RATE, AudioError, is_silent, load_audio, probe_audio
from blsp.data.containers import ffmpeg_container

RATES = (8_000, 16_000, 22_050, 32_000, 44_100, 48_000)
SECONDS = 1.7
SLACK = 0.05  # seconds between our length and FFmpeg's


def sweep(rate: int, channels: int = 1, seconds: float = SECONDS) -> np.ndarray:
    """A rising tone (n, C), audible to its last sample."""
    time = np.arange(round(seconds * rate)) / rate
    tone = (0.3 * np.sin(2 * np.pi * (200 + 300 * time) * time)).astype(np.float32)
    return np.repeat(tone[:, None], channels, axis=1)


def encoded(
    container: str,
    codec: str,
    rate: int = 16_000,
    channels: int = 1,
    bit_rate: int = 0,
    piped: bool = False,
    options: dict[str, str] | None = None,
) -> bytes:
    """A recording made by FFmpeg; `piped`: into a stream that cannot be gone back in, so without an Info frame."""

    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return not piped

    file = Pipe()
    layout = "mono" if channels == 1 else "stereo"
    options = {"write_xing": "0"} if piped and container == "mp3" else options or {}
    with av.open(file, "w", format=container, options=options) as out:
        stream = out.add_stream(codec, rate=rate, layout=layout)
        if bit_rate:
            stream.bit_rate = bit_rate
        samples = np.ascontiguousarray(sweep(rate, channels).T)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
        frame.sample_rate = rate
        resampler = av.AudioResampler(format=stream.format or "fltp", layout=layout, rate=rate)
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            fifo = av.AudioFifo()
            fifo.write(piece)
            size = stream.codec_context.frame_size or piece.samples
            while block := fifo.read(size, partial=True):
                out.mux(stream.encode(block))
        out.mux(stream.encode(None))
    return file.getvalue()


MADE = [
    *(("mp3", "libmp3lame", rate, channels, 64_000, True) for rate in RATES for channels in (1, 2)),
    *(("mp3", "libmp3lame", rate, channels, 48_000, False) for rate in RATES for channels in (1, 2)),
    *(("ipod", "aac", rate, channels, 64_000, False) for rate in RATES for channels in (1, 2)),
    *(("adts", "aac", rate, channels, 64_000, False) for rate in RATES for channels in (1, 2)),
    *(("webm", "libopus", 48_000, channels, 32_000, piped) for channels in (1, 2) for piped in (False, True)),
    *(("ogg", "libopus", 48_000, channels, 32_000, False) for channels in (1, 2)),
    *(("asf", "wmav2", rate, channels, 64_000, False) for rate in (16_000, 44_100) for channels in (1, 2)),
    *(("mp4", "alac", rate, 1, 0, False) for rate in (16_000, 44_100)),
]


# Seconds that `ffmpeg -i FILE -f f32le -ac 1 -ar 16000` decodes of each made file (FFmpeg 5.1, 2026-11-29)
FFMPEG_SECONDS: dict[str, float] = json.loads(Path(__file__).with_name("ffmpeg_seconds.json").read_text())


def ffmpeg_seconds(path: Path) -> float:
    """The length that FFmpeg decodes."""
    command = ["ffmpeg", "-v", "error", "-i", str(path), "-f", "f32le", "-ac", "1", "-ar", "16000", "pipe:1"]
    return len(subprocess.run(command, capture_output=True, check=False).stdout) / 4 / SAMPLE_RATE


def compare_with_ffmpeg(name: str, path: Path, seconds: float) -> None:
    """Our length within `SLACK` of FFmpeg's, as stored and, where it is installed, as it decodes now."""
    assert abs(FFMPEG_SECONDS[name] - seconds) <= SLACK
    if shutil.which("ffmpeg"):
        assert abs(ffmpeg_seconds(path) - seconds) <= SLACK


@pytest.mark.parametrize(("container", "codec", "rate", "channels", "bit_rate", "piped"), MADE)
def test_a_made_file_has_the_length_that_was_made(
    tmp_path: Path, container: str, codec: str, rate: int, channels: int, bit_rate: int, piped: bool
) -> None:
    data = encoded(container, codec, rate, channels, bit_rate, piped)
    path = tmp_path / "a"
    path.write_bytes(data)
    audio = load_audio(path)
    assert len(load_audio(data)) == len(audio) and not is_silent(audio[-SAMPLE_RATE // 4 :])
    assert (
        SECONDS - SLACK <= len(audio) / SAMPLE_RATE <= SECONDS + 3 * 1024 / rate + 0.05
    )  # encoders pad to whole frames
    assert abs(probe_audio(path).seconds - len(audio) / SAMPLE_RATE) < 0.001
    name = f"{container} {codec} {rate} {channels} {bit_rate}{' piped' if piped else ''}"
    compare_with_ffmpeg(name, path, len(audio) / SAMPLE_RATE)
    piece = load_audio(path, start=0.5, duration=0.7)
    np.testing.assert_allclose(piece, audio[8_000 : 8_000 + len(piece)], atol=1e-6)


def with_frame_count(data: bytes, change: int) -> bytes:
    """An mp3 whose Info frame counts a thousandth of `change` of its frames."""
    changed, at = bytearray(data), data.index(b"Info") + 8
    count = int.from_bytes(data[at : at + 4], "big") * change // 1000
    changed[at : at + 4] = count.to_bytes(4, "big")
    return bytes(changed)


@pytest.mark.parametrize("change", [0, 300, 990, 1020, 3000])
@pytest.mark.parametrize("long", [False, True])
def test_an_mp3_that_counts_its_frames_wrongly_is_read_to_its_end(
    change: int, long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libsndfile stops at the count, without a word, or waits for frames that do not come."""
    whole = encoded("mp3", "libmp3lame", bit_rate=48_000)
    if long:  # of a long file only the begin is looked at, so that a small fault is not seen
        monkeypatch.setattr(containers, "SCANNED_MP3", 4000)
        change = change if not 900 < change < 1100 else 1000
    else:
        assert ffmpeg_container(io.BytesIO(whole), len(whole)) is None
    seconds = len(load_audio(with_frame_count(whole, change))) / SAMPLE_RATE
    assert SECONDS - SLACK <= seconds <= SECONDS + 0.1


ID3 = b"ID3\x03\0\0\0\0\x01\x00" + bytes(128)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("zeros before mp3", lambda: bytes(500) + encoded("mp3", "libmp3lame", bit_rate=48_000)),
        ("text before mp3", lambda: b"HTTP/1.1 200 OK " * 99 + encoded("mp3", "libmp3lame", bit_rate=48_000)),
        ("tags before aac", lambda: ID3 + encoded("adts", "aac")),
        ("tags before wav", lambda: ID3 + encoded("wav", "pcm_s16le")),
        ("tags before streamed wav", lambda: ID3 + wav(0xFFFFFFFF)),
        ("tags before flac", lambda: ID3 + encoded("flac", "flac")),
        ("mp3 in wav", lambda: encoded("wav", "libmp3lame")),
        ("g722 in wav", lambda: encoded("wav", "adpcm_g722")),
        ("flac in ogg", lambda: encoded("ogg", "flac")),
        ("ima4 in caf", lambda: encoded("caf", "adpcm_ima_qt")),
        ("flac in matroska", lambda: encoded("matroska", "flac")),
        ("fragments of mp4", lambda: encoded("mp4", "aac", options={"movflags": "empty_moov+frag_keyframe"})),
        ("rf64", lambda: encoded("wav", "pcm_s16le", options={"rf64": "always"})),
        ("w64", lambda: encoded("w64", "pcm_s16le")),
    ],
)
def test_odd_files_have_the_length_that_was_made(name: str, data: Callable[[], bytes], tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(data())  # no suffix tells the format
    audio = load_audio(tmp_path / "a")
    assert SECONDS - SLACK <= len(audio) / SAMPLE_RATE <= SECONDS + 0.15, name
    assert np.array_equal(load_audio(data()), audio)
    assert abs(probe_audio(tmp_path / "a").seconds - len(audio) / SAMPLE_RATE) < 0.001


def header_first(data: bytes) -> bytes:
    """An mp4 whose `moov` part, in which the chunks' places are moved, comes before the sound, as on the web."""
    begin, end = int.from_bytes(data[:4], "big"), data.index(b"moov") - 4
    moov = bytearray(data[end:])
    at = moov.index(b"stco") + 8
    for place in range(at + 4, at + 4 + 4 * int.from_bytes(moov[at : at + 4], "big"), 4):
        moov[place : place + 4] = (int.from_bytes(moov[place : place + 4], "big") + len(moov)).to_bytes(4, "big")
    return data[:begin] + bytes(moov) + data[begin:end]


@pytest.mark.parametrize(
    "data",
    [
        lambda: header_first(encoded("mp4", "aac")),
        lambda: encoded("matroska", "libopus", 48_000),
        lambda: encoded("asf", "wmav2", bit_rate=64_000),
        lambda: ID3 + encoded("wav", "pcm_s16le"),
        lambda: encoded("au", "pcm_s16be"),
        lambda: encoded("w64", "pcm_s16le"),
        lambda: encoded("wav", "pcm_s16le", options={"rf64": "always"}),
    ],
    ids=["mp4", "matroska", "asf", "wav after tags", "au", "w64", "rf64"],
)
def test_a_truncated_file_whose_header_knows_better_is_refused(data: Callable[[], bytes]) -> None:
    whole = data()
    assert len(load_audio(whole)) / SAMPLE_RATE > SECONDS - 0.1
    with pytest.raises(AudioError, match="truncated"):
        load_audio(whole[: len(whole) * 2 // 3])


FUZZED = [
    *(("webm", "libopus"), ("mp4", "aac"), ("caf", "adpcm_ima_qt"), ("wav", "adpcm_g722"), ("ogg", "flac")),
    *(("wav", "pcm_s16le"), ("mp3", "libmp3lame")),
]


@pytest.mark.parametrize(("container", "codec"), FUZZED)
def test_damaged_files_are_audio_or_an_audio_error(container: str, codec: str) -> None:
    """150 files with wrong bytes, most of them in the header: codecs that nobody knows, rates of 0, wrong lengths."""
    whole, generator = encoded(container, codec), np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(whole)
        for place in generator.integers(0, generator.choice([200, 1000, len(whole)]), generator.choice([1, 3, 30])):
            damaged[place] = generator.integers(256)
        try:
            assert np.isfinite(load_audio(bytes(damaged), longest=60.0)).all()
        except AudioError as error:
            assert "\n" not in str(error)


def joined(container: str) -> bytes:
    """Two recordings one after the other, as speech servers and recorders write them."""
    if container == "mp3":
        return encoded("mp3", "libmp3lame", bit_rate=48_000) + encoded("mp3", "libmp3lame", bit_rate=64_000)
    file = io.BytesIO()
    soundfile.write(file, sweep(16_000), 16_000, format="OGG", subtype=container)
    return file.getvalue() * 2


@pytest.mark.parametrize("container", ["mp3", "OPUS", "VORBIS"])
def test_joined_streams_are_read_to_their_end(tmp_path: Path, container: str) -> None:
    (tmp_path / "a").write_bytes(joined(container))
    seconds = len(load_audio(joined(container))) / SAMPLE_RATE
    assert abs(seconds - 2 * SECONDS) < 0.2
    compare_with_ffmpeg(f"joined {container}", tmp_path / "a", seconds)


def wav(data_size: int | None, riff_size: int | None = None) -> bytes:
    """16-bit PCM with the sizes that a program wrote which did not know them yet."""
    file = io.BytesIO()
    soundfile.write(file, sweep(16_000), 16_000, format="WAV", subtype="PCM_16")
    data = bytearray(file.getvalue())
    if data_size is not None:
        data[40:44] = struct.pack("<I", data_size)
    data[4:8] = struct.pack("<I", data_size if riff_size is None else riff_size)
    return bytes(data)


@pytest.mark.parametrize("riff", [0, 36, 0xFFFFFFFF, 2_000_000_036])
@pytest.mark.parametrize("size", [0, 10**9, 2_000_000_000, 0x7FFFFFFF - 36, 0x80000000, 0xFFFFFFFF])
def test_placeholder_sizes_of_wav_files(tmp_path: Path, size: int, riff: int) -> None:
    (tmp_path / "a.wav").write_bytes(wav(size, riff))
    assert len(load_audio(wav(size, riff))) == round(SECONDS * SAMPLE_RATE)
    compare_with_ffmpeg(f"wav data {size} riff {riff}", tmp_path / "a.wav", SECONDS)


@pytest.mark.parametrize("counted", [1, 8, 36, 44])
def test_a_wav_that_counts_its_header_as_sound_is_whole(counted: int) -> None:
    samples = len(wav(None, 0)) - 44
    assert len(load_audio(wav(samples + counted, samples + 36))) == round(SECONDS * SAMPLE_RATE)


def test_a_wav_that_was_cut_short_is_refused() -> None:
    with pytest.raises(AudioError, match="truncated"):
        load_audio(wav(None, 0)[:20_000])


def test_tags_before_a_wav_do_not_shorten_it(tmp_path: Path) -> None:
    tag = b"ID3\x04\x00\x00" + bytes([0, 0, 1, 0]) + bytes(128)
    (tmp_path / "a.wav").write_bytes(tag + wav(None, 54_436))
    assert len(load_audio(tag + wav(None, 54_436))) == len(load_audio(tmp_path / "a.wav")) == 27_200


def test_channels_of_opposite_phase_are_heard_in_every_piece(tmp_path: Path) -> None:
    stereo = sweep(16_000, 2)
    stereo[:, 1] *= -1
    soundfile.write(tmp_path / "a.flac", stereo, 16_000)
    audio = load_audio(tmp_path / "a.flac")
    np.testing.assert_allclose(audio, stereo[:, 0], atol=1e-4)
    np.testing.assert_array_equal(load_audio(tmp_path / "a.flac", start=1.0), audio[16_000:])
    np.testing.assert_allclose(load_audio(stereo, sampling_rate=16_000), stereo[:, 0], atol=1e-6)


def test_channels_that_differ_are_mixed() -> None:
    stereo = sweep(16_000, 2)
    stereo[:, 1] = 0
    np.testing.assert_allclose(load_audio(stereo, sampling_rate=16_000), stereo[:, 0] / 2, atol=1e-6)


@pytest.mark.parametrize("name", ["hello.wav", "sorry.flac", "france.opus", "dinosaur.mp3"])
def test_libsndfile_stays_the_reader_of_what_it_reads_whole(name: str) -> None:
    path = Path(__file__).parents[1] / "clips" / name
    with path.open("rb") as file:
        assert ffmpeg_container(file, path.stat().st_size) is None


@pytest.mark.parametrize("head", [b"#EXTM3U\nhttp://127.0.0.1/x", b"ffconcat version 1.0\nfile /etc/passwd\n"])
def test_playlists_are_never_opened(head: bytes) -> None:
    with pytest.raises(AudioError, match="cannot be read"):
        load_audio(head + bytes(200))
