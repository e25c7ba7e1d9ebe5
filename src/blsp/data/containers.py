"""Container formats: which decoder reads a recording to its true end, and whether the file ends too early.

In:  an open file and its size in bytes.
Out: `ffmpeg_container(file, size)`: FFmpeg's name of the container, or None if libsndfile reads the whole file;
     `FfmpegStream`: FFmpeg (PyAV) with the reading methods of `soundfile.SoundFile`; `missing_bytes(file, size)`.
Try: ``FfmpegStream("memo.m4a", "mov").read(16000)``      # (16000, C) float32
Flow: data/audio.py opens a file -> **containers.py** chooses the decoder -> blocks of samples

libsndfile does not know m4a, webm, aac, amr and wma, and some codecs in wav, caf and Ogg files. It trusts the length in
an mp3's Info frame, even if it is wrong, and guesses the length if there is no such frame (FFmpeg writes none into a
pipe, as on Common Voice's server). It stops after the first stream of a chained Ogg file (RFC 3533) and of joined mp3s.
And it trusts the sizes in a wav header that was written before the recording was finished. FFmpeg decodes all of these
to their end. The container is chosen here by the file's first bytes. FFmpeg never guesses it, so that it cannot open a
playlist or a device.

Shapes: n samples of a block, C channels.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO

import av
import numpy as np
import soundfile

UNKNOWN_LENGTH = 1 << 62  # frames: libsndfile's value for a length that is known only after decoding
WAV_HEADER = 44  # bytes of the shortest one
STREAMED_WAV = 0x7FFF0000  # libsndfile ignores data lengths from here on and reads to the file's end
SCANNED_OGG = 1 << 23  # all pages of an Ogg file up to this size are read; of a larger one, only the ends
OGG_PAGE = 27 + 255 + 255 * 255  # bytes of the largest page (RFC 3533)
PLACEHOLDER_WAV = 10**9  # data lengths from here on are values that programs write before they know the length
MP3_SEARCH = 1 << 16  # bytes after the tags in which the first mp3 frame must begin
MP3_FRAMES = 4  # a file that begins with other bytes is an mp3 if it has this many frames in a row
SCANNED_MP3 = 1 << 20  # bytes of an mp3 in which frames are counted
MP3_SLACK = 0.1  # largest relative difference between a longer file's frame count and the estimate from its beginning
TRAILING_TAGS = 160  # bytes of ID3v1 and padding that may follow the last mp3 frame
READABLE = {  # containers as libsndfile and FFmpeg name them
    *("WAV", "WAVEX", "RF64", "W64", "FLAC", "OGG", "MP3", "MPEG", "AIFF", "AU", "CAF", "NIST"),
    *("MOV", "MATROSKA", "AMR", "ASF", "AAC"),
}
AUDIO_SUFFIXES = {  # of files that count as recordings, in lower case
    *(".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au", ".sph", ".caf", ".w64"),
    *(".m4a", ".mp4", ".webm", ".aac", ".amr", ".3gp", ".wma", ".m4b", ".mov", ".mka", ".mkv", ".3g2", ".awb"),
    *(".spx", ".mp2", ".wave", ".rf64", ".aifc", ".snd"),
}
UNREAD_SUFFIXES = {  # of recordings in formats that are not supported
    *(".ac3", ".eac3", ".ape", ".avi", ".dsf", ".dts", ".flv", ".gsm", ".mpc", ".ra", ".rm", ".ts", ".tta", ".wv")
}
END_SLACK = 0.25  # seconds by which the last packet may end before the length in the header
MOST_BAD_PACKETS = 0.1  # a file is damaged if a larger share of its packets cannot be decoded
ASF = bytes.fromhex("3026b2758e66cf11")
ASF_FILE = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")  # the part of the header with the file's size
MAGICS = (  # bytes, their offset, and FFmpeg's name of the container
    *((name, 4, "mov") for name in (b"ftyp", b"moov", b"mdat", b"wide", b"free")),
    *((b"\x1aE\xdf\xa3", 0, "matroska"), (b"#!AMR", 0, "amr"), (ASF, 0, "asf")),
    *((b"\xff\xf1", 0, "aac"), (b"\xff\xf9", 0, "aac")),  # ADTS: the layer bits are zero
)
SNDFILE_MAGICS = (b"fLaC", b"FORM", b".snd", b"RF64", b"riff", b"NIST")  # of files that libsndfile reads
WAV_CODECS = (1, 2, 3, 6, 7, 0x11, 0x31, 0xFFFE)  # that libsndfile reads: PCM, ADPCM, float, A-law, mu-law, IMA, GSM
CAF_CODECS = (b"lpcm", b"alaw", b"ulaw")
MP3_KILOBITS = {  # bit rates of layer III: MPEG-1 (ISO 11172-3, 2.4.2.3) and MPEG-2 (ISO 13818-3, 2.4.2.3)
    True: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    False: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


def ffmpeg_container(raw: BinaryIO, size: int) -> str | None:
    """FFmpeg's name of the container of a file of `size` bytes, or None if libsndfile is the better decoder."""
    begin = skip_id3(raw)
    raw.seek(begin)
    head = raw.read(36)
    for magic, offset, container in MAGICS:
        if head[offset:].startswith(magic):
            return container
    if head[:4] == b"RIFF":
        if head[8:12] != b"WAVE":
            return None
        return "wav" if _has_placeholder_size(raw, size) or _wav_codec(raw, size) not in WAV_CODECS else None
    if head[:4] == b"OggS":
        known = head[28:].startswith((b"\x01vorbis", b"OpusHead"))  # not FLAC, Speex
        return "ogg" if not known or _is_chained(raw, size) else None
    if head[:4] == b"caff":
        return None if head[28:32] in CAF_CODECS else "caf"
    return None if head[:4] in SNDFILE_MAGICS else _mp3_without_true_length(raw, size, begin)


def skip_id3(raw: BinaryIO) -> int:
    """Number of bytes of the ID3v2 tags at the start of a file (their size field uses seven bits of each byte)."""
    skipped = 0
    while True:
        raw.seek(skipped)
        head = raw.read(10)
        if len(head) < 10 or head[:3] != b"ID3":
            return skipped
        size = 0
        for byte in head[6:10]:
            size = size << 7 | byte & 0x7F
        skipped += 10 + size + (10 if head[5] & 0x10 else 0)


def without_id3(raw: BinaryIO, size: int) -> tuple[BinaryIO | None, int]:
    """A wav file without the tags before it, and its size; None if there are no tags.

    With the tags, libsndfile would stop too early by their length, and FFmpeg would not read the file.
    """
    begin = skip_id3(raw)
    raw.seek(begin)
    if not begin or raw.read(4) != b"RIFF":
        return None, size
    raw.seek(begin)
    return io.BytesIO(raw.read()), size - begin


def _has_placeholder_size(raw: BinaryIO, size: int) -> bool:
    """Whether a wav's data length was written before the length of the recording was known."""
    begin, length = _wav_chunk(raw, size, b"data")
    return length is not None and begin < size and (length == 0 or PLACEHOLDER_WAV <= length < STREAMED_WAV)


def _wav_codec(raw: BinaryIO, size: int) -> int:
    """The number of a wav's codec (WAVE_FORMAT_...)."""
    begin, length = _wav_chunk(raw, size, b"fmt ")
    raw.seek(begin)
    return int.from_bytes(raw.read(2), "little") if length else 1


def _wav_chunk(raw: BinaryIO, size: int, wanted: bytes) -> tuple[int, int | None]:
    """First byte and length (from its header) of a wav's chunk; if there is none, the end of all chunks and None."""
    chunk = 12  # after RIFF, length, WAVE
    while chunk + 8 <= size:
        raw.seek(chunk)
        tag, length = struct.unpack("<4sI", raw.read(8))
        if tag == wanted:
            return chunk + 8, length
        chunk += 8 + length + length % 2  # chunks begin at even bytes
    return chunk, None


def _is_chained(raw: BinaryIO, size: int) -> bool:
    """Whether an Ogg file holds several streams, one after another (or side by side)."""
    raw.seek(0)
    data = raw.read(min(size, SCANNED_OGG))
    if size > SCANNED_OGG:  # is the serial number of the last page that of another stream?
        raw.seek(size - OGG_PAGE)
        tail = raw.read()
        last = tail.rfind(b"OggS")
        return last >= 0 and tail[last + 14 : last + 18] != data[14:18]
    begun, page = 0, data.find(b"OggS")
    while page >= 0 and page + 27 <= len(data):
        begun += data[page + 5] >> 1 & 1  # flag 2: a stream begins with this page
        table_end = page + 27 + data[page + 26]
        page = data.find(b"OggS", table_end + sum(data[page + 27 : table_end]))
    return begun > 1


def _mp3_without_true_length(raw: BinaryIO, size: int, begin: int) -> str | None:
    """FFmpeg's name of mp3 if the first frame does not give the true length of the file; None for all other files."""
    raw.seek(begin)
    data = raw.read(SCANNED_MP3)
    starts = begin > 0 or (data[:1] == b"\xff" and data[1:2] >= b"\xe0")
    wanted = 2 if starts else MP3_FRAMES
    search = range(min(len(data), MP3_SEARCH) - 4)
    at = next((i for i in search if data[i] == 0xFF and _is_mp3(data, i, wanted)), None)
    if at is None:
        return None
    # Layout of the first frame: 4 bytes header, 9 to 32 bytes side information, then "Xing" or "Info", flags,
    # the number of the other frames, and the number of bytes from this frame to the end.
    mpeg1, mono = data[at + 1] & 0x08, data[at + 3] >> 6 == 3
    side = (17 if mono else 32) if mpeg1 else (9 if mono else 17)
    info = data[at + 4 + side : at + 4 + side + 16]
    if not starts or info[:4] not in (b"Xing", b"Info") or len(info) < 16 or info[7] & 3 != 3:
        return "mp3"
    frames, length = struct.unpack(">II", info[8:16])
    if size - begin - at - length > TRAILING_TAGS:
        return "mp3"
    first = at + _mp3_frame_bytes(data[at : at + 4])
    counted, end = _mp3_frames(data, first)
    if begin + len(data) < size:  # a long file: estimate from its beginning
        is_wrong = abs(counted * (at + length - first) - frames * (end - first)) > MP3_SLACK * frames * (end - first)
    else:
        is_wrong = counted != frames and end >= at + length
    return "mp3" if is_wrong else None  # None also for a truncated file, which audio.py finds by its length


def _is_mp3(data: bytes, at: int, frames: int) -> bool:
    """Whether `frames` frames of layer III follow each other from `at` on (fewer are enough at the end of the file)."""
    count, end = _mp3_frames(data, at, frames)
    return count == frames or (count > 0 and end > len(data) - 4)


def _mp3_frames(data: bytes, at: int, most: int = 1 << 30) -> tuple[int, int]:
    """How many frames follow each other from `at` on (at most `most`), and where the last one ends."""
    count = 0
    while count < most and (length := _mp3_frame_bytes(data[at : at + 4])):
        count, at = count + 1, at + length
    return count, at


def _mp3_frame_bytes(header: bytes) -> int:
    """Length of the layer III frame with this header of four bytes; 0 if it is not a header."""
    if len(header) < 4 or header[0] != 0xFF or header[1] >> 5 != 7 or header[1] >> 1 & 3 != 1:
        return 0  # sync word, layer
    version, bitrate, rate = header[1] >> 3 & 3, header[2] >> 4, header[2] >> 2 & 3
    if version == 1 or bitrate in (0, 15) or rate == 3:
        return 0
    samples_per_second = (44_100, 48_000, 32_000)[rate] >> (0 if version == 3 else 1 if version == 2 else 2)
    kilobits = MP3_KILOBITS[version == 3][bitrate]
    return (144_000 if version == 3 else 72_000) * kilobits // samples_per_second + (header[2] >> 1 & 1)


def missing_bytes(file: BinaryIO, size: int) -> int:
    """Bytes that are missing at the end of a wav, w64, au, aiff, ogg or wma file; 0 if it is complete."""
    file.seek(0)
    head = file.read(36).ljust(36, b"\0")
    if head[:4] == b".snd":
        begin, length = struct.unpack(">II", head[4:12])
        return 0 if length == 0xFFFFFFFF else max(0, begin + length - size)
    if head[:4] == b"RF64" and head[12:16] == b"ds64":  # after it: length of the part, of the file, of the sound
        begin, _ = _wav_chunk(file, size, b"data")
        return _known(begin + int.from_bytes(head[28:36], "little") - size)
    if head[:4] == b"riff":  # w64: 16 bytes of name, 8 of length
        return _known(int.from_bytes(head[16:24], "little") - size)
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
        begin, length = _wav_chunk(file, size, b"data")
        unknown = length is not None and length >= PLACEHOLDER_WAV
        missing = begin + (length or 0) - size
        return 0 if unknown or missing <= WAV_HEADER else missing  # some writers count the header as sound
    if head[:4] == b"FORM":
        return max(0, struct.unpack(">I", head[4:8])[0] + 8 - size)
    if head[:8] == ASF:
        file.seek(0)
        header = file.read(MP3_SEARCH)
        at = header.find(ASF_FILE) + 40  # after 16 bytes of name, 8 of length, 16 of the file's own name
        return max(0, int.from_bytes(header[at : at + 8], "little") - size) if at >= 40 else 0
    return max(0, _missing_ogg_bytes(file, size)) if head[:4] == b"OggS" else 0


def _known(missing: int) -> int:
    """The missing bytes; 0 if the 64-bit length was written before the true length was known."""
    return missing if 0 < missing < UNKNOWN_LENGTH else 0


def _missing_ogg_bytes(file: BinaryIO, size: int) -> int:
    """Bytes of the last page that are missing (RFC 3533: 27 bytes, segment table, segments)."""
    file.seek(max(0, size - OGG_PAGE))
    tail = file.read()
    page = tail.rfind(b"OggS")
    if page < 0:
        return 0  # something else follows the last page
    end = page + 27
    if len(tail) >= end:
        end += tail[end - 1]  # the header's last byte: how many segments the table lists
        if len(tail) >= end:
            end += sum(tail[page + 27 : end])  # the table: the segments' lengths
    return end - len(tail)


class FfmpegStream:
    """A recording decoded by FFmpeg, read forward like a `soundfile.SoundFile`.

    samplerate, channels: of the first audio stream. frames: always `UNKNOWN_LENGTH`, since only decoding shows the
    length. Raises ValueError if the file has no audio or cannot be decoded.
    """

    def __init__(self, source: str | BinaryIO, container: str) -> None:
        try:
            self._container: Any = av.open(source, format=container)
        except (av.error.FFmpegError, OSError) as error:
            raise ValueError(f"FFmpeg: {error.strerror or error}") from error
        streams = self._container.streams.audio
        codec = streams[0].codec_context if streams else None
        if codec is None or not codec.sample_rate or not codec.channels:
            self._container.close()
            raise ValueError("FFmpeg: the codec of its sound is not known" if streams else "it holds no sound")
        self.format, self.frames = container.upper(), UNKNOWN_LENGTH
        self.samplerate, self.channels = codec.sample_rate, codec.channels
        self._blocks = self._decode()
        self._rest = np.zeros((0, self.channels), dtype=np.float32)

    def _decode(self) -> Iterator[np.ndarray]:
        """Blocks (n, C) float32, with the rate and channels of the first one even if a chained stream has others."""
        resampler = av.AudioResampler(
            format="fltp", layout=self._container.streams.audio[0].layout, rate=self.samplerate
        )
        bad = total = 0
        last = 0.0  # seconds at which the last packet ends
        try:
            for packet in self._container.demux(audio=0):
                total += 1
                if packet.pts is not None:
                    last = max(last, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                try:
                    frames = packet.decode()
                except av.error.InvalidDataError:  # for example a tag between two joined recordings
                    bad += 1
                    continue
                for frame in frames:
                    frame.pts = None
                    yield from (block.to_ndarray().T for block in resampler.resample(frame))
            yield from (block.to_ndarray().T for block in resampler.resample(None))
        except (av.error.FFmpegError, ZeroDivisionError) as error:  # a frame may have no rate
            raise ValueError(f"FFmpeg: {getattr(error, 'strerror', error)}") from error
        if bad > MOST_BAD_PACKETS * total:
            raise ValueError(f"FFmpeg: {bad} of {total} packets cannot be decoded")
        if (promised := self._promised()) > last + END_SLACK:
            raise ValueError(f"its header promises {promised:.3f} s but it ends at {last:.3f} s")

    def _promised(self) -> float:
        """Seconds according to the header of an mp4 or webm file; 0 if it gives no length."""
        if self.format not in ("MOV", "MATROSKA"):
            return 0.0
        audio = self._container.streams.audio[0]
        if audio.duration is not None:
            return float(audio.duration * audio.time_base)
        is_alone = len(self._container.streams) == 1  # a video may be longer than its sound
        return (self._container.duration or 0) / 1e6 if is_alone else 0.0

    def read(self, frames: int, dtype: str = "float32", always_2d: bool = True) -> np.ndarray:
        """At most the next `frames` frames (n, C); none at the end."""
        pieces, count = [self._rest], len(self._rest)
        while count < frames and (block := next(self._blocks, None)) is not None:
            pieces.append(block)
            count += len(block)
        joined = np.concatenate(pieces)
        self._rest = joined[frames:]
        return joined[:frames]

    def close(self) -> None:
        self._container.close()

    def __enter__(self) -> FfmpegStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SndfileStream(soundfile.SoundFile):
    """A file that is only read forward: soundfile seeks after each read of a "seekable" file, which breaks mp3 and
    streamed FLAC."""

    def seekable(self) -> bool:
        return False


AudioStream = SndfileStream | FfmpegStream
