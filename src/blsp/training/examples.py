"""One row of the data as what a step needs: speech, prompt, transcript, response, teacher.

In:  a row of the table, its source, the feature cache or the audio itself, the tokenizer.
Out: `Example` (numpy and lists; nothing is computed by torch here, so a thread can make them ahead), or the
     reason why there is none.
Try: ``reader.example(table.rows[0], sources, epoch=0)``
Flow: training/dataset.py -> **examples.py** -> training/step.py

Letters: T encoder frames, E encoder width, M mel bins, Tm mel frames, n response tokens, K stored top-k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase, WhisperFeatureExtractor

from blsp.data.audio import SAMPLE_RATE, AudioError, load_audio, probe_audio
from blsp.data.manifest import Utterance
from blsp.llm.prompt import Order, PromptTemplate, frame_prompt, text_ids, transcript_ids
from blsp.model.speech_encoder import encoder_frames, mel_features, mel_frames
from blsp.training.augmentation import Kind, augment, hide_spans
from blsp.training.dataset import ROW, Source
from blsp.training.losses import can_align

NO_RESPONSE: list[int] = []
ANY_PAIR = np.iinfo(np.uint32).max  # a row that no (instruction, order) pair is given for


class Features(Protocol):
    """What training asks of the feature cache (features/encode.py)."""

    def key(self, utterance: Utterance) -> bytes: ...
    def keys(self, rows: Sequence[Utterance]) -> list[bytes]: ...
    def lengths(self, keys: Sequence[bytes]) -> NDArray[np.int32]: ...
    def get(self, key: bytes) -> NDArray[np.float16]: ...


@dataclass(frozen=True)
class Example:
    """One clip and what is learnt from it.

    features (T, E) from the cache, or mel (M, Tm) of `mel_frames` true frames, to be encoded in the step.
    response: token ids, the end included where the answer stopped; empty where the LLM is not run.
    teacher: ids and log-probabilities (n, K) of the reading LLM at the response's positions.
    readout: the transcript as CTC classes; [] for no speech, None where there is no CTC term.
    """

    id: str
    seconds: float
    template: PromptTemplate
    transcript: list[int]
    response: list[int]
    no_speech: bool
    features: NDArray[np.float16] | None = None
    mel: NDArray[np.float32] | None = None
    mel_frames: int = 0
    teacher: tuple[NDArray[np.uint32], NDArray[np.float16]] | None = None
    readout: list[int] | None = None
    text: str = ""

    def hearing(self, other: Example) -> Example:
        """This example with another one's speech: what an adapter that does not listen could not tell."""
        return replace(self, features=other.features, mel=other.mel, mel_frames=other.mel_frames)


@dataclass(frozen=True)
class Targets:
    """What of a row is learnt: the loss, whether the adapter reads out, and whether there is a CTC term."""

    loss: Literal["ctc", "ce", "kl"]
    reads_out: bool
    ctc: bool


@dataclass
class ExampleReader:
    """Turns rows into examples, and measures them for the table.

    classes: LLM token -> CTC class (empty without a CTC term). num_audio_tokens: encoder frames -> placeholders.
    end: the token that ends an answer. augmentation: kinds (`mask` for cached features, the others for audio).
    """

    taught: Targets
    tokenizer: PreTrainedTokenizerBase
    extractor: WhisperFeatureExtractor
    num_audio_tokens: Callable[[Any], Any]  # of one length or of an array of them
    end: int
    no_speech_sentence: str
    classes: dict[int, int] = field(default_factory=dict)
    cache: Features | None = None
    augmentation: tuple[Kind, ...] = ()
    full_window: bool = False
    max_seconds: float = math.inf
    seed: int = 0
    pairs: list[tuple[str, str]] = field(default_factory=list)
    _numbers: dict[tuple[str, str], int] = field(default_factory=dict)
    _prompts: dict[tuple[str, str], PromptTemplate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._no_speech_ids = [*text_ids(self.tokenizer, self.no_speech_sentence), self.end]

    # --- for the table ------------------------------------------------------------------------------------

    def speech_frames(self, rows: Sequence[Utterance]) -> list[int | str]:
        """Encoder frames of each clip, or why there are none."""
        if self.cache is None:
            found = [_frames_of_audio(row) for row in rows]
        else:
            lengths = self.cache.lengths(self.cache.keys(rows))
            found = [
                int(n) or "its features are not in the cache: the audio could not be encoded" for n in lengths
            ]
        return [self._not_too_long(frames) for frames in found]

    def _not_too_long(self, frames: int | str) -> int | str:
        if isinstance(frames, int) and frames / 50 > self.max_seconds:
            return f"{frames / 50:.1f} s of speech, longer than --max-seconds {self.max_seconds:g}"
        return frames

    def text_lengths(self, row: Utterance, source: Source) -> tuple[int, int] | str:
        """(transcript tokens, tail positions) of a row, or why it cannot be learnt from."""
        if not row.audio:
            return "no audio"
        silent = row.no_speech
        if not silent and not row.text.strip() and (self.taught.loss != "ce" or self.taught.ctc):
            return "no transcript"
        if silent:
            return 0, len(self._no_speech_ids)
        if self.taught.loss == "ctc":
            return max(1, len(row.text) // 4), 0
        response = self._response(row)
        if isinstance(response, str):
            return response
        prompt = self._prompt(_pair(row))
        tokens = row.extra.get("prompt_tokens")
        around = len(prompt.prefix_ids) + len(prompt.suffix_ids)
        read = len(transcript_ids(self.tokenizer, row.text)) if tokens is None else int(tokens) - around
        return max(1, read), len(prompt.suffix_ids) + len(response) - 1

    def frame_index(self, row: Utterance) -> int:
        """Index of the row's (instruction, order) pair; a new pair gets the next one."""
        if self.taught.loss == "ctc" or (row.no_speech and row.instruction is None):
            return ANY_PAIR
        pair = _pair(row)
        if pair not in self._numbers:
            self._numbers[pair] = len(self.pairs)
            self.pairs.append(pair)
        return self._numbers[pair]

    # --- for the step -------------------------------------------------------------------------------------

    def prompt_of(self, place: np.void) -> PromptTemplate:
        """The prompt around a table row's speech; no-speech rows without one take one of the others' by their
        id.
        """
        if not self.pairs:
            return PromptTemplate((), ())
        index = int(place["frame"]) if place["frame"] != ANY_PAIR else int(place["hash"]) % len(self.pairs)
        return self._prompt(self.pairs[index])

    def example(self, place: np.void, sources: Sequence[Source], epoch: int) -> Example | str:
        """The example of a table row, augmented as `epoch` says; or why there is none."""
        source = sources[int(place["source"])]
        row = source.rows[int(place["row"])]
        try:
            example = self._hear(row, (self.seed, epoch, int(place["hash"])))
        except AudioError as error:
            return str(error)
        example = replace(example, template=self.prompt_of(place))
        if self.taught.loss != "ctc":
            example = replace(example, response=self._answer(row))
        if source.teacher is not None and example.response and not example.no_speech:
            ids, logp = source.teacher.get(int(place["row"]))
            if len(ids) != len(example.response):
                return f"stored top-k has {len(ids)} steps, its continuation {len(example.response)}"
            example = replace(example, teacher=(ids, logp))
        return self._with_readout(example) if self.taught.ctc else example

    def _hear(self, row: Utterance, key: tuple[int, ...]) -> Example:
        """The row with its speech and transcript, nothing to answer yet."""
        silent = row.no_speech
        read = [] if silent else transcript_ids(self.tokenizer, row.text)
        blank = Example(row.id, 0.0, PromptTemplate((), ()), read, NO_RESPONSE, silent, text=row.text)
        if self.cache is not None:
            features = np.array(self.cache.get(self.cache.key(row)))  # a copy: read here, not in the step
            features = hide_spans(features, key) if "mask" in self.augmentation else features
            return replace(blank, features=features, seconds=len(features) / 50)
        audio = load_audio(row.audio, start=row.start or 0.0, duration=row.duration)
        audio = augment(audio, self.augmentation, key) if self.augmentation else audio
        mel, _ = mel_features(self.extractor, [audio], full_window=self.full_window)
        seconds = len(audio) / SAMPLE_RATE
        return replace(blank, mel=mel[0].numpy(), mel_frames=mel_frames(len(audio)), seconds=seconds)

    def _answer(self, row: Utterance) -> list[int]:
        """The response's ids; an adapter that reads out finds clips without speech by itself."""
        if row.no_speech:
            return NO_RESPONSE if self.taught.reads_out else self._no_speech_ids
        response = self._response(row)
        return NO_RESPONSE if isinstance(response, str) else response

    def _response(self, row: Utterance) -> list[int] | str:
        """What the LLM wrote, with the end where it stopped by itself: an answer cut at the limit teaches
        none.
        """
        if "continuation" not in row.extra:
            return "has no continuation: write one with blsp continue"
        ids = row.extra.get("continuation_ids")
        if ids is None:  # written behind a URL, which tells no ids
            ids = text_ids(self.tokenizer, str(row.extra["continuation"]))
        response = [*ids, self.end] if row.extra.get("finish") == "stop" else list(ids)
        return response or "its continuation is empty"

    def _prompt(self, pair: tuple[str, str]) -> PromptTemplate:
        if pair not in self._prompts:
            instruction, order = pair
            self._prompts[pair] = frame_prompt(self.tokenizer, instruction, _order(order))
        return self._prompts[pair]

    def _with_readout(self, example: Example) -> Example | str:
        """The example with its CTC target; without one in a CTC-only run the row cannot be learnt from."""
        frames = encoder_frames(example.mel_frames) if example.features is None else len(example.features)
        unknown = [token for token in example.transcript if token not in self.classes]
        if not unknown:
            target = [self.classes[token] for token in example.transcript]
            if can_align(self.num_audio_tokens(frames), target):
                return replace(example, readout=target)
            room = self.num_audio_tokens(frames)
            reason = f"{len(target)} tokens in {room} places: more text than its speech can hold"
        else:
            reason = (
                f"token {self.tokenizer.decode([unknown[0]])!r} is not in the adapter's read-out vocabulary"
            )
        return reason if self.taught.loss == "ctc" else example


def _pair(row: Utterance) -> tuple[str, str]:
    return row.instruction or "", str(row.extra.get("order", "speech-first"))


def _order(order: str) -> Order:
    return order  # type: ignore[return-value]  # frame_prompt checks it and names it


def _frames_of_audio(row: Utterance) -> int | str:
    """Encoder frames by the manifest's duration, else by the file's header; the reason when it cannot be
    read.
    """
    try:
        seconds = (
            row.duration if row.duration is not None else probe_audio(row.audio).seconds - (row.start or 0.0)
        )
    except AudioError as error:
        return str(error)
    return encoder_frames(mel_frames(max(1, round(seconds * SAMPLE_RATE))))


def lengths_for(reader: ExampleReader, rows: NDArray[np.void]) -> NDArray[np.int64]:
    """What each table row costs, in positions of the LLM's sequence (encoder frames for ctc): the plan's
    measure.
    """
    assert rows.dtype == ROW
    frames = rows["frames"].astype(np.int64)
    if reader.taught.loss == "ctc":
        return frames
    if reader.taught.reads_out:
        return np.where(rows["no_speech"], frames // 8, rows["transcript"]) + rows["tail"]
    return reader.num_audio_tokens(frames) + rows["tail"]
