"""`blsp encode`: the frozen encoder's output for every clip of a manifest, once.

In:  a manifest (or a continuations file), an encoder, a folder.
Out: the folder's features (feature_cache.py); what could not be heard in `DIR/<manifest>.skipped.jsonl`.
Try: `blsp encode --manifest train.jsonl --audio-model embedded:whisper-tiny.en --cache features/`
Flow: manifest → continuations → **speech features** → alignment training.

Run it again and it does what is missing: after a kill, when rows were added, when an entry was damaged.
Several processes (torchrun) share the rows; each writes shards of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from blsp.data.manifest import CONTINUATION_KEY, Manifest, SkippedLog, Utterance
from blsp.model.checkpoint import load_speech_encoder
from blsp.model.digest import tensor_digest
from blsp.model.distributed import Place, barrier, find_place, leave, sum_across
from blsp.model.encoding import Tally, encode_manifest
from blsp.model.feature_cache import FeatureCache, FeaturesError
from blsp.model.modeling_blsp import BlspForConditionalGeneration
from blsp.model.processing_blsp import BlspProcessor
from blsp.model.speech_encoder import FEATURES_VERSION
from blsp.settings import EncodeSettings

__all__ = ["FeatureCache", "FeaturesError", "encode", "encode_manifest", "encoder_id", "open_features"]


def encoder_id(audio_model: str, *, full_window: bool = False) -> str:
    """What features depend on: the encoder's tensors, how clips are padded, how mels are made."""
    return _identity(tensor_digest(audio_model), full_window)


def _identity(audio_model_sha256: str, full_window: bool) -> str:
    return f"{audio_model_sha256}:{'30s' if full_window else 'true-length'}:{FEATURES_VERSION}"


def encode(settings: EncodeSettings) -> None:
    """The command: encode what the cache lacks, and say what became of the rows."""
    place = find_place(settings.device, settings.dtype)
    rows: Sequence[Utterance] = Manifest(settings.manifest, CONTINUATION_KEY)
    rows = rows if settings.limit is None else rows[: settings.limit]
    tower, extractor = load_speech_encoder(settings.audio_model, place)
    name = encoder_id(settings.audio_model, full_window=settings.pad_to_30s)
    cache = _open_cache(settings.cache, name, place)
    manifest = re.sub(r"[^\w.-]", "_", Path(settings.manifest).name.removesuffix(".jsonl"))
    with _new_log(settings.cache / manifest, place) as skipped:
        tally = encode_manifest(
            cache,
            rows,
            tower,
            extractor,
            place,
            skipped,
            full_window=settings.pad_to_30s,
            batch_seconds=settings.batch_seconds,
        )
    cache = _open_cache(settings.cache, name, place)  # the index is merged here, so training starts at once
    _report(tally, skipped, place, len(cache))
    leave(place)


def open_features(
    folder: Path,
    model: BlspForConditionalGeneration,
    processor: BlspProcessor,
    sources: Sequence[Sequence[Utterance]],
    place: Place,
) -> FeatureCache:
    """The cache for a model's encoder, after encoding what the rows of `sources` lack in it."""
    full_window = model.config.full_window
    name = _identity(model.config.audio_model_sha256, full_window)
    cache = _open_cache(folder, name, place)
    with _new_log(folder / "training", place) as skipped:
        for rows in sources:
            encode_manifest(
                cache,
                rows,
                model.model.audio_tower,
                processor.feature_extractor,
                place,
                skipped,
                full_window=full_window,
            )
    return _open_cache(folder, name, place)


def _open_cache(folder: Path, name: str, place: Place) -> FeatureCache:
    """One rank checks the shards and merges their index; the others find it done."""
    barrier(place)
    if place.rank == 0:
        FeatureCache(folder, name)
    barrier(place)
    return FeatureCache(folder, name)


def _new_log(path: Path, place: Place) -> SkippedLog:
    """Every run looks at every row, so the list is that of this run."""
    log = f"{path}.rank{place.rank}" if place.world > 1 else str(path)
    Path(f"{log}.skipped.jsonl").unlink(missing_ok=True)
    return SkippedLog(log)


def _report(tally: Tally, skipped: SkippedLog, place: Place, clips: int) -> None:
    counts = torch.tensor([tally.encoded, tally.cached, tally.skipped, tally.seconds], dtype=torch.float64)
    encoded, cached, left_out, seconds = sum_across(counts, place).tolist()
    if place.rank != 0:
        return
    speed = f" at {seconds / tally.wall:.0f} × real time" if encoded else ""
    print(f"encoded {encoded:.0f} clips, {seconds / 3600:.2f} h of speech{speed}")
    print(f"{cached:.0f} rows needed nothing; the cache holds {clips} clips of this encoder")
    if left_out:
        where = f"{skipped.path} and the other ranks' beside it" if place.world > 1 else str(skipped.path)
        print(f"skipped {left_out:.0f} rows, listed with the reason in {where}")
