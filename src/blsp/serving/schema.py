"""Requests as clients of the OpenAI API send them, and errors as they expect them.

In:  JSON of /v1/chat/completions; whatever goes wrong. Out: `ChatRequest`; the error object.
Try: `ChatRequest.model_validate({"model": "blsp-tiny", "messages": [{"role": "user", "content": "Hi"}]})`
Flow: serving/ — app.py reads requests with it; every refusal leaves through `ApiError`.

Unknown fields are ignored, as OpenAI-compatible servers do; fields that would change the answer and are not supported
(`n` above 1, tools, logprobs) are refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator


class ApiError(Exception):
    """A refusal: HTTP status and OpenAI's error object."""

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
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class InputAudio(BaseModel):
    data: str
    """base64 of a file"""
    format: str = "wav"


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


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
    content: str | list[Part]

    @model_validator(mode="after")
    def _speech_is_the_users(self) -> Message:
        written = isinstance(self.content, str) or all(isinstance(part, TextPart) for part in self.content)
        if self.role != "user" and not written:
            raise ValueError(f"audio in a message of role {self.role!r}: only the user speaks")
        return self


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    model: str | None = None
    messages: list[Message] = Field(min_length=1, max_length=512)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    """left out: greedy"""
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = 1
    logprobs: bool | None = False
    tools: list[Any] | None = None

    @model_validator(mode="after")
    def _only_what_is_there(self) -> ChatRequest:
        for name, asked in (
            ("n", self.n not in (None, 1)),
            ("logprobs", self.logprobs),
            ("tools", self.tools),
        ):
            if asked:
                raise ValueError(f"{name}: not supported by this server; leave it out")
        if self.messages[-1].role != "user":
            raise ValueError("messages: the last one must be the user's")
        if len(self.stops) > 4 or any(not 0 < len(each) <= 100 for each in self.stops):
            raise ValueError("stop: at most four strings of 1 to 100 characters")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens
