"""Read the sound files of the packages: the adventure games' containers and the telephone prompts' codec.

In: a path inside an unpacked package. Out: encoded bytes or 16 kHz mono float32 samples.
Where in the flow: below `fetch.py`, which names the files and pairs them with their transcripts.

Try: `list(read_queen(Path(".../queen.1c")))[:3]` gives [("010001J1.SB", b"\\xff\\xf3..."), ...] of MP3 clips.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
import soxr

from blsp.data.files import write_atomically

RATE = 16_000
DRASCULA_RATE = 11_025
_QUEEN_ENTRY = struct.Struct(">12sBII")  # name, bundle, offset, size


def read_queen(path: Path) -> Iterator[tuple[str, bytes]]:
    """The speech entries (`*.SB`, plain MP3) of Flight of the Amazon Queen's `queen.1c`."""
    with path.open("rb") as file:
        header = file.read(13)  # "QTBL", version (6), skipped (2), compression (1)
        if header[:4] != b"QTBL" or header[12] != 1:
            raise ValueError(f"{path}: not the MP3-compressed speech version of queen.1c (header {header!r})")
        (count,) = struct.unpack(">H", file.read(2))
        table = file.read(count * _QUEEN_ENTRY.size)
        for raw_name, _bundle, offset, size in _QUEEN_ENTRY.iter_unpack(table):
            name = raw_name.rstrip(b"\0 ").decode("ascii")
            if name.endswith(".SB"):
                file.seek(offset)
                yield name, file.read(size)


def decode(data: bytes | Path) -> np.ndarray:
    """Any format libsndfile reads -> (N,) float32 mono at 16 kHz."""
    samples, rate = soundfile.read(io.BytesIO(data) if isinstance(data, bytes) else data, dtype="float32")
    return to_rate(samples, rate)


def read_als(path: Path) -> np.ndarray:
    """Drascula's speech: headerless unsigned 8-bit mono PCM at 11,025 Hz."""
    samples = (np.frombuffer(path.read_bytes(), np.uint8).astype(np.float32) - 128) / 128
    return to_rate(samples, DRASCULA_RATE)


def read_g722(path: Path) -> np.ndarray:
    """Asterisk's wide-band prompts: raw G.722, 16 kHz (libsndfile does not know the codec, FFmpeg does)."""
    import av

    with av.open(str(path), format="g722") as container:
        frames = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
    return np.concatenate(frames).astype(np.float32) / 32768


def to_rate(samples: np.ndarray, rate: int) -> np.ndarray:
    """(N,) or (N, channels) at `rate` -> (M,) float32 mono at 16 kHz."""
    mono = samples.mean(axis=1) if samples.ndim == 2 else samples
    return np.asarray(soxr.resample(mono, rate, RATE) if rate != RATE else mono, dtype=np.float32)


def write_flac(path: Path, samples: np.ndarray) -> None:
    """(N,) float32 -> 16-bit FLAC at 16 kHz, under a temporary name first: a file that exists is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as partial:
        soundfile.write(partial, np.clip(samples, -1, 1), RATE, format="FLAC", subtype="PCM_16")
