"""Rows of the data as examples (speech, prompt, transcript, response, teacher), and their lengths.

In:  rows of a manifest, the feature cache or the audio itself, the tokenizer.
Out: `RowMeasurer`: each row's lengths, which the order of the data needs. `ExampleReader`: a row as an `Example`. A
     row that cannot be used for training is `Refused`, with the reason.
Try: ``reader.example(dataset.rows[0], epoch=0)``
Flow: training/dataset.py -> **examples.py** -> training/step.py
      Examples are numpy arrays and lists; a thread reads them ahead.

Shapes: T encoder frames, E encoder width, M mel bins, Tm mel frames, n response tokens, K stored top-k.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase, WhisperFeatureExtractor

from blsp.data.audio import SAMPLE_RATE, AudioError, is_silent, probe_audio
from blsp.data.clips import load_clip
from blsp.data.manifest import Utterance
from blsp.features.align import TokenTimes, token_places
from blsp.features.cache import FeatureCache
from blsp.llm.prompt import PromptTemplate, prompt_template, text_ids, transcript_ids
from blsp.model.speech_encoder import FRAMES_PER_SECOND, encoder_frames, mel_features, mel_frames
from blsp.training.augmentation import Kind, augment, hide_spans
from blsp.training.dataset import ROW, Dataset, Measures, Refused
from blsp.training.losses import can_align

Need = Literal["continuation", "teacher", "readout", "token_times", "fits"]

ANY_TEMPLATE = np.iinfo(np.uint32).max  # a row without its own instruction: it gets another row's prompt


@dataclass(frozen=True)
class Example:
    """One clip and its training targets.

    features (T, E) from the cache; or mel (M, Tm) of `mel_frames` true frames, to be encoded in the step.
    response: token ids, with the end token if the answer stopped by itself; empty if the LLM is not run.
    teacher: ids and log-probabilities (n, K) of the text route at the response's positions.
    readout: the transcript as CTC classes; [] for no speech, None without a CTC term.
    places (U,): the adapter's place of each transcript token; empty for no speech, None without an embed term.
    fits: whether the adapter has a place for each transcript token; False without an embed-ctc term.
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
    places: NDArray[np.int64] | None = None
    fits: bool = False
    text: str = ""

    @property
    def encoder_frames(self) -> int:
        return encoder_frames(self.mel_frames) if self.features is None else len(self.features)


@dataclass(frozen=True)
class Targets:
    """The targets that a run needs in a row.

    needs: of the loss; a row without one of them is refused. extras: of further terms; a row may be without them.
    runs_llm: whether the loss runs the LLM over a response. reads_out: whether the adapter reads out tokens; then the
    adapter recognises clips without speech, and the LLM gets no such clip.
    """

    needs: frozenset[Need]
    extras: frozenset[Need] = frozenset()
    runs_llm: bool = True
    reads_out: bool = False

    def __contains__(self, need: Need) -> bool:
        return need in self.needs or need in self.extras


class RowTexts:
    """The texts of rows as token ids: transcripts, prompts and responses.

    end: the token that ends an answer. no_speech: ids of the set answer to a clip without speech.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end: int, no_speech_sentence: str) -> None:
        self.tokenizer, self.end = tokenizer, end
        self.no_speech = [*text_ids(tokenizer, no_speech_sentence), end]
        self._templates: dict[tuple[str, str], PromptTemplate] = {}

    def transcript(self, row: Utterance) -> list[int]:
        return [] if row.no_speech else transcript_ids(self.tokenizer, row.text)

    def template(self, instruction: str, order: str) -> PromptTemplate:
        """The prompt around the speech."""
        key = (instruction, order)
        if key not in self._templates:
            checked: Any = order  # `prompt_template` refuses an order that it does not know
            self._templates[key] = prompt_template(self.tokenizer, instruction, checked)
        return self._templates[key]

    def response(self, row: Utterance) -> list[int]:
        """The LLM's answer, with the end token if it stopped by itself; an answer that was cut off teaches no end."""
        if "continuation" not in row.extra:
            raise Refused("has no continuation: write one with blsp continue")
        ids = row.extra.get("continuation_ids")
        if ids is None:  # a server wrote it and gave no ids
            ids = text_ids(self.tokenizer, str(row.extra["continuation"]))
        response = [*ids, self.end] if row.extra.get("finish") == "stop" else list(ids)
        if not response:
            raise Refused("its continuation is empty")
        return response


def _prompt_of(row: Utterance) -> tuple[str, str]:
    return row.instruction or "", str(row.extra.get("order", "speech-first"))


# --- measuring rows ---------------------------------------------------------------------------------------
@dataclass
class RowMeasurer:
    """Gives the lengths of rows without reading their speech, and collects the prompts that they use.

    templates: (instruction, order) pairs in the order in which rows first use them.
    """

    targets: Targets
    texts: RowTexts
    cache: FeatureCache | None = None
    max_seconds: float = math.inf
    templates: list[tuple[str, str]] = field(default_factory=list)
    _numbers: dict[tuple[str, str], int] = field(default_factory=dict)

    def measure(self, rows: Sequence[Utterance]) -> list[Measures | Refused]:
        """The lengths of each row, or why it cannot be used for training."""
        cached: Sequence[int | None] = [None] * len(rows)
        if self.cache is not None:
            cached = self.cache.lengths(self.cache.keys(rows, check=False)).tolist()
        measured: list[Measures | Refused] = []
        for row, frames in zip(rows, cached, strict=True):
            try:
                measured.append(self._measure(row, frames))
            except Refused as refusal:
                measured.append(refusal)
        return measured

    def _measure(self, row: Utterance, frames: int | None) -> Measures:
        """frames: encoder frames of the clip in the cache; None: by the manifest or the file's header."""
        transcript, after_audio = self.text_lengths(row)
        frames = _frames_of_audio(row) if frames is None else frames
        if not frames:
            raise Refused("its features are not in the cache: the audio could not be encoded")
        seconds = frames / FRAMES_PER_SECOND
        if seconds > self.max_seconds:
            raise Refused(f"{seconds:.1f} s of speech, longer than --max-seconds {self.max_seconds:g}")
        return Measures(self._template_number(row), frames, transcript, after_audio, row.no_speech)

    def text_lengths(self, row: Utterance) -> tuple[int, int]:
        """(transcript tokens, tokens after the audio) of a row; 0 transcript tokens if it is not known."""
        if not row.audio:
            raise Refused("no audio")
        if row.no_speech:
            return 0, len(self.texts.no_speech)
        told = bool(row.text.strip())
        if not told and self.targets.needs - {"continuation"}:  # every other target is made of the transcript
            raise Refused("no transcript")
        if not self.targets.runs_llm:
            return max(1, len(row.text) // 4), 0  # an estimate, as only the length of the speech matters here
        response = self.texts.response(row)
        template = self.texts.template(*_prompt_of(row))
        prompt_tokens = row.extra.get("prompt_tokens")
        if prompt_tokens is None:
            transcript = len(self.texts.transcript(row))
        else:  # `blsp continue` counted the whole prompt
            transcript = int(prompt_tokens) - len(template.prefix_ids) - len(template.suffix_ids)
        return max(1, transcript) if told else 0, len(template.suffix_ids) + len(response) - 1

    def _template_number(self, row: Utterance) -> int:
        """Index of the row's (instruction, order) pair; a new pair gets the next one."""
        if not self.targets.runs_llm or (row.no_speech and row.instruction is None):
            return int(ANY_TEMPLATE)
        prompt = _prompt_of(row)
        if prompt not in self._numbers:
            self._numbers[prompt] = len(self.templates)
            self.templates.append(prompt)
        return self._numbers[prompt]


def _frames_of_audio(row: Utterance) -> int:
    """Encoder frames by the manifest's duration, else by the file's header."""
    seconds = row.duration
    if seconds is None:
        try:
            seconds = probe_audio(row.audio).seconds - (row.start or 0.0)
        except AudioError as error:
            raise Refused(str(error)) from error
    return encoder_frames(mel_frames(max(1, round(seconds * SAMPLE_RATE))))


# --- reading examples -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ExampleReader:
    """Reads measured rows as examples.

    classes: LLM token -> CTC class, for targets with a read-out. num_audio_tokens: encoder frames -> placeholders,
    of one clip or of an array. augmentation: `mask` for cached features, the other kinds for audio.
    times, centres: for targets with token times; centres: of the adapter's places (`place_centres`).
    """

    targets: Targets
    texts: RowTexts
    dataset: Dataset
    extractor: WhisperFeatureExtractor
    num_audio_tokens: Callable[[Any], Any]
    classes: dict[int, int] = field(default_factory=dict)
    cache: FeatureCache | None = None
    times: TokenTimes | None = None
    centres: tuple[int, float] = (1, 0.0)
    augmentation: tuple[Kind, ...] = ()
    full_window: bool = False
    seed: int = 0

    def lengths(self, rows: NDArray[np.void]) -> NDArray[np.int64]:
        """Each row's length in a pass: positions of the LLM's sequence, or encoder frames if it is not run."""
        assert rows.dtype == ROW
        frames = rows["encoder_frames"].astype(np.int64)
        if not self.targets.runs_llm:
            return frames
        if self.targets.reads_out:  # one vector a token that is read out
            tokens = rows["transcript_tokens"]
            speech = np.where(tokens == 0, frames // 8, tokens)  # no speech, or no transcript: an estimate
        else:
            speech = self.num_audio_tokens(frames)
        return speech + rows["tokens_after_audio"]

    def template(self, row: np.void) -> PromptTemplate:
        """The prompt around a row's speech; a row without one gets that of another row, chosen by its id."""
        templates = self.dataset.templates
        if not templates:
            return PromptTemplate((), ())
        number = int(row["template"])
        return self.texts.template(
            *templates[number if number != ANY_TEMPLATE else int(row["id_hash"]) % len(templates)]
        )

    def example(self, row: np.void, epoch: int) -> Example:
        """The example of a row, augmented as `epoch` says; raises `Refused`."""
        utterance = self.dataset.utterance(row)
        response: list[int] = []
        if self.targets.runs_llm and not utterance.no_speech:
            response = self.texts.response(utterance)
        elif self.targets.runs_llm and not self.targets.reads_out:  # otherwise silence has a fixed answer
            response = self.texts.no_speech
        example = Example(
            id=utterance.id,
            template=self.template(row),
            transcript=self.texts.transcript(utterance),
            response=response,
            no_speech=utterance.no_speech,
            text=utterance.text,
            **self._speech(utterance, (self.seed, epoch, int(row["id_hash"]))),
        )
        teacher = self.dataset.sources[int(row["source"])].teacher
        if teacher is not None and response and not example.no_speech:
            ids, logp = teacher.get(int(row["row"]))
            if len(ids) != len(response):
                raise Refused(f"stored top-k has {len(ids)} steps, its continuation {len(response)}")
            example = replace(example, teacher=(ids, logp))
        example = self._with_extra(example, "readout", self._readout)
        example = self._with_extra(example, "fits", self._fitting)
        return self._with_extra(example, "token_times", lambda each: self._placed(each, utterance))

    def _speech(self, row: Utterance, key: tuple[int, ...]) -> dict[str, Any]:
        """The row's speech, as fields of its example. key: of the augmentation."""
        if self.cache is not None:
            features = np.array(self.cache.get(self.cache.key(row, check=False)))  # (T, E), read from disk here
            if "mask" in self.augmentation:
                features = hide_spans(features, key)
            return {"features": features, "seconds": len(features) / FRAMES_PER_SECOND}
        try:
            audio = load_clip(row)  # (samples,)
        except AudioError as error:
            raise Refused(str(error)) from error
        if row.text.strip() and not row.no_speech and is_silent(audio):  # `blsp encode` leaves it out, too
            raise Refused(f"silence under a transcript: {row.text}")
        if self.augmentation:
            audio = augment(audio, self.augmentation, key)
        mel, _ = mel_features(self.extractor, [audio], full_window=self.full_window)  # (1, M, Tm)
        return {"mel": mel[0].numpy(), "mel_frames": mel_frames(len(audio)), "seconds": len(audio) / SAMPLE_RATE}

    def _with_extra(self, example: Example, need: Need, add: Callable[[Example], Example]) -> Example:
        """The example with a further target, if the run needs it."""
        if need not in self.targets:
            return example
        try:
            if not (example.transcript or example.no_speech):  # an empty target would say that nothing is spoken
                raise Refused("no transcript")
            return add(example)
        except Refused:
            if need in self.targets.needs:
                raise
            return example

    def _readout(self, example: Example) -> Example:
        """The example with its transcript as CTC classes."""
        unknown = [token for token in example.transcript if token not in self.classes]
        if unknown:
            token = self.texts.tokenizer.decode([unknown[0]])
            raise Refused(f"token {token!r} is not in the adapter's read-out vocabulary")
        target = [self.classes[token] for token in example.transcript]
        room = int(self.num_audio_tokens(example.encoder_frames))
        if not can_align(room, target):
            raise Refused(f"{len(target)} tokens in {room} places: more text than its speech can hold")
        return replace(example, readout=target)

    def _fitting(self, example: Example) -> Example:
        """The example, if the adapter has a place for each token."""
        room = int(self.num_audio_tokens(example.encoder_frames))
        if len(example.transcript) > room:
            raise Refused(f"{len(example.transcript)} tokens in {room} places: more text than its speech can hold")
        return replace(example, fits=True)

    def _placed(self, example: Example, row: Utterance) -> Example:
        """The example with the adapter's place of each of its transcript's tokens."""
        if example.no_speech:
            return replace(example, places=np.empty(0, np.int64))
        assert self.cache is not None and self.times is not None  # `check_loss` sees to it
        times = self.times.get(self.cache.key(row, check=False), example.transcript)
        if times is None:
            raise Refused("the times of its tokens are not known: run blsp align over its manifest")
        room = int(self.num_audio_tokens(example.encoder_frames))
        places = token_places(times, room, *self.centres)
        if places is None:
            raise Refused(f"{len(times)} tokens in {room} places: more text than its speech can hold")
        return replace(example, places=places)
