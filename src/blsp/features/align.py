"""`blsp align`: when each token of a transcript is spoken, from an adapter that reads out.

In:  a manifest with transcripts, the cache of its features, an adapter that reads out (`grounded`).
Out: `DIR/<encoder>/token_times.sqlite`: one encoder frame for each token; clips that cannot be aligned in
     `DIR/<manifest>.align.skipped.jsonl`. For training, the position of each token among an adapter's vectors.
Try: `blsp align --manifest train.jsonl --cache features/ --model blsp-tiny`
Flow: speech features → **token times** → `blsp train --loss embed`, which trains each vector of a new adapter towards
      the embedding of the token that is spoken there

The best CTC path that spells the transcript is found (Viterbi); a token is spoken in the middle of its run of frames.
Tokens outside the read-out vocabulary get times between their neighbours'. The transcript is given, so the adapter
only has to find known words in the clip.

Shapes: B clips, T encoder frames, E encoder width, F frames of the read-out, C classes of a batch (blank first),
U transcript tokens, S places of an adapter, D LLM width.
"""

import sqlite3
import threading
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from blsp.data.files import naming_full_disk
from blsp.data.jobs import Job, SkippedLog
from blsp.data.manifest import CONTINUATION_KEY, Manifest, Utterance
from blsp.distributed import find_runtime, leave
from blsp.features.cache import FeatureCache, key_of
from blsp.features.encode import open_features, skip_name
from blsp.llm.prompt import transcript_ids
from blsp.model.adapter_parts import BLANK, IMPOSSIBLE, place_centres
from blsp.model.checkpoint import load_blsp
from blsp.model.modeling_blsp import BlspForConditionalGeneration
from blsp.model.speech_encoder import FRAMES_PER_SECOND
from blsp.settings import AlignSettings

ROWS_AT_A_TIME = 64
LONG_FRAMES = 1500  # 30 s: a longer clip is aligned alone, so that short ones are not padded to it
Times = NDArray[np.int16]  # (U,) encoder frames, 50/s
MOST_FRAMES = int(np.iinfo(np.int16).max)  # 655 s: times in a longer clip cannot be stored


class AlignError(ValueError):
    """An alignment that is not possible; the message says why."""


def align(settings: AlignSettings) -> None:
    """The command: find the token times of every row that has none yet."""
    with Job(settings.cache / f"{skip_name(settings.manifest)}.align"):
        _align(settings)


def _align(settings: AlignSettings) -> None:
    runtime = find_runtime(settings.device, settings.dtype)
    model, processor = load_blsp(settings.model, runtime, settings.audio_model, settings.llm)
    if not model.model.reads_out:
        raise AlignError(f"{settings.model}: is a {model.config.adapter} adapter; --model needs one that reads out")
    rows: Sequence[Utterance] = Manifest(settings.manifest, CONTINUATION_KEY)
    rows = rows if settings.limit is None else rows[: settings.limit]
    out = settings.cache / f"{skip_name(settings.manifest)}.align"
    cache = open_features(settings.cache, model, processor, [rows], runtime, out)
    store = TokenTimes(cache)
    aligned = known = 0
    with SkippedLog(out) as skipped:  # goes on with the list of clips that could not be encoded
        for start in tqdm(range(0, len(rows), ROWS_AT_A_TIME), unit="batch", mininterval=10):
            spoken = [row for row in rows[start : start + ROWS_AT_A_TIME] if row.audio and row.text.strip()]
            batch = [row for row in spoken if not row.no_speech]
            tokens = [transcript_ids(processor.tokenizer, row.text) for row in batch]
            keys = cache.keys(batch, check=False)
            frames = cache.lengths(keys)
            reasons = {i: reason for i, count in enumerate(frames) if (reason := _why_unfit(count))}
            usable = [i for i in range(len(batch)) if i not in reasons]
            missing = [i for i in usable if store.get(keys[i], tokens[i]) is None]
            known += len(usable) - len(missing)
            short = [i for i in missing if frames[i] <= LONG_FRAMES]
            long = [[i] for i in missing if frames[i] > LONG_FRAMES]
            for part in ([short] if short else []) + long:
                times = align_batch(model, [cache.get(keys[i]) for i in part], [tokens[i] for i in part])
                fitted = [(i, frames_of) for i, frames_of in zip(part, times, strict=True) if frames_of is not None]
                unfitted = set(part) - {i for i, _ in fitted}
                reasons |= dict.fromkeys(sorted(unfitted), "its transcript does not fit into its speech")
                store.add([(keys[i], tokens[i], frames_of) for i, frames_of in fitted])
                aligned += len(fitted)
            for i, reason in reasons.items():
                skipped.add(batch[i].id, batch[i].audio, reason)
        summary = f"aligned {aligned} clips, {known} were aligned before; {skipped.count} could not be"
        if skipped.count and not aligned + known:
            raise AlignError(f"{summary}: {skipped.path} says why")
        print(summary)
    leave(runtime)


def _why_unfit(frames: int) -> str | None:
    """Why a clip of so many encoder frames cannot be aligned, or None."""
    if not frames:
        return "its audio could not be encoded"
    if frames > MOST_FRAMES:
        return f"it is longer than {MOST_FRAMES // FRAMES_PER_SECOND} s: cut it with start and duration"
    return None


def align_batch(
    model: BlspForConditionalGeneration, features: Sequence[NDArray[np.float16]], tokens: Sequence[Sequence[int]]
) -> list[Times | None]:
    """The token times of each clip, from its encoder states (T, E) and transcript; None if they do not fit."""
    runs = token_runs(model, [torch.from_numpy(np.array(states)) for states in features], tokens)
    frames_per_place, first_centre = place_centres(model.model.multi_modal_projector)
    return [
        None if run is None else np.rint(first_centre + run.mean(axis=1) * frames_per_place).astype(np.int16)
        for run in runs
    ]


@torch.no_grad()
def token_runs(
    model: BlspForConditionalGeneration, states: Sequence[Tensor], tokens: Sequence[Sequence[int]]
) -> list[NDArray[np.float64] | None]:
    """The first and the last read-out frame (U, 2) of each token of each clip; None if the transcript does not fit.

    states: of the encoder, (T, E) each. A token outside the read-out vocabulary gets a frame between its neighbours'.
    """
    adapter, table = model.model.multi_modal_projector, model.model.readout_table()  # table (K-1, D)
    assert table is not None
    weight = next(adapter.parameters())

    # Frames of the read-out
    lengths = torch.tensor([len(clip) for clip in states], device=weight.device)
    padded = torch.nn.utils.rnn.pad_sequence([clip.to(weight) for clip in states], batch_first=True)  # (B, T, E)
    hidden, counts = adapter.hidden_states(padded, lengths)  # (B, F, D), (B,)

    # Score only the tokens of these transcripts: the best path does not depend on a softmax over the vocabulary
    own = set().union(*tokens)
    rows = {token: row for token, row in model.model.readout_row().items() if token in own}
    class_of = {token: number for number, token in enumerate(rows, start=1)}
    scored = torch.tensor(list(rows.values()), dtype=torch.long, device=weight.device)
    scores = adapter.logits(hidden, table, scored).float().cpu().numpy()  # (B, F, C)

    found: list[NDArray[np.float64] | None] = []
    for clip, count, ids in zip(scores, counts.tolist(), tokens, strict=True):
        known = [number for number, token in enumerate(ids) if token in class_of]
        runs = best_path(clip[:count], [class_of[ids[number]] for number in known])
        if runs is None or not known:
            found.append(None)
            continue
        found.append(np.stack([np.interp(np.arange(len(ids)), known, ends) for ends in runs.T], axis=1))
    return found


def best_path(scores: NDArray[np.float32], classes: Sequence[int]) -> NDArray[np.float64] | None:
    """The first and the last frame (U, 2) of each token on the best CTC path that spells `classes` (U,), or None.

    scores: (F, C) log-scores, blank is class 0. States are blank, token 1, blank, token 2, …, blank (2U + 1).
    """
    count = len(scores)
    labels = np.full(2 * len(classes) + 1, BLANK)
    labels[1::2] = classes
    emissions = scores[:, labels]  # (F, 2U + 1)
    # A path may jump over the blank between two different tokens
    jump = np.zeros(len(labels), dtype=bool)
    jump[3::2] = labels[3::2] != labels[1:-2:2]

    # Forward: the best score of each state at each frame, and how many states back it came from (0, 1 or 2)
    best = np.full(len(labels), IMPOSSIBLE)
    best[:2] = emissions[0, :2]
    came = np.zeros((count, len(labels)), dtype=np.int8)
    for frame in range(1, count):
        moves = np.full((3, len(labels)), IMPOSSIBLE)
        moves[0], moves[1, 1:] = best, best[:-1]
        moves[2, 2:] = np.where(jump[2:], best[:-2], IMPOSSIBLE)
        came[frame] = moves.argmax(axis=0)
        best = np.maximum(moves.max(axis=0) + emissions[frame], IMPOSSIBLE)

    # Backward: which state each frame is in
    state = len(labels) - 1 if len(labels) == 1 or best[-1] >= best[-2] else len(labels) - 2
    if best[state] <= IMPOSSIBLE / 2:
        return None
    path = np.empty(count, dtype=np.int64)
    for frame in range(count - 1, -1, -1):
        path[frame] = state
        state -= int(came[frame, state])
    frames = [np.flatnonzero(path == 2 * number + 1) for number in range(len(classes))]
    return np.array([(run[0], run[-1]) for run in frames], dtype=np.float64).reshape(-1, 2)


# --- the store of the times, and the adapter's places ------------------------------------------------------
class TokenTimes:
    """The store: (features of a clip, transcript ids) → the encoder frame at which each token is spoken."""

    def __init__(self, cache: FeatureCache) -> None:
        # check_same_thread: the threads that prepare training examples use this connection too. They do so in turn:
        # threads that run one statement at once get each other's rows
        self._path = cache.folder / "token_times.sqlite"
        self._database = sqlite3.connect(self._path, timeout=60, check_same_thread=False)
        self._turn = threading.Lock()
        self._database.execute("create table if not exists times (key blob primary key, frames blob) without rowid")

    def __len__(self) -> int:
        with self._turn:
            return int(self._database.execute("select count(*) from times").fetchone()[0])

    def get(self, feature_key: bytes, tokens: Sequence[int]) -> Times | None:
        """(U,) encoder frames, or None if this transcript has not been aligned with this clip."""
        query = "select frames from times where key = ?"
        with self._turn:
            found = self._database.execute(query, [_key(feature_key, tokens)]).fetchone()
        return None if found is None else np.frombuffer(found[0], dtype="<i2")

    def add(self, entries: Sequence[tuple[bytes, Sequence[int], Times]]) -> None:
        """Add (feature key, tokens, times) of several clips in one transaction."""
        rows = [(_key(key, tokens), times.astype("<i2").tobytes()) for key, tokens, times in entries]
        with self._turn, naming_full_disk(self._path), self._database:
            self._database.executemany("insert or replace into times values (?, ?)", rows)


def _key(feature_key: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a clip with a transcript."""
    return key_of(feature_key + np.asarray(tokens, "<u4").tobytes())


def token_places(times: Times, places: int, frames_per_place: int, first_centre: float) -> NDArray[np.int64] | None:
    """The place (U,) of each token among S = `places`, strictly increasing; None if there are more tokens than places.

    A token gets the place whose centre is nearest. Tokens with the same nearest place are spread to both sides of it.
    frames_per_place, first_centre: of the adapter, in encoder frames (`place_centres`).
    """
    if len(times) > places:
        return None
    order = np.arange(len(times))
    nearest = np.rint((times - first_centre) / frames_per_place).astype(np.int64)
    # Places increase strictly if places - order never decreases. Take the mean of two such sequences: the running
    # maximum from the left and the running minimum from the right.
    # nearest [3, 3, 3] -> slack [3, 2, 1] -> right [3, 3, 3], left [1, 1, 1] -> mean 2 -> places [2, 3, 4]
    slack = nearest - order
    right = np.maximum.accumulate(slack)
    left = np.minimum.accumulate(slack[::-1])[::-1]
    return np.clip((right + left) // 2, 0, places - len(times)) + order
