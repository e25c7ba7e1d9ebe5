"""Speech in, text out: the high-level door.

In:  clips (path, bytes, data-URI or 16 kHz array), an instruction or none (a spoken question answers itself).
Out: answers, streams of text, transcripts.
Try: `blsp.load().answer("question.wav")`
Flow: inference/ — `blsp generate`, `transcribe`, `chat`, the judge and the server ask a `Listener`.

A clip is heard once (encoder, adapter), its vectors are spliced between the prompt's constant prefix, whose
key/values are kept, and its suffix; `llm/decoding.py` writes the answer. Where no speech is heard, the
model's fixed sentence is the answer and the LLM is not asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blsp.data.audio import SAMPLE_RATE, is_silent, load_audio
from blsp.distributed import find_runtime
from blsp.llm.decoding import Decoder, Decoding, Event, Request, decode
from blsp.llm.instructions import instruction_for
from blsp.llm.language_model import embed, stop_ids
from blsp.llm.prefix import PrefixCache
from blsp.llm.prompt import Order, frame_prompt, transcript_ids
from blsp.llm.text_stream import TextStream, answer_text
from blsp.model.adapter_parts import AudioEmbeds
from blsp.model.checkpoint import load_blsp
from blsp.model.hypotheses import weighed
from blsp.model.modeling_blsp import BlspForConditionalGeneration
from blsp.model.processing_blsp import BlspProcessor
from blsp.model.speech_encoder import encode_speech, mel_features
from blsp.settings import DEFAULT_MODEL

PREFIXES_KEPT = 32
BEAM = 16  # hypotheses that the LLM weighs for a transcript
SECONDS_PER_BATCH = 60  # speech encoded at once


@dataclass(frozen=True)
class Question:
    """One thing to answer: a clip, or (for the text route) its transcript, under an instruction."""

    audio: Any = None
    text: str | None = None
    instruction: str = ""
    order: Order = "instruction-first"


def load(model: str | Path = DEFAULT_MODEL, *, device: str = "auto", dtype: str = "auto") -> Listener:
    """A `Listener` from a checkpoint folder, a hub id, or the name of a shipped adapter (the default)."""
    return Listener(*load_blsp(model, find_runtime(device, dtype)))


class Listener:
    """A loaded model that hears and answers; keeps the key/values of the prompt prefixes it has used."""

    def __init__(self, model: BlspForConditionalGeneration, processor: BlspProcessor) -> None:
        self.model = model.eval()
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.decoding = Decoding(
            max_new_tokens=128, stop_ids=stop_ids(model)
        )  # the paper's zero-shot setting
        self.prefixes = PrefixCache(model, PREFIXES_KEPT)

    def answer(self, audio: Any, instruction: str = "", *, max_new_tokens: int = 128) -> str:
        """The answer to a spoken question, or to `instruction` about the speech."""
        decoding = replace(self.decoding, max_new_tokens=max_new_tokens)
        return self.generate([Question(audio=audio, instruction=instruction)], decoding=decoding)[0]

    def stream(self, audio: Any, instruction: str = "", *, max_new_tokens: int = 128) -> Iterator[str]:
        """The same answer, piece by piece as it is written."""
        heard = self.embed_audio([audio])[0]
        if not heard.speech:
            yield self.model.config.no_speech_sentence
            return
        decoding = replace(self.decoding, max_new_tokens=max_new_tokens)
        request = self.request(0, Question(instruction=instruction), heard, decoding)
        text = TextStream(self.tokenizer)
        for event in written(Decoder(self.model), request):
            piece = text.push(event.token) if event.finish != "stop" else ""
            if piece:
                yield piece
        if rest := text.close():
            yield rest

    def transcribe(self, audio: Any, *, readout: bool | None = None) -> str:
        """What was said in one clip; "" where no speech is heard. See `transcribe_all`."""
        return self.transcribe_all([audio], readout=readout)[0]

    def transcribe_all(
        self,
        audios: Sequence[Any],
        *,
        readout: bool | None = None,
        max_new_tokens: int = 256,
        batch_size: int = 16,
    ) -> list[str]:
        """What was said in each clip. Recordings of more than 10 s are cut at pauses and heard piece by piece.

        readout: True: the adapter's own tokens, without the LLM, where it reads out; False: what the LLM repeats;
        None: of the adapter's likeliest read-outs, the one that the LLM finds likeliest; without any, what the LLM
        repeats.
        """
        weigh = readout is None and self.reads_out
        pieces = [(i, piece) for i, audio in enumerate(audios) for piece in cut_at_pauses(_samples(audio))]
        heard = self.embed_audio([piece for _, piece in pieces], beam=BEAM if weigh else 0)
        if weigh:
            texts = self.rescore(heard)
        else:
            texts = self.readout(heard) if readout else self._repeat(heard, max_new_tokens, batch_size)
        said: list[list[str]] = [[] for _ in audios]
        for (i, _), text in zip(pieces, texts, strict=True):
            said[i] += [text] if text else []
        return [" ".join(parts) for parts in said]

    @property
    def reads_out(self) -> bool:
        """Whether the adapter has a transcript of its own."""
        return self.model.model.reads_out

    def readout(self, heard: Sequence[AudioEmbeds]) -> list[str]:
        """The adapter's own transcripts, where it reads out, without the LLM; "" where there was no speech."""
        if not self.reads_out:
            raise ValueError(f"adapter {self.model.config.adapter!r} reads nothing out")
        return [self.tokenizer.decode(clip.token_ids or []).strip() if clip.speech else "" for clip in heard]

    def rescore(self, heard: Sequence[AudioEmbeds]) -> list[str]:
        """Of each clip's hypotheses the one that the LLM, too, finds likely as what a user says; "" for no speech."""
        prefix = self.prefixes.get(frame_prompt(self.tokenizer, "", "speech-first").prefix_ids)
        chosen = [weighed(self.model, prefix, clip.hypotheses) if clip.speech else () for clip in heard]
        return [self.tokenizer.decode(list(tokens)).strip() for tokens in chosen]

    def _repeat(self, heard: Sequence[AudioEmbeds], max_new_tokens: int, batch_size: int) -> list[str]:
        """What the LLM says when it is asked to repeat each clip."""
        question = Question(instruction=instruction_for("repeat"))
        decoding = replace(self.decoding, max_new_tokens=max_new_tokens)
        requests = {
            i: self.request(i, question, clip, decoding) for i, clip in enumerate(heard) if clip.speech
        }
        answers = self._answers(list(requests.values()), batch_size)
        return [answers.get(i, "") for i in range(len(heard))]

    def generate(
        self, questions: Sequence[Question], *, decoding: Decoding | None = None, batch_size: int = 16
    ) -> list[str]:
        """Answers in the order of the questions; speech and text may be mixed.

        The n-th question's samples are drawn with the seed `decoding.seed + n`.
        """
        decoding = decoding or self.decoding
        spoken = [i for i, question in enumerate(questions) if question.audio is not None]
        heard = dict(zip(spoken, self.embed_audio([questions[i].audio for i in spoken]), strict=True))
        answers = {i: self.model.config.no_speech_sentence for i, clip in heard.items() if not clip.speech}
        requests = [
            self.request(i, question, heard.get(i), replace(decoding, seed=decoding.seed + i))
            for i, question in enumerate(questions)
            if i not in answers
        ]
        answers |= self._answers(requests, batch_size)
        return [answers[i] for i in range(len(questions))]

    def _answers(self, requests: list[Request], batch_size: int) -> dict[Any, str]:
        """The text of each request's answer, by its key; the shortest prompts first."""
        requests = sorted(requests, key=lambda request: len(request.embeds))
        results = decode(self.model, requests, batch_size)
        return {key: answer_text(self.tokenizer, result.ids).strip() for key, result in results.items()}

    @torch.no_grad()
    def embed_audio(self, audios: Sequence[Any], *, beam: int = 0) -> list[AudioEmbeds]:
        """Each clip's vectors, encoded in batches of like length. A clip of digital silence holds no speech.

        beam: how many hypotheses of what was said to keep with them.
        """
        clips = [_samples(audio) for audio in audios]
        heard: dict[int, AudioEmbeds] = {}
        for batch in _by_length([len(clip) for clip in clips]):
            states = self.encode([clips[i] for i in batch])
            for i, clip in zip(batch, self.model.listen(states, beam), strict=True):
                heard[i] = replace(clip, speech=clip.speech and not is_silent(clips[i]))
        return [heard[i] for i in range(len(clips))]

    @torch.no_grad()
    def encode(self, clips: Sequence[np.ndarray]) -> list[Tensor]:
        """Frozen encoder states (T, E) of 16 kHz clips, on their true lengths, in one pass."""
        weight = self.model.lm_head.weight
        full_window = self.model.config.full_window
        features, mask = mel_features(self.processor.feature_extractor, clips, full_window=full_window)
        states, lengths = encode_speech(
            self.model.model.audio_tower,
            features.to(weight.device),
            mask.to(weight.device),
            full_window=full_window,
        )
        return [row[:length] for row, length in zip(states, lengths.tolist(), strict=True)]

    def request(self, key: Any, question: Question, heard: AudioEmbeds | None, decoding: Decoding) -> Request:
        """The question as the decoder takes it: both routes share the ids around the speech."""
        frame = frame_prompt(self.tokenizer, question.instruction, question.order)
        if heard is not None:
            middle = heard.vectors.to(self.model.lm_head.weight.dtype)
        else:
            middle = embed(self.model, transcript_ids(self.tokenizer, question.text or ""))
        embeds = torch.cat([middle, embed(self.model, frame.suffix_ids)]).detach()
        return Request(key, embeds, self.prefixes.get(frame.prefix_ids), decoding)


def written(decoder: Decoder, request: Request) -> Iterator[Event]:
    """The events of one request that has the decoder to itself."""
    events = decoder.join([request])
    while events:
        yield events[0]
        events = decoder.step() if len(decoder) else []


def _samples(audio: Any) -> np.ndarray:
    """16 kHz samples (N,) of a path, bytes or data-URI; an array is taken for such."""
    return audio if isinstance(audio, np.ndarray) else load_audio(audio)


def _by_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices grouped by like length, each group at most `SECONDS_PER_BATCH` with its padding."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > SECONDS_PER_BATCH * SAMPLE_RATE:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


LONGEST_SECONDS = 10.0  # adapters learn from single utterances: what is longer is heard worse (docs/log.md)
SEARCHED = 0.5  # the later part of a piece, in which the quietest place is looked for
STEP = SAMPLE_RATE // 50  # samples: 20 ms
PAUSE_STEPS = 10  # a pause is judged over 0.2 s


def cut_at_pauses(audio: np.ndarray, longest: float = LONGEST_SECONDS) -> list[np.ndarray]:
    """`audio` (N,) in pieces of at most `longest` seconds; a short recording is one piece."""
    most = int(longest * SAMPLE_RATE)
    pieces = []
    while len(audio) > most:
        end = _quietest(audio[:most], int(most * (1 - SEARCHED)))
        pieces.append(audio[:end])
        audio = audio[end:]
    return [*pieces, audio]


def _quietest(audio: np.ndarray, begin: int) -> int:
    """The sample from `begin` on in the middle of the quietest 0.2 s; the last of several."""
    energies = np.add.reduceat(
        np.square(audio[begin:], dtype=np.float64), np.arange(0, len(audio) - begin, STEP)
    )
    smooth = np.convolve(energies, np.ones(PAUSE_STEPS), mode="valid")
    last = len(smooth) - 1 - int(smooth[::-1].argmin())
    return begin + (last + PAUSE_STEPS // 2) * STEP
