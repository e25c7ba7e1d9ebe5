"""No recogniser and no Whisper decoder is loaded on the speech route; tested in a separate process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny_models import speech_like, tiny_blsp

from blsp.data.audio import write_wav
from blsp.distributed import find_runtime
from blsp.model.checkpoint import save_adapter

LISTEN = """
import gc, json, sys
import torch
import transformers.models.whisper.modeling_whisper as whisper

made = []
for name in ("WhisperDecoder", "WhisperModel", "WhisperForConditionalGeneration"):
    def refuse(self, *args, name=name, **kwargs):
        made.append(name)
        raise AssertionError(name)
    setattr(getattr(whisper, name), "__init__", refuse)

import blsp
listener = blsp.load(sys.argv[1])
answers = [listener.answer(sys.argv[2], "Please repeat:"), "".join(listener.stream(sys.argv[2]))]
if listener.reads_out:
    listener.transcribe(sys.argv[2])
modules = {type(each).__name__ for each in listener.model.modules()}
modules |= {type(each).__name__ for each in gc.get_objects() if isinstance(each, torch.nn.Module)}
loaded = [name for name in sys.modules if name.split(".")[0] in ("faster_whisper", "ctranslate2", "whisper", "vosk")]
print(json.dumps({"made": made, "modules": sorted(modules), "loaded": loaded, "answers": answers}))
"""


@pytest.mark.parametrize("adapter", ["conv", "grounded"])
def test_no_recogniser_is_loaded(tiny_models_folder: Path, tmp_path: Path, adapter: str) -> None:
    model, processor = tiny_blsp(tiny_models_folder, adapter=adapter, runtime=find_runtime("cpu", "float32"))
    save_adapter(model, processor, tmp_path / "adapter")
    write_wav(tmp_path / "clip.wav", speech_like(1.5))
    command = [sys.executable, "-c", LISTEN, str(tmp_path / "adapter"), str(tmp_path / "clip.wav")]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    seen = json.loads(finished.stdout.splitlines()[-1])
    assert seen["made"] == []
    assert seen["loaded"] == []
    assert "WhisperEncoder" in seen["modules"]
    assert not [name for name in seen["modules"] if name.startswith("Whisper") and "Decoder" in name]
    assert all(seen["answers"])
