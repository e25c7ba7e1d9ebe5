"""Routes for transcripts of speech, and for translations into English.

In:  an uploaded recording, and options. Out: JSON, text or subtitles, whole or as server-sent events.
Try: `curl localhost:8000/v1/audio/transcriptions -F file=@question.wav -F response_format=srt`
Flow: app.py → **transcription.py** → audio_input.py → exchange.py → scheduler.py; inference/transcript.py (formats)

A recording is cut at pauses into pieces of a good length for the model, which are processed one after another.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from fastapi import File, Form, Request, UploadFile
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

from blsp.data.audio import SAMPLE_RATE
from blsp.evaluation.routes import supports_language
from blsp.inference.pauses import pieces_of
from blsp.inference.subtitles import Segment, segments_of
from blsp.inference.transcript import Transcript
from blsp.inference.word_times import sounding
from blsp.llm.instructions import instruction_for
from blsp.serving import api
from blsp.serving.audio_input import until
from blsp.serving.errors import refusal
from blsp.serving.exchange import client_of, joined, while_connected
from blsp.serving.shared_recogniser import RECOGNISER

if TYPE_CHECKING:
    from blsp.serving.app import Service

FORMATS = ("json", "text", "verbose_json", "srt", "vtt")
TIMED = ("verbose_json", "srt", "vtt")
GRANULARITIES = ("segment", "word")
MAX_TOKENS = 256  # of a piece
SHOWN = (  # examples of translations for the LLM; without them a small LLM answers the questions (docs/log.md)
    ("Wo ist der Bahnhof?", "Where is the train station?"),
    ("Quelle heure est-il ?", "What time is it?"),
    ("What is your name?", "What is your name?"),
)
NOT_TAKEN = ("include", "known_speaker_names", "known_speaker_references")  # fields of a form

Task = Literal["transcribe", "translate"]
ROUTES: dict[Task, str] = {"transcribe": "transcriptions", "translate": "translations"}


@dataclass(frozen=True)
class Wanted:
    """The wanted form of a recording's text. language: a code of Whisper's, or None if it was not given."""

    task: Task
    format: str
    granularities: tuple[str, ...]
    language: str | None
    temperature: float
    stream: bool = False
    recogniser: bool = False

    @property
    def timed(self) -> bool:
        return self.format in TIMED


class Transcriptions:
    """The two routes, around a `Service`."""

    def __init__(self, service: Service) -> None:
        self.service, self.listener = service, service.listener
        self.english_only = not supports_language(self.listener, "other")

    async def transcriptions(
        self,
        request: Request,
        file: Annotated[UploadFile, File()],
        model: Annotated[str | None, Form()] = None,
        language: Annotated[str | None, Form()] = None,
        prompt: Annotated[str | None, Form()] = None,
        response_format: Annotated[str, Form()] = "json",
        temperature: Annotated[float, Form(ge=0, le=2)] = 0.0,
        stream: Annotated[bool, Form()] = False,
    ) -> Response:
        """Transcribe: the adapter's read-out if it has one, otherwise the LLM's repetition. model=recogniser: the
        recogniser of the page's comparison instead."""
        wanted = Wanted(
            "transcribe",
            response_format,
            _granularities(await request.form()),
            language_code(language) if language else None,
            temperature,
            stream,
            model == RECOGNISER,
        )
        return await self._write(request, file, wanted)

    async def translations(
        self,
        request: Request,
        file: Annotated[UploadFile, File()],
        model: Annotated[str | None, Form()] = None,
        prompt: Annotated[str | None, Form()] = None,
        response_format: Annotated[str, Form()] = "json",
        temperature: Annotated[float, Form(ge=0, le=2)] = 0.0,
        stream: Annotated[bool, Form()] = False,
    ) -> Response:
        """Translate speech into English, by the LLM. A model that hears English alone transcribes."""
        wanted = Wanted(
            "translate",
            response_format,
            _granularities(await request.form()),
            None,
            temperature,
            stream,
            model == RECOGNISER,
        )
        return await self._write(request, file, wanted)

    async def _write(self, request: Request, file: UploadFile, wanted: Wanted) -> Response:
        began = time.monotonic()
        self._check(await request.form(), wanted)
        self.service.scheduler.check_room(client_of(request))
        clip = (await self.service.audio.clips([await file.read()], request, request.state.end))[0]
        seconds = round(len(clip) / SAMPLE_RATE, 3)
        spoken, route = self._spoken(request, clip, wanted), ROUTES[wanted.task]
        if wanted.stream:
            texts: list[str] = []
            return api.events(self.service.streamed(route, began, events(spoken, seconds, texts), texts))
        transcript = await self._transcript(spoken, seconds, wanted)
        self.service.log_answer(route, 200, began, None, transcript.text)
        return answer(transcript, wanted, self._language(wanted))

    # --- checks -------------------------------------------------------------------------------------------

    def _check(self, form: FormData, wanted: Wanted) -> None:
        """Refuse, by name, unsupported fields that would change the transcript."""
        refused = dict.fromkeys((name for name in NOT_TAKEN if form.get(name) or form.get(f"{name}[]")), "is")
        if len(form.getlist("file")) > 1:
            raise refusal("file", "is given more than once; send each recording by itself", "invalid_value")
        if form.get("prompt"):
            refused["prompt"] = "a text before the speech is"
        chunked = any(name.startswith("chunking_strategy[") for name in form)  # as OpenAI's client sends an object
        if chunked or form.get("chunking_strategy", "auto") != "auto":
            refused["chunking_strategy"] = "anything but auto is"
        if wanted.stream and wanted.task == "translate":
            refused["stream"] = "a translation in pieces is"
        for name, what in refused.items():
            raise refusal(name, f"{what} not supported by this server; leave it out", "unsupported_parameter")
        if wanted.format not in FORMATS:
            text = f"{wanted.format!r:.40} is not supported; {', '.join(FORMATS)} are"
            raise refusal("response_format", text, "unsupported_value")
        if wanted.recogniser:
            if wanted.task == "translate":
                raise refusal("model", f"the {RECOGNISER} does not translate; leave it out", "unsupported_value")
            if wanted.timed:
                raise refusal("response_format", f"the {RECOGNISER} finds no times; json or text", "unsupported_value")
        elif wanted.language not in (None, "en") and self.english_only:
            text = f"this model hears English alone, not {LANGUAGES[wanted.language]}; serve another with --model"
            raise refusal("language", text, "unsupported_value")
        if wanted.temperature and (wanted.recogniser or self._reads_out(wanted)):
            text = "nothing is drawn in a transcript that is read out of the speech; leave it out or send 0"
            raise refusal("temperature", text, "unsupported_value")
        if wanted.stream and wanted.timed:
            raise refusal("stream", f"{wanted.format} is written whole; stream json or text", "unsupported_value")
        self._check_granularities(wanted)

    def _check_granularities(self, wanted: Wanted) -> None:
        name = "timestamp_granularities"
        if wanted.granularities and wanted.format != "verbose_json":
            raise refusal(name, "needs response_format verbose_json", "invalid_value")
        if unknown := set(wanted.granularities) - set(GRANULARITIES):
            raise refusal(name, f"{min(unknown)!r:.40} must be word or segment", "invalid_value")
        if "word" in wanted.granularities and not self._reads_out(wanted):
            raise refusal(
                name, "the words of this text have no times, only its segments; leave out word", "unsupported_value"
            )

    def _reads_out(self, wanted: Wanted) -> bool:
        """Whether the answer is the adapter's read-out; otherwise the LLM writes it."""
        return self.listener.reads_out and (wanted.task == "transcribe" or self.english_only)

    def _language(self, wanted: Wanted) -> str:
        """The English name of the text's language, in OpenAI's spelling."""
        english = wanted.task == "translate" or self.english_only
        return "english" if english else LANGUAGES[wanted.language] if wanted.language else "unknown"

    # --- the transcript -----------------------------------------------------------------------------------

    async def _spoken(self, request: Request, clip: np.ndarray, wanted: Wanted) -> AsyncIterator[Segment]:
        """The text of each piece of the recording, with its time in the recording."""
        settings = self.service.settings
        if wanted.recogniser:
            seconds = request.state.end - time.monotonic()
            work = self.service.recogniser.transcribe(clip, wanted.language, seconds)
            yield Segment(0.0, len(clip) / SAMPLE_RATE, await while_connected(request, work))
            return
        decoding = replace(
            self.listener.decoding,
            max_new_tokens=min(MAX_TOKENS, settings.max_new_tokens),
            temperature=wanted.temperature,
        )
        readout = self._reads_out(wanted)
        no_speech = self.listener.model.config.no_speech_sentence
        end = request.state.end
        for piece in await while_connected(request, until(end, run_in_threadpool(pieces_of, clip))):
            exchange = self.service.ask(
                [{"role": "user", "parts": [piece.audio]}] if readout else self._messages(wanted, piece.audio),
                decoding,
                readout=readout,
                client=client_of(request),
                starts_at=piece.start if wanted.timed and readout else None,
                end=end,
            )
            await while_connected(request, exchange.started(), exchange)
            text = (await while_connected(request, joined(exchange.pieces()), exchange)).strip()
            if text and text != no_speech:
                yield Segment(*sounding(piece), text, exchange.words)

    def _messages(self, wanted: Wanted, clip: np.ndarray) -> list[dict[str, Any]]:
        """The messages for the LLM about a piece."""
        translated = wanted.task == "translate" and not self.english_only
        instruction = instruction_for("translate:en" if translated else "repeat") + "\n"
        messages: list[dict[str, Any]] = []
        for foreign, english in SHOWN if translated else ():
            messages.append({"role": "user", "parts": [instruction + foreign]})
            messages.append({"role": "assistant", "parts": [english]})
        return [*messages, {"role": "user", "parts": [instruction, clip]}]

    async def _transcript(self, spoken: AsyncIterator[Segment], seconds: float, wanted: Wanted) -> Transcript:
        pieces = [piece async for piece in spoken]
        text = " ".join(piece.text for piece in pieces)
        if not self._reads_out(wanted):
            return Transcript(text, seconds, "pieces", tuple(pieces))
        words = [word for piece in pieces for word in piece.words]
        return Transcript(text, seconds, "readout", tuple(segments_of(words)))


def _granularities(form: Any) -> tuple[str, ...]:
    name = "timestamp_granularities"
    return tuple(filter(None, [*form.getlist(f"{name}[]"), *form.getlist(name)]))


def language_code(language: str) -> str | None:
    """Whisper's code of a language, from a code, a name, or a tag such as en-US.

    None for `auto`, as clients of whisper.cpp send it.
    """
    name = language.strip().lower()
    if name == "auto":
        return None
    for code in (name, name.partition("-")[0], TO_LANGUAGE_CODE.get(name)):
        if code in LANGUAGES:
            return str(code)
    raise refusal("language", f"{language!r:.40} is not known; send an ISO 639-1 code such as en", "invalid_value")


# --- forms of the answer ------------------------------------------------------------------------------------


def answer(transcript: Transcript, wanted: Wanted, language: str) -> Response:
    """The transcript in the wanted format."""
    texts = {"text": lambda: transcript.text + "\n", "srt": transcript.srt, "vtt": transcript.vtt}
    if wanted.format in texts:
        media = "text/vtt" if wanted.format == "vtt" else "text/plain"
        return PlainTextResponse(texts[wanted.format](), media_type=media)
    body: dict[str, Any] = {"text": transcript.text, "usage": usage(transcript.seconds)}
    if wanted.format == "verbose_json":
        body |= {"task": wanted.task, "language": language, "duration": transcript.seconds, "times": transcript.times}
        granularities = wanted.granularities or ("segment",)
        if "segment" in granularities:
            body["segments"] = [_segment(number, segment) for number, segment in enumerate(transcript.segments)]
        if "word" in granularities:
            body["words"] = [word.row() for segment in transcript.segments for word in segment.words]
    return JSONResponse(body)


def _segment(number: int, segment: Segment) -> dict[str, Any]:
    return {"id": number, "start": segment.start, "end": segment.end, "text": segment.text}


def usage(seconds: float) -> dict[str, Any]:
    return {"type": "duration", "seconds": seconds}


async def events(
    spoken: AsyncIterator[Segment], seconds: float, texts: list[str]
) -> AsyncGenerator[dict[str, Any], None]:
    """OpenAI's events of a transcript that grows; its pieces are added to `texts`."""
    async for piece in spoken:
        texts.append(f" {piece.text}" if texts else piece.text)
        yield {"type": "transcript.text.delta", "delta": texts[-1]}
    yield {"type": "transcript.text.done", "text": "".join(texts), "usage": usage(seconds)}
