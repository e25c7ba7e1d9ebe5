"""Requests, answers and errors in the form of OpenAI's API.

In:  JSON of /v1/chat/completions; texts; refusals. Out: `ChatRequest`; answers, whole or as server-sent events;
     error objects.
Try: `ChatRequest.model_validate({"model": "blsp-tiny", "messages": [{"role": "user", "content": "Hi"}]})`
Flow: app.py → **api.py**. Every refusal is an `ApiError`.

Unknown fields are ignored, as OpenAI-compatible servers do; fields that would change the answer and are not supported
(`n` above 1, tools, logprobs, penalties, spoken answers …) are refused by name.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import AfterValidator, BaseModel, Field, model_validator


class ApiError(Exception):
    """A refusal: an HTTP status and OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        param = _sendable(self.param) if self.param else None
        return {"error": {"message": _sendable(self.message), "type": kind, "param": param, "code": self.code}}


def _sendable(text: str) -> str:
    """The text without lone surrogates, which cannot be encoded: messages may repeat what a client sent."""
    return text.encode(errors="replace").decode()


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"holds half a character (a lone surrogate at {error.start})") from error
    return text


Text = Annotated[str, AfterValidator(_encodable)]


class InputAudio(BaseModel):
    data: str
    """base64 of a file"""
    format: str = "wav"


class TextPart(BaseModel):
    type: Literal["text"]
    text: Text


class AudioPart(BaseModel):
    type: Literal["input_audio"]
    input_audio: InputAudio


class AudioUrl(BaseModel):
    url: str
    """a data-URI; with --allow-remote-audio also https://…"""


class AudioUrlPart(BaseModel):
    type: Literal["audio_url"]
    audio_url: AudioUrl


Part = Annotated[TextPart | AudioPart | AudioUrlPart, Field(discriminator="type")]


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]

    @model_validator(mode="after")
    def _only_users_speak(self) -> Message:
        text_only = isinstance(self.content, str) or all(isinstance(part, TextPart) for part in self.content)
        if self.role != "user" and not text_only:
            raise ValueError(f"audio in a message of role {self.role!r}: only the user speaks")
        return self


class StreamOptions(BaseModel):
    include_usage: bool = False


NEUTRAL: dict[str, Any] = {  # fields that are not supported, and their value that asks for nothing
    "n": 1,
    "logprobs": False,
    "top_logprobs": 0,
    "tools": [],
    "functions": [],
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "audio": None,
    "logit_bias": {},
    "frequency_penalty": 0,
    "presence_penalty": 0,
}


class ChatRequest(BaseModel, extra="allow"):  # other fields are kept, so that NEUTRAL can be checked
    model: str | None = None
    messages: list[Message] = Field(min_length=1, max_length=512)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    """left out: greedy"""
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Text | list[Text] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _only_supported_fields(self) -> ChatRequest:
        for name, neutral in NEUTRAL.items():
            if (value := (self.model_extra or {}).get(name)) and value != neutral:
                raise ValueError(f"{name}: not supported by this server; leave it out")
        if self.messages[-1].role != "user":
            raise ValueError("messages: the last one must be the user's")
        if len(self.stops) > 4 or any(not 0 < len(stop) <= 100 for stop in self.stops):
            raise ValueError("stop: at most four strings of 1 to 100 characters")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


def completion(head: dict[str, Any], text: str, finish: str, usage: dict[str, Any]) -> Response:
    """A whole answer."""
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
    return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": usage})


def delta(content: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    """The part of one chunk of a streamed answer that is new."""
    return {"choices": [{"index": 0, "delta": content, "finish_reason": finish, "logprobs": None}]}


def transcript(text: str, response_format: str) -> Response:
    return PlainTextResponse(text + "\n") if response_format == "text" else JSONResponse({"text": text})


async def transcript_events(pieces: AsyncIterator[str]) -> AsyncIterator[dict[str, Any]]:
    """OpenAI's events of a transcript that grows; an error ends it."""
    text = ""
    try:
        async for piece in pieces:
            added = f" {piece}" if text else piece
            text += added
            yield {"type": "transcript.text.delta", "delta": added}
        yield {"type": "transcript.text.done", "text": text}
    except ApiError as error:
        yield error.body()


def events(chunks: AsyncIterator[dict[str, Any] | str]) -> Response:
    """Server-sent events, one per chunk."""

    async def lines() -> AsyncIterator[str]:
        async for chunk in chunks:
            yield f"data: {chunk if isinstance(chunk, str) else json.dumps(chunk, ensure_ascii=False)}\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream")
