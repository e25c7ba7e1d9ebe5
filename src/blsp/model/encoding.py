"""Clips through the frozen encoder into the feature cache: read ahead, encoded, written, one pipeline.

    >>> tally = encode_manifest(cache, rows, tower, extractor, place, skipped)

A clip counts as done when its record is on disk, so a killed run goes on where it stopped, and a second
manifest with the same clips costs a look-up. Files are read, decoded and turned into mels by threads ahead of
the encoder. On a CPU each clip is encoded alone, one a core: that is as fast as batches there, wastes nothing
on padding, and makes a clip's numbers independent of its neighbours, so of where a run was killed. An
accelerator takes clips of like length together.

Flow: features.py (`blsp encode`) → **encoding.py** → feature_cache.py.

Letters: B batch, T encoder frames (50/s), E encoder width, M mel bins, Tm mel frames (100/s).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from blsp.data.audio import AudioError, load_audio
from blsp.data.manifest import SkippedLog, Utterance
from blsp.model.distributed import Place, shard_rows
from blsp.model.feature_cache import FeatureCache
from blsp.model.feature_shards import ShardWriter
from blsp.model.speech_encoder import WINDOW_MEL_FRAMES, encode_speech, mel_features

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
    place: Place
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
            self.place.device
        )  # (B, M, Tm)
        mask = torch.stack([_padded(clip.mask, width) for clip in batch]).to(self.place.device)  # (B, Tm)
        piece = PIECE_MEL_FRAMES if len(batch) == 1 else width
        pieces, lengths = [], torch.zeros(len(batch), dtype=torch.long, device=self.place.device)
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
    place: Place,
    skipped: SkippedLog,
    *,
    full_window: bool = False,
    batch_seconds: float = 120.0,
) -> Tally:
    """Encode this rank's share of the rows' clips that the cache lacks. Rows without audio are passed over.

    `batch_seconds`: speech and padding encoded side by side on an accelerator.
    """
    on_cpu = place.device.type == "cpu"
    threads = torch.get_num_threads()
    if on_cpu:
        torch.set_num_threads(1)  # a clip a core; threads inside an operation would only wait for each other
    blocks = _share(len(rows), place)
    bar = tqdm(total=sum(map(len, blocks)), unit="row", disable=place.rank != 0, dynamic_ncols=True)
    job = Encoding(cache, tower, extractor, place, skipped, full_window, bar)
    try:
        with (
            ThreadPoolExecutor(READERS) as readers,
            ThreadPoolExecutor(threads if on_cpu else 1) as encoders,
            cache.writer(place.rank, tower.config.d_model) as writer,
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


def _share(rows: int, place: Place) -> list[range]:
    """This rank's rows, in blocks of neighbours; where rows are few the blocks are small."""
    block = max(1, min(BLOCK_ROWS, rows // (4 * place.world)))
    starts = [number * block for number in shard_rows(-(-rows // block), place)]
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
