"""The recogniser of the cascade: a speech recogniser that writes the transcripts for the LLM.

In:  clips and their languages; the name of a recogniser. Out: transcripts, kept in a log.
Try: `Recogniser("embedded:whisper-tiny.en:ct2", "int8").transcribe(rows, log)`
Flow: evaluation/ — recogniser → the same LLM with the same prompt (routes.py). The speech route never uses it.

faster-whisper (CTranslate2), beam 1, without timestamps. On a CPU each core has its own clip, which is faster than all
cores on one clip. A folder in transformers' format is run by transformers' own pipeline.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blsp.data.addresses import audio_size
from blsp.data.audio import SAMPLE_RATE
from blsp.data.clips import load_clip
from blsp.data.files import digest_of
from blsp.data.manifest import Utterance
from blsp.distributed import from_first
from blsp.evaluation.answers import Answer, AnswerLog, Answers, fill
from blsp.weights.embedded import PREFIX, resolve_weights

COMPUTE_TYPES = ("int8", "float32")
CLIPS_AT_A_TIME = 32  # clips whose transcripts are logged together
WINDOW_SECONDS = 30
WEIGHTS = (".bin", ".safetensors")
CPU = torch.device("cpu")

Transcribe = Callable[[np.ndarray, str | None], str]  # (16 kHz clip, ISO 639-1) -> transcript


def recogniser_of(audio_model_id: str) -> str:
    """The recogniser with the model's own speech encoder, for a fair comparison."""
    return f"{audio_model_id}:ct2" if audio_model_id.startswith(PREFIX) else audio_model_id


class RecogniserError(ValueError):
    """A recogniser that cannot be used; the message says why and which one to use."""


@dataclass(frozen=True)
class Loaded:
    """A recogniser's function. compute: the number format in use. origin: what else decides the transcripts."""

    transcribe: Transcribe
    multilingual: bool
    compute: str
    origin: dict[str, Any]


class Recogniser:
    """A loaded recogniser.

    name: an `embedded:…:ct2` name, a CTranslate2 folder, a name that faster-whisper knows (`large-v3`), or a
    folder or hub id that transformers' speech recognition pipeline loads.
    compute: of CTranslate2; `auto` measures the types and takes the faster one, which `self.compute` then names.
    device: of the LLM; CTranslate2 knows CUDA's and the CPU, which it takes instead of any other.
    mark: a digest of what decides the transcripts; those with another mark are not reused.
    """

    def __init__(self, name: str, compute: str = "int8", device: torch.device = CPU) -> None:
        folder = resolve_weights(name)
        faster = Path(folder, "model.bin").is_file() or not ("/" in folder or Path(folder).is_dir())
        loaded = (_faster if faster else _transformers)(folder, compute, device)
        self.name, self.compute, self.multilingual = name, loaded.compute, loaded.multilingual
        self.mark = digest_of({"name": name, "compute": loaded.compute, **loaded.origin})
        self._transcribe = loaded.transcribe
        self.workers = (os.cpu_count() or 1) if faster and device.type != "cuda" else 1

    def supports_language(self, language: str) -> bool:
        return self.multilingual or language == "en"

    def transcribe(self, rows: Sequence[Utterance], log: AnswerLog) -> list[str]:
        """Transcripts in the order of the rows; clips in the log are not transcribed again."""
        records = from_first(lambda: log.records)
        waiting = list({_clip_key(row): row for row in rows if _clip_key(row) not in records}.items())
        batches = [waiting[start : start + CLIPS_AT_A_TIME] for start in range(0, len(waiting), CLIPS_AT_A_TIME)]
        with ThreadPoolExecutor(self.workers) as pool:

            def transcripts(batch: Sequence[tuple[str, Utterance]]) -> Answers:
                texts = list(pool.map(self._transcribe_row, [row for _, row in batch]))
                return {key: Answer(text) for (key, _), text in zip(batch, texts, strict=True)}

            records = fill(log, batches, lambda clip: clip[0], transcripts)
        return [records[_clip_key(row)].text for row in rows]

    def transcribe_clip(self, clip: np.ndarray, language: str | None) -> str:
        """The transcript of 16 kHz samples (N,). language: None where a multilingual recogniser shall find it."""
        return self._transcribe(clip, language)

    def _transcribe_row(self, row: Utterance) -> str:
        return self._transcribe(load_clip(row), row.language or "en")


def _clip_key(row: Utterance) -> str:
    part = f"{row.start or 0}+{row.duration or ''}"
    return f"{row.audio}#{part}@{row.language or 'en'} {audio_size(row.audio)} B"


def _origin(weights: Any, device: str, *packages: str) -> dict[str, Any]:
    return {"weights": weights, "device": device, "versions": {name: version(name) for name in packages}}


def _weight_files(folder: str) -> list[str]:
    """Name, size and time of each file of weights; a file that was exchanged under its name has others."""
    files = sorted(path for path in Path(folder).iterdir() if path.suffix in WEIGHTS)
    return [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]


def _faster(folder: str, compute: str, device: torch.device) -> Loaded:
    try:
        import faster_whisper
    except ImportError as error:
        raise ImportError(
            "the cascade needs faster-whisper: pip install 'blsp[cascade]', or leave out --routes cascade"
        ) from error
    folder = folder if Path(folder).is_dir() else faster_whisper.download_model(folder)
    cores = os.cpu_count() or 1
    place: dict[str, Any] = (
        {"device": "cuda", "device_index": device.index or 0} if device.type == "cuda" else {"device": "cpu"}
    )

    def load(kind: str) -> Any:
        return faster_whisper.WhisperModel(folder, **place, compute_type=kind, cpu_threads=1, num_workers=cores)

    def transcribe(model: Any, clip: np.ndarray, language: str | None) -> str:
        segments, _ = model.transcribe(
            clip,
            language=language,
            beam_size=1,
            temperature=0.0,
            without_timestamps=True,
            condition_on_previous_text=False,
        )
        return " ".join(segment.text.strip() for segment in segments).strip()

    threads = torch.get_num_threads()
    if compute == "auto":
        compute = from_first(lambda: _faster_type(load, transcribe))  # ranks share the clips
    model = load(compute)
    torch.set_num_threads(threads)  # loading CTranslate2 changes the number of threads, which the LLM uses too
    return Loaded(
        transcribe=lambda clip, language: transcribe(model, clip, language),
        multilingual=bool(model.model.is_multilingual),
        compute=compute,
        origin=_origin(_weight_files(folder), place["device"], "faster-whisper", "ctranslate2"),
    )


def _faster_type(load: Callable[[str], Any], transcribe: Callable[[Any, np.ndarray, str | None], str]) -> str:
    """The faster of the compute types, on ten seconds of noise."""
    clip = np.random.default_rng(0).standard_normal(10 * SAMPLE_RATE).astype(np.float32) * 0.05
    seconds = {}
    for kind in COMPUTE_TYPES:
        model = load(kind)
        transcribe(model, clip, "en")  # the warm-up
        start = time.perf_counter()
        transcribe(model, clip, "en")
        seconds[kind] = time.perf_counter() - start
    return min(seconds, key=lambda kind: seconds[kind])


def _transformers(folder: str, compute: str, device: torch.device) -> Loaded:
    from transformers import pipeline

    recognise = pipeline("automatic-speech-recognition", model=folder, device=device, trust_remote_code=False)
    # For a folder without a tokenizer, transformers makes an almost empty one, which gives no text.
    if len(recognise.tokenizer) < recognise.model.config.vocab_size // 2:
        raise RecogniserError(f"{folder}: has no tokenizer, so it cannot write text; name another with --asr")
    is_whisper = recognise.model.config.model_type == "whisper"
    multilingual = is_whisper and bool(getattr(recognise.model.generation_config, "is_multilingual", False))

    def transcribe_clip(clip: np.ndarray, language: str | None) -> str:
        audio = {"raw": clip, "sampling_rate": SAMPLE_RATE}
        if not is_whisper:
            return str(recognise(audio, chunk_length_s=WINDOW_SECONDS)["text"]).strip()
        options: dict[str, Any] = {"num_beams": 1}
        if multilingual:
            options |= {"language": language, "task": "transcribe"}
        windows = len(clip) > WINDOW_SECONDS * SAMPLE_RATE  # Whisper needs timestamps to find the next window
        return str(recognise(audio, return_timestamps=windows, generate_kwargs=options)["text"]).strip()

    weights = _weight_files(folder) if Path(folder).is_dir() else recognise.model.config._commit_hash
    compute = str(recognise.model.dtype).removeprefix("torch.")
    return Loaded(transcribe_clip, multilingual, compute, _origin(weights, device.type, "transformers", "torch"))
