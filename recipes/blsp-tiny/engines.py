"""Speech synthesis behind one shape: a chunk of lines in, (line, 16 kHz samples) out.

In: `Line`s of one engine. Out: float32 samples as the voice made them. Random noise inside the neural
voices is seeded by the chunk, so a chunk is always made whole.
Where in the flow: called by `synthesise.py` in worker processes. Voices come from packages (`voices.py`);
espeak-ng (pronunciation) and flite are run as programs. Nothing here is a dependency of the blsp package.

Try: `next(speak_flite([plan("flite", 0)[0]], Path("/tmp/corpus")))`
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import soundfile
from containers import to_rate
from lines import CULTURES, Line
from rows import fraction
from voices import kokoro_folder, kokoro_style, piper_folder

Spoken = Iterator[tuple[Line, np.ndarray]]
PIPER_RATE = 22_050
KOKORO_RATE = 24_000
PICO_RATE = 16_000
KOKORO_LONGEST = 509  # phonemes; the style table has a row for each length
PAUSE_MARKS = re.compile(r"\s*([,.;:!?]+)(?=\s|$)\s*")


class VoiceError(RuntimeError):
    """A synthesis program is missing or failed."""


def speak_flite(lines: list[Line], root: Path) -> Spoken:
    """Pitch and formants move together by resampling; flite's duration makes up for the change of length."""
    with tempfile.TemporaryDirectory() as folder:
        wav = Path(folder) / "line.wav"
        for line in lines:
            stretch = f"duration_stretch={line.pitch / line.tempo:.3f}"
            _run(["flite", "-voice", line.voice, "--setf", stretch, "-t", line.text, "-o", str(wav)], "flite")
            samples, rate = soundfile.read(wav, dtype="float32")
            yield line, to_rate(samples, round(rate * line.pitch))


def speak_piper(lines: list[Line], root: Path) -> Spoken:
    """The VITS voice "joe": phonemes with a pad between; noise and rhythm vary a little from line to line."""
    folder = piper_folder(root)
    table = json.loads((folder / "en_US-joe-medium.onnx.json").read_text())["phoneme_id_map"]
    session = _session(folder / "en_US-joe-medium.onnx", lines[0].id)
    for line in lines:
        known = [table[p][0] for p in phonemes(line.text, "en-us") if p in table]
        ids = [table["^"][0], 0, *(i for p in known for i in (p, 0)), table["$"][0]]
        scales = [0.5 + 0.3 * fraction("noise", line.id), 1 / line.tempo, 0.6 + 0.4 * fraction("rhythm", line.id)]
        inputs = {
            "input": np.array([ids], np.int64),
            "input_lengths": np.array([len(ids)], np.int64),
            "scales": np.array(scales, np.float32),
        }
        samples = session.run(None, inputs)[0].reshape(-1)
        yield line, to_rate(0.9 * samples / max(1.0, float(np.abs(samples).max())), PIPER_RATE)


def speak_kokoro(lines: list[Line], root: Path) -> Spoken:
    """Kokoro-82M, int8; a voice is a name or the mean of two ("af_heart+bm_lewis")."""
    folder = kokoro_folder(root)
    table = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))["vocab"]
    session = _session(folder / "kokoro.onnx", lines[0].id)
    for line in lines:
        if line.language == "en":
            spoken = kokoro_spelling(phonemes(line.text, "en-gb" if line.voice[0] == "b" else "en-us"))
        else:
            spoken = phonemes(line.text, line.language)
        ids = [table[p] for p in spoken if p in table][:KOKORO_LONGEST]
        inputs = {
            "tokens": np.array([[0, *ids, 0]], np.int64),
            "style": kokoro_style(folder, line.voice)[len(ids)].reshape(1, -1),
            "speed": np.array([line.tempo], np.float32),
        }
        yield line, to_rate(session.run(None, inputs)[0].reshape(-1), KOKORO_RATE)


def speak_pico(lines: list[Line], root: Path) -> Spoken:
    """SVOX Pico: one voice a language. Pitch and formants move together by resampling, as with flite."""
    try:
        from ttspico import TtsEngine
    except ImportError:
        raise VoiceError("ttspico is not installed: pip install ttspico==0.3.2") from None
    engines = {language: TtsEngine(culture) for language, culture in CULTURES.items()}
    for line in lines:
        engine = engines[line.language]
        engine.rate = round(100 * line.tempo / line.pitch)  # per cent of the voice's own
        samples = np.frombuffer(engine.speak(line.text), np.int16).astype(np.float32) / 32768
        yield line, to_rate(samples, round(PICO_RATE * line.pitch))


def phonemes(text: str, language: str) -> str:
    """espeak-ng's IPA with the marks that pause kept; "Hello, you." -> "həlˈoʊ, jˈuː." """
    pieces = PAUSE_MARKS.split(text)
    spoken = []
    for words, mark in zip(pieces[::2], [*pieces[1::2], ""], strict=True):
        if words.strip():
            ipa = " ".join(_run(["espeak-ng", "-q", "--ipa", "-v", language, "--", words], "espeak-ng").split())
            spoken.append(ipa + mark[:1])
    return " ".join(spoken)


def kokoro_spelling(ipa: str) -> str:
    """espeak-ng's IPA in the letters that Kokoro was trained on."""
    for old, new in (("ʲ", "j"), ("r", "ɹ"), ("x", "k"), ("ɬ", "l")):
        ipa = ipa.replace(old, new)
    return re.sub(r" z(?=[;:,.!? ]|$)", "z", ipa)


def _session(path: Path, seed: str):
    import onnxruntime

    onnxruntime.set_seed(int(2**31 * fraction("onnx", seed)))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # one process a core is faster than threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _run(command: list[str], package: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise VoiceError(f"{command[0]} is not installed: apt-get install {package}") from None
    if done.returncode != 0:
        raise VoiceError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
    return done.stdout


SPEAK: dict[str, Callable[[list[Line], Path], Spoken]] = {
    "flite": speak_flite,
    "words": speak_flite,
    "quiz": speak_flite,
    "piper": speak_piper,
    "kokoro": speak_kokoro,
    "kokoro_quiz": speak_kokoro,
    "kokoro_romance": speak_kokoro,
    "pico": speak_pico,
}
VOICES: dict[str, Callable[[Path], Path]] = {
    "piper": piper_folder,
    "kokoro": kokoro_folder,
    "kokoro_quiz": kokoro_folder,
    "kokoro_romance": kokoro_folder,
}


def fetch_voices(engine: str, root: Path) -> None:
    """Fetch what `engine` speaks with, once, before the workers ask for it all at the same time."""
    if engine in VOICES:
        VOICES[engine](root)
