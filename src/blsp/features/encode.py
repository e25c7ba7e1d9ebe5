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
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from blsp.data.audio import AudioError, load_audio
from blsp.data.jobs import SkippedLog
from blsp.data.manifest import CONTINUATION_KEY, Manifest, Utterance
from blsp.distributed import Runtime, barrier, find_runtime, leave, shard_rows, sum_across
from blsp.features.cache import FeatureCache, FeaturesError, ShardWriter
from blsp.model.loading import load_speech_encoder
from blsp.model.modeling_blsp import BlspForConditionalGeneration
from blsp.model.processing_blsp import BlspProcessor
from blsp.model.speech_encoder import FEATURES_VERSION, WINDOW_MEL_FRAMES, encode_speech, mel_features
from blsp.settings import EncodeSettings
from blsp.weights.digest import find_weights

__all__ = ["FeatureCache", "FeaturesError", "encode", "encode_manifest", "encoder_id", "open_features"]


def encoder_id(audio_model_sha256: str, *, full_window: bool = False) -> str:
    """What features depend on: the encoder's tensors, how clips are padded, how mels are made."""
    return f"{audio_model_sha256}:{'30s' if full_window else 'true-length'}:{FEATURES_VERSION}"


def encode(settings: EncodeSettings) -> None:
    """The command: encode what the cache lacks, and say what became of the rows."""
    runtime = find_runtime(settings.device, settings.dtype)
    rows: Sequence[Utterance] = Manifest(settings.manifest, CONTINUATION_KEY)
    rows = rows if settings.limit is None else rows[: settings.limit]
    weights = find_weights(settings.audio_model)
    tower, extractor = load_speech_encoder(weights, runtime)
    name = encoder_id(weights.sha256, full_window=settings.pad_to_30s)
    cache = _open_cache(settings.cache, name, runtime)
    manifest = re.sub(r"[^\w.-]", "_", Path(settings.manifest).name.removesuffix(".jsonl"))
    with _new_log(settings.cache / manifest, runtime) as skipped:
        tally = encode_manifest(
            cache,
            rows,
            tower,
            extractor,
            runtime,
            skipped,
            full_window=settings.pad_to_30s,
            batch_seconds=settings.batch_seconds,
        )
    cache = _open_cache(settings.cache, name, runtime)  # the index is merged here, so training starts at once
    _report(tally, skipped, runtime, len(cache))
    leave(runtime)


def open_features(
    folder: Path,
    model: BlspForConditionalGeneration,
    processor: BlspProcessor,
    sources: Sequence[Sequence[Utterance]],
    runtime: Runtime,
) -> FeatureCache:
    """The cache for a model's encoder, after encoding what the rows of `sources` lack in it."""
    full_window = model.config.full_window
    name = encoder_id(str(model.config.audio_model_sha256), full_window=full_window)
    cache = _open_cache(folder, name, runtime)
    with _new_log(folder / "training", runtime) as skipped:
        for rows in sources:
            encode_manifest(
                cache,
                rows,
                model.model.audio_tower,
                processor.feature_extractor,
                runtime,
                skipped,
                full_window=full_window,
            )
    return _open_cache(folder, name, runtime)


def _open_cache(folder: Path, name: str, runtime: Runtime) -> FeatureCache:
    """One rank checks the shards and merges their index; the others find it done."""
    barrier(runtime)
    if runtime.rank == 0:
        FeatureCache(folder, name)
    barrier(runtime)
    return FeatureCache(folder, name)


def _new_log(path: Path, runtime: Runtime) -> SkippedLog:
    """Every run looks at every row, so the list is that of this run."""
    log = f"{path}.rank{runtime.rank}" if runtime.world > 1 else str(path)
    Path(f"{log}.skipped.jsonl").unlink(missing_ok=True)
    return SkippedLog(log)


def _report(tally: Tally, skipped: SkippedLog, runtime: Runtime, clips: int) -> None:
    counts = torch.tensor([tally.encoded, tally.cached, tally.skipped, tally.seconds], dtype=torch.float64)
    encoded, cached, left_out, seconds = sum_across(counts, runtime).tolist()
    if runtime.rank != 0:
        return
    speed = f" at {seconds / tally.wall:.0f} × real time" if encoded else ""
    print(f"encoded {encoded:.0f} clips, {seconds / 3600:.2f} h of speech{speed}")
    print(f"{cached:.0f} rows needed nothing; the cache holds {clips} clips of this encoder")
    if left_out:
        where = f"{skipped.path} and the other ranks' beside it" if runtime.world > 1 else str(skipped.path)
        print(f"skipped {left_out:.0f} rows, listed with the reason in {where}")


MEL_PER_SECOND = 100
READERS = 4  # threads that read, decode and make mels
AHEAD = 64  # clips that are read ahead
SORTED_SECONDS = 600.0  # an accelerator's batches are sorted by length within so much speech
BLOCK_ROWS = 256  # neighbouring rows go to one rank: they often share a file, or are the same clip
PIECE_MEL_FRAMES = 8 * WINDOW_MEL_FRAMES  # a longer clip is encoded in pieces of eight windows

In = TypeVar("In")
Out = TypeVar("Out")


Lacking = tuple[Utterance, bytes]  # a row whose features are not there, and its key


@dataclass(frozen=True)
class Clip:
    """A row on its way to the encoder."""

    row: Utterance
    key: bytes
    mel: Tensor  # (M, Tm)
    mask: Tensor  # (Tm,) bool: what of it is speech

    @property
    def width(self) -> int:
        return self.mel.shape[1]


@dataclass(frozen=True)
class Refused:
    """A row whose audio cannot be used."""

    row: Utterance
    key: bytes
    reason: str


@dataclass
class Tally:
    """What became of the rows."""

    encoded: int = 0
    cached: int = 0
    skipped: int = 0
    seconds: float = 0.0  # of speech that was encoded
    wall: float = 0.0  # seconds that it took


@dataclass
class Encoding:
    """One pass over a manifest: the frozen encoder, where its output goes, what has happened so far."""

    cache: FeatureCache
    tower: WhisperEncoder
    extractor: WhisperFeatureExtractor
    runtime: Runtime
    skipped: SkippedLog
    full_window: bool
    bar: tqdm  # over the rows
    tally: Tally = field(default_factory=Tally)
    pending: set[bytes] = field(default_factory=set)  # keys on their way
    begun: float = field(default_factory=time.perf_counter)

    def look(self, rows: Sequence[Utterance]) -> list[Lacking]:
        """The rows that the cache has no features for, with their keys (in a thread)."""
        spoken = [row for row in rows if row.audio]
        keys = self.cache.keys(spoken)
        held = self.cache.held(keys)
        return [(row, key) for row, key, there in zip(spoken, keys, held, strict=True) if not there]

    def lacking(self, blocks: Iterable[list[Lacking]], sizes: Iterable[int]) -> Iterator[Lacking]:
        """What is to be read, each clip once; the other rows are counted."""
        for block, size in zip(blocks, sizes, strict=True):
            self.tally.cached += size - len(block)
            self.bar.update(size - len(block))
            for row, key in block:
                if key in self.pending or self.cache.has(key):
                    self.tally.cached += 1
                    self.bar.update()
                else:
                    self.pending.add(key)
                    yield row, key

    def read(self, lacking: Lacking) -> Clip | Refused:
        """The clip of a row (in a thread)."""
        row, key = lacking
        try:
            audio = load_audio(row.audio, start=row.start or 0.0, duration=row.duration)
        except (AudioError, OSError) as error:
            return Refused(row, key, str(error))
        mel, mask = mel_features(self.extractor, [audio], full_window=self.full_window)
        return Clip(row, key, mel[0], mask[0])

    def heard(self, read: Iterable[Clip | Refused]) -> Iterator[Clip]:
        """The clips that can be encoded; the others are listed."""
        for clip in read:
            if isinstance(clip, Clip):
                yield clip
            else:
                self.refuse(clip)

    @torch.inference_mode()
    def encode(self, batch: list[Clip]) -> list[tuple[Clip, np.ndarray]]:
        """Each clip with its states (T, E) float16 (in a thread)."""
        width = max(clip.width for clip in batch)
        features = torch.stack([_padded(clip.mel, width) for clip in batch]).to(
            self.runtime.device
        )  # (B, M, Tm)
        mask = torch.stack([_padded(clip.mask, width) for clip in batch]).to(self.runtime.device)  # (B, Tm)
        piece = PIECE_MEL_FRAMES if len(batch) == 1 else width
        pieces, lengths = [], torch.zeros(len(batch), dtype=torch.long, device=self.runtime.device)
        for begin in range(0, width, piece):  # windows of 30 s do not see each other
            states, heard = encode_speech(
                self.tower,
                features[..., begin : begin + piece],
                mask[:, begin : begin + piece],
                full_window=self.full_window,
            )
            pieces.append(states.half())
            lengths += heard
        joined = torch.cat(pieces, dim=1).cpu()  # (B, T, E)
        return [
            (clip, joined[i, :n].numpy())
            for i, (clip, n) in enumerate(zip(batch, lengths.tolist(), strict=True))
        ]

    def keep(self, writer: ShardWriter, clip: Clip, states: np.ndarray) -> None:
        """Write a clip's states, unless they are no numbers."""
        if not np.isfinite(states).all():
            self.refuse(
                Refused(clip.row, clip.key, "the encoder's output is not finite in this number format")
            )
            return
        writer.add(clip.key, states)
        self.pending.discard(clip.key)
        self.tally.encoded += 1
        self.tally.seconds += float(clip.mask.sum()) / MEL_PER_SECOND
        speed = self.tally.seconds / (time.perf_counter() - self.begun)
        self.bar.set_postfix_str(
            f"{self.tally.seconds:.0f} s of speech, {speed:.0f} × real time", refresh=False
        )
        self.bar.update()

    def refuse(self, clip: Refused) -> None:
        self.pending.discard(clip.key)
        self.tally.skipped += 1
        self.skipped.add(clip.row.id, clip.row.audio, clip.reason)
        self.bar.update()


def encode_manifest(
    cache: FeatureCache,
    rows: Sequence[Utterance],
    tower: WhisperEncoder,
    extractor: WhisperFeatureExtractor,
    runtime: Runtime,
    skipped: SkippedLog,
    *,
    full_window: bool = False,
    batch_seconds: float = 120.0,
) -> Tally:
    """Encode this rank's share of the rows' clips that the cache lacks. Rows without audio are passed over.

    `batch_seconds`: speech and padding encoded side by side on an accelerator.
    """
    on_cpu = runtime.device.type == "cpu"
    threads = torch.get_num_threads()
    if on_cpu:
        torch.set_num_threads(1)  # a clip a core; threads inside an operation would only wait for each other
    blocks = _share(len(rows), runtime)
    bar = tqdm(total=sum(map(len, blocks)), unit="row", disable=runtime.rank != 0, dynamic_ncols=True)
    job = Encoding(cache, tower, extractor, runtime, skipped, full_window, bar)
    try:
        with (
            ThreadPoolExecutor(READERS) as readers,
            ThreadPoolExecutor(threads if on_cpu else 1) as encoders,
            cache.writer(runtime.rank, tower.config.d_model) as writer,
            bar,
        ):
            looked = in_order(
                readers, lambda block: job.look(rows[block.start : block.stop]), blocks, READERS
            )
            read = in_order(readers, job.read, job.lacking(looked, map(len, blocks)), AHEAD)
            clips = job.heard(read)
            batches = ([clip] for clip in clips) if on_cpu else _batches(clips, batch_seconds)
            for batch in in_order(encoders, job.encode, batches, threads + 1 if on_cpu else 2):
                for clip, states in batch:
                    job.keep(writer, clip, states)
    finally:
        torch.set_num_threads(threads)
    job.tally.wall = time.perf_counter() - job.begun
    return job.tally


def in_order(
    pool: ThreadPoolExecutor, work: Callable[[In], Out], items: Iterable[In], ahead: int
) -> Iterator[Out]:
    """`work` of each item, in the items' order, at most `ahead` of them begun before they are asked for."""
    begun: deque[Future[Out]] = deque()
    try:
        for item in items:
            begun.append(pool.submit(work, item))
            if len(begun) >= ahead:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        for future in begun:  # the consumer has failed: begin nothing more
            future.cancel()


def _share(rows: int, runtime: Runtime) -> list[range]:
    """This rank's rows, in blocks of neighbours; where rows are few the blocks are small."""
    block = max(1, min(BLOCK_ROWS, rows // (4 * runtime.world)))
    starts = [number * block for number in shard_rows(-(-rows // block), runtime)]
    return [range(start, min(start + block, rows)) for start in starts]


def _batches(clips: Iterable[Clip], batch_seconds: float) -> Iterator[list[Clip]]:
    """Clips of like length together, at most `batch_seconds` with padding; sorted within a window."""
    window: list[Clip] = []
    for clip in clips:
        window.append(clip)
        if sum(each.width for each in window) >= SORTED_SECONDS * MEL_PER_SECOND:
            yield from _plan(window, batch_seconds * MEL_PER_SECOND)
            window = []
    yield from _plan(window, batch_seconds * MEL_PER_SECOND)


def _plan(window: list[Clip], budget: float) -> Iterator[list[Clip]]:
    batch: list[Clip] = []
    for clip in sorted(window, key=lambda clip: clip.width):
        if batch and (len(batch) + 1) * clip.width > budget:
            yield batch
            batch = []
        batch.append(clip)
    if batch:
        yield batch


def _padded(tensor: Tensor, width: int) -> Tensor:
    return nn.functional.pad(tensor, (0, width - tensor.shape[-1]))
