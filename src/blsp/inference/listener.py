"""The `Listener`: a loaded model that answers speech with text. `blsp.load()` returns one.

In:  clips (path, bytes, data-URI or 16 kHz array), and an optional instruction (a spoken question needs none).
Out: answers, streams of text, transcripts.
Try: `blsp.load().answer("question.wav")`
Flow: inference/ — `blsp generate`, `transcribe`, `chat`, the evaluation and the server all use a `Listener`.

A clip's vectors are put between the prompt's prefix, whose key/values are cached, and its suffix. If no speech is
found, the answer is the model's fixed sentence, and the LLM does not run.

Shapes: N samples, T encoder frames, E encoder width, n vectors of a clip, L prompt after its prefix, D LLM width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blsp.data.audio import SAMPLE_RATE, is_silent
from blsp.distributed import find_runtime
from blsp.inference.transcript import samples_of, transcripts
from blsp.llm.decoding import Decoder, Decoding, Event, Request, TextStream, answer_text, decode
from blsp.llm.instructions import instruction_for
from blsp.llm.language_model import embed, stop_ids
from blsp.llm.prefix import PrefixCache
from blsp.llm.prompt import Order, prompt_template, transcript_ids
from blsp.llm.sharding import run_together
from blsp.model.adapter_parts import AudioEmbeds
from blsp.model.checkpoint import load_blsp
from blsp.model.hypotheses import BEAM, choose
from blsp.model.modeling_blsp import BlspForConditionalGeneration
from blsp.model.processing_blsp import BlspProcessor
from blsp.model.speech_encoder import batches_by_length, encode_speech, mel_features
from blsp.settings import DEFAULT_MODEL

PREFIXES_KEPT = 32
ZERO_SHOT_TOKENS = 128  # the paper's setting for answers without training on the task
SECONDS_PER_BATCH = 60  # speech that is encoded in one pass, with padding


@dataclass(frozen=True)
class Question:
    """A clip, or (for the text route) its transcript, with an instruction."""

    audio: Any = None
    text: str | None = None
    instruction: str = ""
    order: Order = "instruction-first"


class Listener:
    """A loaded model, with the key/values of the prompt prefixes that it has used."""

    def __init__(self, model: BlspForConditionalGeneration, processor: BlspProcessor) -> None:
        self.model = model.eval()
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.decoding = Decoding(max_new_tokens=ZERO_SHOT_TOKENS, stop_ids=stop_ids(model))
        self.prefixes = PrefixCache(model, PREFIXES_KEPT)

    # --- answers --------------------------------------------------------------------------------------------
    def answer(self, audio: Any, instruction: str = "", *, max_new_tokens: int = ZERO_SHOT_TOKENS) -> str:
        """The answer to a spoken question, or to `instruction` about the speech."""
        decoding = replace(self.decoding, max_new_tokens=max_new_tokens)
        return self.generate([Question(audio=audio, instruction=instruction)], decoding=decoding)[0]

    def stream(self, audio: Any, instruction: str = "", *, max_new_tokens: int = ZERO_SHOT_TOKENS) -> Iterator[str]:
        """The same answer, piece by piece while it is generated."""
        clip = self.embed_audio([audio])[0]
        if not clip.speech:
            yield self.model.config.no_speech_sentence
            return
        decoding = replace(self.decoding, max_new_tokens=max_new_tokens)
        request = self.request(0, Question(instruction=instruction), clip, decoding)
        text = TextStream(self.tokenizer)
        for event in decode_alone(Decoder(self.model), request):
            piece = text.push(event.token) if event.finish != "stop" else ""
            if piece:
                yield piece
        if rest := text.close():
            yield rest

    def generate(
        self, questions: Sequence[Question], *, decoding: Decoding | None = None, batch_size: int = 16
    ) -> list[str]:
        """Answers in the order of the questions; speech and text may be mixed.

        The n-th question's samples are drawn with the seed `decoding.seed + n`.
        """
        decoding = decoding or self.decoding
        spoken = [i for i, question in enumerate(questions) if question.audio is not None]
        clips = dict(zip(spoken, self.embed_audio([questions[i].audio for i in spoken]), strict=True))
        answers = {i: self.model.config.no_speech_sentence for i, clip in clips.items() if not clip.speech}
        requests = [
            self.request(i, question, clips.get(i), replace(decoding, seed=decoding.seed + i))
            for i, question in enumerate(questions)
            if i not in answers
        ]
        answers |= self._answers(requests, batch_size)
        return [answers[i] for i in range(len(questions))]

    def _answers(self, requests: list[Request], batch_size: int) -> dict[Any, str]:
        """The text of each request's answer, by its key; the shortest prompts are decoded first."""
        requests = sorted(requests, key=lambda request: len(request.embeds))
        results = decode(self.model, requests, batch_size)
        return {key: answer_text(self.tokenizer, result.ids).strip() for key, result in results.items()}

    # --- transcripts ----------------------------------------------------------------------------------------

    def transcribe(self, audio: Any, **options: Any) -> str:
        """The transcript of one clip; "" if no speech is found. options: of `transcripts`."""
        return self.transcribe_all([audio], **options)[0]

    def transcribe_all(self, audios: Sequence[Any], **options: Any) -> list[str]:
        """The transcript of each clip; `transcripts` (transcript.py) explains the options, and also gives times."""
        return [transcript.text for transcript in transcripts(self, audios, **options)]

    @property
    def reads_out(self) -> bool:
        """Whether the adapter gives a transcript (a read-out)."""
        return self.model.model.reads_out

    def readout(self, clips: Sequence[AudioEmbeds]) -> list[str]:
        """The adapter's read-out of each clip; "" without speech."""
        if not self.reads_out:
            raise ValueError(f"adapter {self.model.config.adapter!r} does not read out")
        return [self.tokenizer.decode(clip.token_ids or []).strip() if clip.speech else "" for clip in clips]

    def repeat(self, clips: Sequence[AudioEmbeds], max_new_tokens: int, batch_size: int) -> list[str]:
        """The LLM's answers to the instruction to repeat the speech; "" without speech."""
        question = Question(instruction=instruction_for("repeat"))
        decoding = replace(self.decoding, max_new_tokens=max_new_tokens)
        spoken = {i: clip for i, clip in enumerate(clips) if clip.speech}
        requests = [self.request(i, question, clip, decoding) for i, clip in spoken.items()]
        answers = self._answers(requests, batch_size)
        return [answers.get(i, "") for i in range(len(clips))]

    # --- from a clip to the prompt --------------------------------------------------------------------------
    @torch.no_grad()
    def embed_audio(
        self, audios: Sequence[Any], *, rescore: bool | None = None, keep_states: bool = False
    ) -> list[AudioEmbeds]:
        """Each clip's vectors, computed in batches of similar length. A clip of digital silence has no speech.

        rescore: let the LLM choose one of the adapter's likeliest read-outs; the vectors are then its embeddings of the
            chosen tokens. None: as in the adapter's configuration. keep_states: also return the encoder's states.
        """
        samples = [samples_of(audio) for audio in audios]
        rescore = self.reads_out and (self.model.config.rescore if rescore is None else rescore)
        clips: dict[int, AudioEmbeds] = {}
        for batch in batches_by_length([len(signal) for signal in samples], SECONDS_PER_BATCH * SAMPLE_RATE):
            states = self.encode([samples[i] for i in batch])
            heard = self.model.listen(states, BEAM if rescore else 0)
            heard = self._rescored(heard) if rescore else heard
            for i, state, clip in zip(batch, states, heard, strict=True):
                clip = replace(clip, speech=clip.speech and not is_silent(samples[i]))
                clips[i] = replace(clip, states=state) if keep_states else clip
        return [clips[i] for i in range(len(samples))]

    def _rescored(self, clips: Sequence[AudioEmbeds]) -> list[AudioEmbeds]:
        """The clips with the hypothesis that has the best score of read-out and LLM together."""
        prefix = self.prefixes.get(prompt_template(self.tokenizer, "", "speech-first").prefix_ids)
        chosen = iter(choose(self.model, prefix, [clip.hypotheses for clip in clips if clip.speech]))
        return [self._with_tokens(clip, next(chosen)) if clip.speech else clip for clip in clips]

    def _with_tokens(self, clip: AudioEmbeds, tokens: tuple[int, ...]) -> AudioEmbeds:
        """The clip read out as `tokens`; its vectors are their embeddings."""
        vectors = embed(self.model, tokens) if tokens else clip.vectors
        return replace(clip, vectors=vectors, token_ids=list(tokens), hypotheses=())

    @torch.no_grad()
    def encode(self, clips: Sequence[np.ndarray]) -> list[Tensor]:
        """The frozen encoder's states (T, E) of each 16 kHz clip (N,)."""
        weight = self.model.lm_head.weight
        full_window = self.model.config.full_window
        features, mask = mel_features(self.processor.feature_extractor, clips, full_window=full_window)
        features, mask = features.to(weight.device), mask.to(weight.device)
        states, lengths = encode_speech(self.model.model.audio_tower, features, mask, full_window=full_window)
        return [row[:length] for row, length in zip(states, lengths.tolist(), strict=True)]

    def request(self, key: Any, question: Question, audio_embeds: AudioEmbeds | None, decoding: Decoding) -> Request:
        """The question as a request of the decoder, with a clip or the question's text between the same ids."""
        template = prompt_template(self.tokenizer, question.instruction, question.order)
        if audio_embeds is not None:
            content = audio_embeds.vectors.to(self.model.lm_head.weight.dtype)  # (n, D)
        else:
            content = embed(self.model, transcript_ids(self.tokenizer, question.text or ""))
        embeds = torch.cat([content, embed(self.model, template.suffix_ids)]).detach()  # (L, D)
        return Request(key, embeds, self.prefixes.get(template.prefix_ids), decoding)


def load(
    model: str | Path = DEFAULT_MODEL,
    *,
    audio_model: str | None = None,
    llm: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    weights: str | None = None,
    rescore: str | None = "auto",
    shard_llm: bool | None = False,
    attn_implementation: str | None = None,
) -> Listener:
    """A `Listener` from a checkpoint folder, a hub id, or the name of a shipped adapter (the default).

    audio_model, llm: where the adapter's encoder and LLM are now, if not where its config.json says. weights: the
    format of the LLM's weights (bfloat16, int8 or int4) if not `dtype`. rescore: whether the LLM chooses one of the
    likeliest read-outs: `always`, `never`, or as in config.json. shard_llm: split the LLM over the
    processes that a launcher has started, which all call this. attn_implementation: of the LLM.
    """
    runtime = find_runtime(device, dtype, weights, shard_llm=bool(shard_llm), attention=attn_implementation)
    loaded, processor = load_blsp(model, runtime, audio_model, llm)
    if runtime.shard_llm:
        run_together(loaded)
    if rescore in ("always", "never"):
        loaded.config.rescore = rescore == "always"
    return Listener(loaded, processor)


def load_options(settings: Any) -> dict[str, Any]:
    """The arguments of `load`, without the model, from a command's flags."""
    names = ("audio_model", "llm", "device", "dtype", "weights", "rescore", "shard_llm", "attn_implementation")
    return {name: getattr(settings, name, None) for name in names}


def decoding_of(settings: Any, listener: Listener) -> Decoding:
    """The decoding settings from a command's flags."""
    names = ("max_new_tokens", "temperature", "top_p", "seed")
    return replace(listener.decoding, **{name: getattr(settings, name) for name in names})


def decode_alone(decoder: Decoder, request: Request) -> Iterator[Event]:
    """The events of a request, run alone in the decoder."""
    events = decoder.join([request])
    while events:
        yield events[0]
        events = decoder.step() if len(decoder) else []
