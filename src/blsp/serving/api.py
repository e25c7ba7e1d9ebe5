"""Requests and answers in the form of OpenAI's API.

In:  JSON of /v1/chat/completions; texts. Out: `ChatRequest`; answers, whole or as server-sent events.
Try: `ChatRequest.model_validate({"model": "blsp-tiny", "messages": [{"role": "user", "content": "Hi"}]})`
Flow: app.py → **api.py** → errors.py

A field that is null counts as left out. Unknown fields are ignored, as OpenAI-compatible servers do. Unsupported fields
that would change the answer (`n` above 1, tools, logprobs, penalties, spoken answers …) are refused by name.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import AfterValidator, BaseModel, BeforeValidator, Discriminator, Field, Tag, model_validator

from blsp.serving.errors import ApiError, wrong_field

MAX_MESSAGES = 512
MAX_PARTS = 512  # of all messages together; a plain text is one part
MAX_CLIPS = 128
MAX_KEY = 512  # characters of prompt_cache_key, which is stored
MAX_DEPTH = 6  # of nested objects in which null means "left out": body, message, content, part, its fields


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise wrong_field("invalid_value", f"holds half a character (a lone surrogate at {error.start})") from error
    return text


Text = Annotated[str, AfterValidator(_encodable)]


def _short(text: str) -> str:
    if len(text) > MAX_KEY:
        raise wrong_field("invalid_value", f"must have at most {MAX_KEY} characters")
    return text


ShortText = Annotated[Text, AfterValidator(_short)]


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


PARTS = ("text", "input_audio", "audio_url")


def _offered_part(part: Any) -> Any:
    """The part, or a refusal that names its type."""
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict):
        raise wrong_field("invalid_type", "a part must be an object with a type")
    if kind is None:
        raise wrong_field("missing_required_parameter", "is missing: text, input_audio or audio_url", "type")
    if kind not in PARTS:
        shown = repr(kind)[:40]
        message = f"parts of type {shown} are not supported by this server; it takes text, input_audio and audio_url"
        raise wrong_field("unsupported_value", message, "type")
    return part


def _branch(value: Any) -> str:
    """The branch of a union type for a value; errors.py leaves names in <> out of the field's path."""
    if isinstance(value, dict):
        return f"<{value['type']}>"
    if isinstance(value, TextPart | AudioPart | AudioUrlPart):
        return f"<{value.type}>"
    return "<text>" if isinstance(value, str) else "<parts>"


Part = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[AudioPart, Tag("<input_audio>")]
    | Annotated[AudioUrlPart, Tag("<audio_url>")],
    Discriminator(_branch),
    BeforeValidator(_offered_part),
]


def _text_or_parts(content: Any) -> Any:
    if not isinstance(content, str | list):
        raise wrong_field("invalid_type", "must be text or a list of parts")
    return content


Content = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[list[Part], Tag("<parts>")],
    Discriminator(_branch),
    BeforeValidator(_text_or_parts),
]
NOT_TAKEN = ("tool_calls", "function_call", "tool_call_id", "audio")  # fields of a message that are not supported


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content

    @model_validator(mode="before")
    @classmethod
    def _only_supported_fields(cls, message: Any) -> Any:
        if not isinstance(message, dict):
            return message
        if message.get("role") in ("tool", "function"):
            text = f"{message['role']!r} is not supported by this server (tools are not offered)"
            raise wrong_field("unsupported_value", text, "role")
        for name in NOT_TAKEN:
            if message.get(name):
                raise wrong_field("unsupported_parameter", "is not supported by this server; leave it out", name)
        if message.get("role") == "assistant" and message.get("content") is None:
            text = "is missing: a turn of the assistant needs its text; leave turns without text out"
            raise wrong_field("missing_required_parameter", text, "content")
        return message

    @model_validator(mode="after")
    def _only_users_speak(self) -> Message:
        if self.role != "user" and any(not isinstance(part, TextPart) for part in self.parts):
            text = f"audio in a message of role {self.role!r}: only the user speaks"
            raise wrong_field("invalid_value", text, "content")
        return self

    @property
    def parts(self) -> list[TextPart | AudioPart | AudioUrlPart]:
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content


def _strings(stop: Any) -> Any:
    if not isinstance(stop, str | list):
        raise wrong_field("invalid_type", "must be text or a list of texts")
    return [stop] if isinstance(stop, str) else stop


StopStrings = Annotated[list[Text], BeforeValidator(_strings)]


class StreamOptions(BaseModel, strict=True):
    include_usage: bool = False


NEUTRAL: dict[str, tuple[Any, ...]] = {  # fields that are not supported, and their values that have no effect
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "typical_p": (1,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "use_beam_search": (False,),
    "structured_outputs": ({},),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
}


def asks_nothing(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Whether an unsupported field has one of its values without effect; true is not 1, and false not 0."""
    return any(value == entry and isinstance(value, bool) == isinstance(entry, bool) for entry in neutral)


def without_nulls(value: Any, depth: int = MAX_DEPTH) -> Any:
    """The value without fields that are null, down to `depth` objects and lists; a JSON schema does not change."""
    if depth and isinstance(value, dict):
        return {
            name: without_nulls(field, 0 if name == "schema" else depth - 1)
            for name, field in value.items()
            if field is not None
        }
    return [without_nulls(entry, depth - 1) for entry in value] if depth and isinstance(value, list) else value


def _check_counts(messages: Any) -> None:
    """Refuse too many messages, parts or clips before any of them is read."""
    if not isinstance(messages, list):
        return
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = [part for content in contents for part in (content if isinstance(content, list) else [content])]
    clips = sum(isinstance(part, dict) and part.get("type") in ("input_audio", "audio_url") for part in parts)
    for count, most, noun in (
        (len(messages), MAX_MESSAGES, "messages"),
        (len(parts), MAX_PARTS, "parts in all messages"),
        (clips, MAX_CLIPS, "clips in all messages"),
    ):
        if count > most:
            raise wrong_field("too_many", f"{count:,} {noun}; at most {most} are taken", "messages")


class ChatRequest(BaseModel, extra="allow", strict=True):
    """A request. Other fields are kept for the check with NEUTRAL. Strict: true and "1" are not numbers."""

    model: str | None = None
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    """left out: greedy"""
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopStrings | None = None
    prompt_cache_key: ShortText = ""
    """key/values of earlier requests with the same API key and the same value are reused"""
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _left_out(cls, body: Any) -> Any:
        if isinstance(body, dict):
            _check_counts(body.get("messages"))
        return without_nulls(body)

    @model_validator(mode="after")
    def _only_supported_fields(self) -> ChatRequest:
        extra = self.model_extra or {}
        for name, neutral in NEUTRAL.items():
            if name in extra and not asks_nothing(extra[name], neutral):
                raise wrong_field("unsupported_parameter", "is not supported by this server; leave it out", name)
        if self.messages[-1].role != "user":
            raise wrong_field("invalid_value", "the last one must be the user's", "messages")
        if len(self.stops) > 4 or any(not 0 < len(stop) <= 100 for stop in self.stops):
            raise wrong_field("invalid_value", "must be at most four strings of 1 to 100 characters", "stop")
        return self

    def check_length(self, most: int) -> None:
        """Refuse more than `most` characters of text, before they are tokenised."""
        count = sum(len(part.text) for message in self.messages for part in message.parts if isinstance(part, TextPart))
        if count > most:
            raise ApiError(
                400,
                f"messages: {count:,} characters of text; the LLM reads at most {most:,}: start anew or say it shorter",
                param="messages",
                code="context_length_exceeded",
            )

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple(self.stop or ())

    @property
    def new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


def completion(head: dict[str, Any], text: str, finish: str, usage: dict[str, Any]) -> Response:
    """A whole answer."""
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
    return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": usage})


def delta(content: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    """The new part in a chunk of a streamed answer."""
    return {"choices": [{"index": 0, "delta": content, "finish_reason": finish, "logprobs": None}]}


def events(chunks: AsyncIterator[Any], named: bool = False) -> Response:
    """Server-sent events, one per chunk (an object, or text). named: each also has its `type` as its name."""

    async def lines() -> AsyncIterator[str]:
        async for chunk in chunks:
            name = f"event: {chunk['type']}\n" if named else ""
            yield f"{name}data: {chunk if isinstance(chunk, str) else json.dumps(chunk, ensure_ascii=False)}\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream")
