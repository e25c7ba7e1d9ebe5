"""`blsp encode`: the frozen encoder's output for every clip of a manifest, computed once and stored.

In:  a manifest (or a continuations file), a speech encoder, a folder.
Out: the features in that folder (cache.py); clips that cannot be read in `DIR/<manifest>.skipped.jsonl`.
Try: `blsp encode --manifest train.jsonl --audio-model embedded:whisper-tiny.en --cache features/`
Flow: manifest → continuations → **speech features** → alignment training.

Each row passes through four stages. They are generators that work ahead in threads and keep the order of the rows.

    missing_rows    rows whose features are not in the cache, each clip once; shards are read here, in order
    read_clips      audio files → log-mel features
    batches         one clip a batch on a CPU; clips of similar length together on an accelerator
    encode_batches  log-mel features → encoder states

Only missing clips are encoded. Several processes (torchrun) share the rows; each writes its own shards.

Shapes: B clips, M mel bins, Tm mel frames (100/s), T encoder frames (50/s), E encoder width.
"""

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from blsp.data.addresses import AddressError, is_address
from blsp.data.audio import AudioError, is_silent
from blsp.data.clips import load_clip
from blsp.data.files import DiskFullError
from blsp.data.jobs import Job, JobError, SkippedLog, in_order
from blsp.data.manifest import CONTINUATION_KEY, Manifest, Utterance
from blsp.distributed import Runtime, barrier, find_runtime, leave, shard_rows, sum_across
from blsp.features.cache import FeatureCache
from blsp.model.loading import load_speech_encoder, warn_of_languages
from blsp.model.lora import has_lora
from blsp.model.modeling_blsp import BlspForConditionalGeneration
from blsp.model.processing_blsp import BlspProcessor
from blsp.model.speech_encoder import (
    FEATURES_VERSION,
    FRAMES_PER_SECOND,
    WINDOW_MEL_FRAMES,
    batches_by_length,
    encode_speech,
    mel_features,
)
from blsp.settings import EncodeSettings
from blsp.weights.digest import find_weights

MEL_PER_SECOND = 100
READERS = 4  # threads that read, decode and compute mel features
AHEAD = 64  # clips that are read before they are needed
SORTED_SECONDS = 600.0  # on an accelerator, clips are sorted by length within this much speech
BLOCK_ROWS = 256  # neighbouring rows go to one rank, as they often share a file or are the same clip
PIECE_MEL_FRAMES = 8 * WINDOW_MEL_FRAMES  # a longer clip is encoded in pieces of this length


def encoder_id(audio_model_sha256: str, *, full_window: bool = False) -> str:
    """The identity of an encoder's features: its tensors, the padding, the version of the mel features."""
    return f"{audio_model_sha256}:{'30s' if full_window else 'true-length'}:{FEATURES_VERSION}"


def encode(settings: EncodeSettings) -> None:
    """The command: encode the clips that the cache lacks, and print what was done."""
    runtime = find_runtime(settings.device, settings.dtype)
    with Job(settings.cache / skip_name(settings.manifest), runtime.rank) as job:
        _encode(settings, runtime, job)


def skip_name(manifest: str) -> str:
    """The name that a manifest's lock and skip list have in the cache's folder."""
    return re.sub(r"[^\w.-]", "_", Path(manifest).name.removesuffix(".jsonl"))


def _encode(settings: EncodeSettings, runtime: Runtime, job: Job) -> None:
    rows: Sequence[Utterance] = Manifest(settings.manifest, CONTINUATION_KEY)
    rows = rows if settings.limit is None else rows[: settings.limit]
    weights = find_weights(settings.audio_model)
    encoder = Encoder(*load_speech_encoder(weights, runtime), runtime, settings.pad_to_30s)
    if runtime.rank == 0:
        warn_of_languages(encoder.tower.config, weights.name, rows)
    identity = encoder_id(weights.sha256, full_window=settings.pad_to_30s)
    cache = _open_cache(settings.cache, identity, runtime)
    with _new_skip_list(job.out, runtime) as skipped:
        progress = encode_manifest(cache, rows, encoder, skipped, batch_seconds=settings.batch_seconds)
        wall = progress.wall
    cache = _open_cache(settings.cache, identity, runtime)  # makes the index now, so that training starts at once
    counts = torch.tensor([progress.encoded, progress.cached, progress.skipped, progress.seconds], dtype=torch.float64)
    encoded, cached, left_out, seconds = sum_across(counts, runtime).tolist()
    if runtime.rank == 0:
        speed = f" at {seconds / wall:.0f} × real time" if encoded else ""
        print(f"encoded {encoded:.0f} clips, {seconds / 3600:.2f} h of speech{speed}")
        print(f"{cached:.0f} rows needed nothing; the cache holds {len(cache)} clips of this encoder")
    leave(runtime)
    if left_out and runtime.rank == 0:
        where = f"{skipped.path} and those of the other ranks" if runtime.world > 1 else str(skipped.path)
        summary = f"skipped {left_out:.0f} rows, listed with the reason in {where}"
        if not encoded + cached:
            raise JobError(f"no clip could be encoded: {summary}")
        print(summary)


def open_features(
    folder: Path,
    model: BlspForConditionalGeneration,
    processor: BlspProcessor,
    sources: Sequence[Sequence[Utterance]],
    runtime: Runtime,
    skip_list: Path,
) -> FeatureCache:
    """The cache for a model's encoder; clips of `sources` that it does not have are encoded first.

    skip_list: of this run alone, without its suffix; other runs may be at work on the same cache.
    """
    if has_lora(model.config, "encoder"):
        raise JobError(
            f"{folder}: holds features of the encoder without the LoRA that this model has: leave out --cache"
        )
    full_window = model.config.full_window
    encoder = Encoder(model.model.audio_tower, processor.feature_extractor, runtime, full_window)
    identity = encoder_id(str(model.config.audio_model_sha256), full_window=full_window)
    cache = _open_cache(folder, identity, runtime)
    if sources:
        with _new_skip_list(skip_list, runtime) as skipped:
            for rows in sources:
                encode_manifest(cache, rows, encoder, skipped)
    return _open_cache(folder, identity, runtime)


def _open_cache(folder: Path, identity: str, runtime: Runtime) -> FeatureCache:
    """Open the cache: one rank checks the shards and makes the index, then the others open it."""
    barrier(runtime)
    if runtime.rank == 0:
        FeatureCache(folder, identity)
    barrier(runtime)
    return FeatureCache(folder, identity)


def _new_skip_list(path: Path, runtime: Runtime) -> SkippedLog:
    """An empty skip list: every run looks at every row again."""
    out = f"{path}.rank{runtime.rank}" if runtime.world > 1 else str(path)
    Path(f"{out}.skipped.jsonl").unlink(missing_ok=True)
    return SkippedLog(out)


# --- the objects that the stages share --------------------------------------------------------------------
@dataclass(frozen=True)
class Clip:
    """A row with its log-mel features: mel (M, Tm), and mask (Tm,) bool, True where there is speech."""

    row: Utterance
    key: bytes
    mel: Tensor
    mask: Tensor

    @property
    def width(self) -> int:
        return self.mel.shape[1]

    @property
    def seconds(self) -> float:
        return float(self.mask.sum()) / MEL_PER_SECOND


@dataclass
class Progress:
    """What was done with the rows so far, the keys inside the stages, the skip list and the progress bar."""

    log: SkippedLog
    bar: tqdm
    encoded: int = 0
    cached: int = 0
    skipped: int = 0
    seconds: float = 0.0  # of speech that was encoded
    pending: set[bytes] = field(default_factory=set)
    began: float = field(default_factory=time.perf_counter)

    @property
    def wall(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self.began

    def need_nothing(self, rows: int = 1) -> None:
        self.cached += rows
        self.bar.update(rows)

    def stored(self, clip: Clip) -> None:
        self.pending.discard(clip.key)
        self.encoded += 1
        self.seconds += clip.seconds
        self.bar.set_postfix_str(
            f"{self.seconds:.0f} s of speech, {self.seconds / self.wall:.0f} × real time", refresh=False
        )
        self.bar.update()

    def skip(self, row: Utterance, key: bytes, reason: str) -> None:
        self.pending.discard(key)
        self.skipped += 1
        self.log.add(row.id, row.audio, reason)
        self.bar.update()


@dataclass(frozen=True)
class Encoder:
    """The frozen encoder with its mel extractor, and how it is run."""

    tower: WhisperEncoder
    extractor: WhisperFeatureExtractor
    runtime: Runtime
    full_window: bool = False

    def mel(self, row: Utterance, source: bytes | str | None = None) -> tuple[Tensor, Tensor] | str:
        """Log-mel features (M, Tm) and mask (Tm,) of a row's speech, or why it cannot be read.

        source: the bytes of its audio, if they have been read already.
        """
        try:
            audio = load_clip(row, source)
        except (AudioError, OSError) as error:
            return str(error)
        if row.text.strip() and not row.no_speech and is_silent(audio):
            return f"silence under a transcript: {row.text}"
        mel, mask = mel_features(self.extractor, [audio], full_window=self.full_window)
        return mel[0], mask[0]

    @torch.inference_mode()
    def states(self, clips: Sequence[Clip]) -> list[np.ndarray]:
        """The states (T, E) float16 of each clip of a batch."""
        width, device = max(clip.width for clip in clips), self.runtime.device
        mels = torch.stack([nn.functional.pad(clip.mel, (0, width - clip.width)) for clip in clips]).to(device)
        masks = torch.stack([nn.functional.pad(clip.mask, (0, width - clip.width)) for clip in clips]).to(device)
        # encode a very long clip in pieces: its windows of 30 s do not attend to each other anyway
        piece = PIECE_MEL_FRAMES if len(clips) == 1 else width
        pieces, lengths = [], torch.zeros(len(clips), dtype=torch.long, device=device)
        for begin in range(0, width, piece):
            span = slice(begin, begin + piece)
            states, valid = encode_speech(self.tower, mels[..., span], masks[:, span], full_window=self.full_window)
            pieces.append(states.half())
            lengths += valid
        joined = torch.cat(pieces, dim=1).cpu()  # (B, T, E)
        return [row[:length].numpy() for row, length in zip(joined, lengths.tolist(), strict=True)]


# --- the stages -------------------------------------------------------------------------------------------
def encode_manifest(
    cache: FeatureCache,
    rows: Sequence[Utterance],
    encoder: Encoder,
    skipped: SkippedLog,
    *,
    batch_seconds: float = 120.0,
) -> Progress:
    """Encode the clips of this rank's rows that the cache does not have. Rows without audio need nothing.

    batch_seconds: the longest batch on an accelerator, padding included.
    """
    runtime = encoder.runtime
    on_cpu, threads = runtime.device.type == "cpu", torch.get_num_threads()
    if on_cpu:
        torch.set_num_threads(1)  # one clip a core is faster than several cores inside one operation
    blocks = _blocks(len(rows), runtime)
    bar = tqdm(total=sum(map(len, blocks)), unit="row", disable=runtime.rank != 0, dynamic_ncols=True)
    progress = Progress(skipped, bar)
    try:
        with (
            ThreadPoolExecutor(READERS) as readers,
            ThreadPoolExecutor(threads if on_cpu else 1) as encoders,
            cache.writer(runtime.rank, encoder.tower.config.d_model) as writer,
            bar,
        ):
            missing = missing_rows(readers, cache, (rows[b.start : b.stop] for b in blocks), progress)
            clips = read_clips(readers, encoder, missing, progress)
            batches = ([clip] for clip in clips) if on_cpu else batches_of(clips, batch_seconds)
            ahead = threads + 1 if on_cpu else 2
            for clip, states in encode_batches(encoders, encoder, batches, ahead):
                if np.isfinite(states).all():
                    writer.add(clip.key, states)
                    progress.stored(clip)
                else:
                    reason = "the encoder's output is not finite in this number format"
                    progress.skip(clip.row, clip.key, reason)
    except DiskFullError as error:
        count, width = bar.total - bar.n, encoder.tower.config.d_model
        needs = count * progress.seconds / max(1, progress.encoded) * FRAMES_PER_SECOND * width * 2  # bytes a number
        raise DiskFullError(error.path, f"about {needs:,.0f} bytes for {count} more rows are") from error
    finally:
        torch.set_num_threads(threads)
    return progress


Missing = tuple[Utterance, bytes, bytes | str]  # a row that needs encoding, its key, its audio: bytes or an address


def missing_rows(
    pool: ThreadPoolExecutor, cache: FeatureCache, blocks: Iterable[Sequence[Utterance]], progress: Progress
) -> Iterator[Missing]:
    """The rows that need encoding; of rows with the same clip, only the first.

    Files are hashed by several threads. Audio in a shard or behind a URL is read here, one row after the other, and
    passed on, so that nothing is read twice or out of order.
    """

    def look_up(block: Sequence[Utterance]) -> tuple[int, list[tuple[Utterance, bytes | None]]]:
        spoken = [row for row in block if row.audio]
        contents = cache.hashes.of(spoken, read=False)
        keys = [cache.key_with(row, content) for row, content in zip(spoken, contents, strict=True)]
        held = cache.held(keys)
        unread = [content is None and is_address(row.audio) for row, content in zip(spoken, contents, strict=True)]
        looked_up = zip(spoken, keys, held, unread, strict=True)
        return len(block), [(row, None if unread else key) for row, key, is_held, unread in looked_up if not is_held]

    for size, missing in in_order(pool, look_up, blocks, READERS):
        progress.need_nothing(size - len(missing))
        for row, key in missing:
            source: bytes | str = row.audio
            if key is None:
                try:
                    content, source = cache.hashes.read(row)
                except (AddressError, OSError) as error:
                    progress.skip(row, b"", str(error))
                    continue
                key = cache.key_with(row, content)
            # blocks are looked up ahead, so an earlier row with the same clip may have been taken in the meantime
            if key in progress.pending or cache.has(key):
                progress.need_nothing()
            else:
                progress.pending.add(key)
                yield row, key, source


def read_clips(
    pool: ThreadPoolExecutor, encoder: Encoder, rows: Iterable[Missing], progress: Progress
) -> Iterator[Clip]:
    """The clips of the rows; those that cannot be read go to the skip list."""

    def read(item: Missing) -> tuple[Utterance, bytes, tuple[Tensor, Tensor] | str]:
        row, key, source = item
        return row, key, encoder.mel(row, source)

    for row, key, mel in in_order(pool, read, rows, AHEAD):
        if isinstance(mel, str):
            progress.skip(row, key, mel)
        else:
            yield Clip(row, key, *mel)


def encode_batches(
    pool: ThreadPoolExecutor, encoder: Encoder, batches: Iterable[list[Clip]], ahead: int
) -> Iterator[tuple[Clip, np.ndarray]]:
    """Run the encoder: each clip with its states (T, E) float16."""

    def run(batch: list[Clip]) -> list[tuple[Clip, np.ndarray]]:
        return list(zip(batch, encoder.states(batch), strict=True))

    for pairs in in_order(pool, run, batches, ahead):
        yield from pairs


def _blocks(rows: int, runtime: Runtime) -> list[range]:
    """This rank's rows, in blocks of neighbours; the blocks are smaller if there are few rows."""
    size = max(1, min(BLOCK_ROWS, rows // (4 * runtime.world)))
    starts = [number * size for number in shard_rows(-(-rows // size), runtime)]
    return [range(start, min(start + size, rows)) for start in starts]


def batches_of(clips: Iterable[Clip], batch_seconds: float) -> Iterator[list[Clip]]:
    """Batches of clips of similar length, at most `batch_seconds` with padding; a longer clip is a batch alone.

    Clips are sorted within windows of `SORTED_SECONDS`, so that few of them wait in memory.
    """
    window: list[Clip] = []
    for clip in chain(clips, [None]):
        if clip is not None:
            window.append(clip)
        if clip is None or sum(clip.width for clip in window) >= SORTED_SECONDS * MEL_PER_SECOND:
            for batch in batches_by_length([clip.width for clip in window], batch_seconds * MEL_PER_SECOND):
                yield [window[i] for i in batch]
            window = []
