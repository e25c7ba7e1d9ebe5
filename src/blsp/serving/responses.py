"""Responses API of OpenAI (POST /v1/responses), as a thin layer over chat.

In:  `input` (text, or messages with `input_text`, `output_text` and `input_audio` parts) and `instructions`.
Out: a response object, whole or as server-sent events. Nothing is stored: each request contains its conversation.
Try: `client.responses.create(model="blsp-tiny", input="What is the capital of Canada?")`
Flow: app.py → **responses.py** → api.ChatRequest → app.Service.begin or remote.py → exchange.py
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from itertools import count
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Body, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError

from blsp.serving import api
from blsp.serving.api import ChatRequest
from blsp.serving.errors import ApiError, refusal, refusal_of
from blsp.serving.exchange import Exchange, joined, while_connected
from blsp.serving.remote import FormattedRequest, first_choice

if TYPE_CHECKING:
    from blsp.serving.app import Service

TEXT_PARTS = ("input_text", "output_text")
NEUTRAL: dict[str, tuple[Any, ...]] = {  # fields that are not supported, and their values that have no effect
    "previous_response_id": (),
    "conversation": (),
    "prompt": (),
    "background": (False,),
    "include": ([],),
    "store": (False,),
    "response_format": ({"type": "text"},),  # chat's name of text.format
    "reasoning": ({}, {"effort": "none"}),
    "truncation": ("disabled",),
    "max_tool_calls": (),
}
FORMATS = ("text", "json_object", "json_schema")
RENAMED = {  # chat's field → ours
    "max_completion_tokens": "max_output_tokens",
    "messages": "input",
    "response_format": "text.format",
}


def as_chat(body: dict[str, Any], formatted: bool = False) -> ChatRequest:
    """The same question as a chat request; ApiError names the fields of `body`. formatted: `text.format` is allowed."""
    body = api.without_nulls(body)
    for name, neutral in NEUTRAL.items():
        if name in body and not api.asks_nothing(body.pop(name), neutral):
            raise refusal(name, "is not supported by this server; leave it out", "unsupported_parameter")
    if "input" not in body:
        raise refusal("input", "is missing", "missing_required_parameter")
    given, instructions = body.pop("input"), body.pop("instructions", None)
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if not isinstance(items, list):
        raise refusal("input", "must be text or a list of messages", "invalid_type")
    messages = [_message(number, item) for number, item in enumerate(items)]
    if instructions is not None:
        if not isinstance(instructions, str):
            raise refusal("instructions", "must be text", "invalid_type")
        messages.insert(0, {"role": "system", "content": instructions})
    body["messages"] = messages
    body["max_completion_tokens"] = body.pop("max_output_tokens", None)
    body["response_format"] = _response_format(body.pop("text", {}))
    try:
        return (FormattedRequest if formatted else ChatRequest).model_validate(body)
    except ValidationError as error:
        refused = refusal_of(RequestValidationError(error.errors(), body=body))
        raise _renamed(refused, shift=instructions is not None) from error


def _response_format(text: Any) -> dict[str, Any] | None:
    """The field `text` as chat's `response_format`; None for plain text.

    {"format": {"type": "json_schema", "name": …, "schema": …}} → {"type": "json_schema", "json_schema": {"name": …, …}}
    """
    form = text.get("format", {"type": "text"}) if isinstance(text, dict) else None
    if not isinstance(form, dict):
        raise refusal("text" if form is None else "text.format", "must be an object", "invalid_type")
    if text.get("verbosity", "medium") != "medium":
        raise refusal("text.verbosity", "is not supported by this server; leave it out", "unsupported_parameter")
    kind = form.get("type")
    if kind not in FORMATS:
        raise refusal("text.format.type", f"must be {', '.join(FORMATS[:-1])} or {FORMATS[-1]}", "invalid_value")
    if kind == "json_schema":
        return {"type": kind, kind: {name: value for name, value in form.items() if name != "type"}}
    return form if kind == "json_object" else None


def _check_echoed(body: dict[str, Any]) -> None:
    """Refuse fields that the answer, which repeats some of them, could not hold: NaN, half a character.

    The texts of `input` are not repeated, and the chat request checks them.
    """
    for name, value in body.items():
        try:
            json.dumps({name: "" if name == "input" else value}, allow_nan=False, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            text = "holds half a character (a lone surrogate), NaN, an infinite number or too many levels"
            raise refusal(name, text, "invalid_value") from error
    metadata = body.get("metadata", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise refusal("metadata", "must be an object of texts", "invalid_type")


def _echoed_format(body: dict[str, Any]) -> dict[str, Any]:
    """`text.format` in the answer; of plain text only its type."""
    form: dict[str, Any] = body.get("text", {}).get("format", {})
    return form if form.get("type", "text") != "text" else {"type": "text"}


def _message(number: int, item: Any) -> Any:
    """An item of `input` as a message of chat."""
    if not isinstance(item, dict):
        raise refusal(f"input[{number}]", "must be an object", "invalid_type")
    if item.get("type", "message") != "message":
        text = f"items of type {item['type']!r:.40} are not supported by this server; it takes messages"
        raise refusal(f"input[{number}].type", text, "unsupported_value")
    message = {name: value for name, value in item.items() if name not in ("type", "id", "status")}
    if isinstance(parts := message.get("content"), list):
        message["content"] = [
            {**part, "type": "text"} if isinstance(part, dict) and part.get("type") in TEXT_PARTS else part
            for part in parts
        ]
    return message


def _renamed(refused: ApiError, shift: bool) -> ApiError:
    """A refusal of chat with this API's names of fields. shift: the first message is `instructions`."""
    old = refused.param or ""
    new = re.sub(r"^\w+", lambda name: RENAMED.get(name[0], name[0]), old)
    if shift and (number := re.match(r"input\[(\d+)\]", new)):
        new = f"input[{int(number[1]) - 1}]{new[number.end() :]}"
    refused.message = refused.message.replace(old, new, 1)
    refused.param = new or None
    return refused


class Responses:
    """The route, around a `Service`."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def respond(self, body: Annotated[dict[str, Any], Body()], request: Request) -> Response:
        """Answer as OpenAI's Responses API does; with `stream`, piece by piece."""
        began = time.monotonic()
        body = api.without_nulls(body)
        _check_echoed(body)
        chat = as_chat(body, formatted=self.service.remote is not None)
        try:
            exchange, pieces = await self._asked(chat, request)
        except ApiError as error:
            raise _renamed(error, shift=body.get("instructions") is not None) from error
        head: dict[str, Any] = {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": self.service.name,
            "error": None,
            "incomplete_details": None,
            "instructions": body.get("instructions"),
            "max_output_tokens": chat.new_tokens,
            "metadata": body.get("metadata", {}),
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": chat.temperature or 0.0,
            "text": {"format": _echoed_format(body)},
            "tool_choice": "none",
            "tools": [],
            "top_p": chat.top_p or 1.0,
            "truncation": "disabled",
        }
        item = f"msg_{secrets.token_hex(12)}"
        if chat.stream:
            events = Events(head, item)
            chunks = events.of(exchange, pieces)
            stream = self.service.streamed("responses", began, chunks, exchange.texts, exchange, events.failed)
            return api.events(stream, named=True)
        await while_connected(request, joined(pieces), exchange)
        answer = JSONResponse(_finished(head, item, exchange))
        self.service.log_answer("responses", 200, began, exchange, "".join(exchange.texts))
        return answer

    async def _asked(self, chat: ChatRequest, request: Request) -> tuple[Exchange, AsyncIterator[str]]:
        """The exchange, and the pieces of the answer."""
        if remote := self.service.remote:
            exchange, chunks = await remote.begin(chat, request)
            return exchange, first_choice(chunks)
        exchange = await self.service.begin(chat, request)
        return exchange, exchange.pieces()


class Events:
    """OpenAI's events of one message with one text; after an error the last one is response.failed."""

    def __init__(self, head: dict[str, Any], item: str) -> None:
        self._head, self._item = head, item
        self._begun = {**head, "status": "in_progress", "output": [], "usage": None}
        self._number = count()

    def _event(self, name: str, **fields: Any) -> dict[str, Any]:
        return {"type": f"response.{name}", "sequence_number": next(self._number), **fields}

    async def of(self, exchange: Exchange, pieces: AsyncIterator[str]) -> AsyncGenerator[dict[str, Any], None]:
        event, place = self._event, {"item_id": self._item, "output_index": 0, "content_index": 0}
        yield event("created", response=self._begun)
        yield event("in_progress", response=self._begun)
        yield event("output_item.added", output_index=0, item=_item(self._item, None, "in_progress"))
        yield event("content_part.added", **place, part=_part(""))
        async for piece in pieces:
            yield event("output_text.delta", **place, delta=piece, logprobs=[])
        done = _finished(self._head, self._item, exchange)
        (message,) = done["output"]
        (part,) = message["content"]
        yield event("output_text.done", **place, text=part["text"], logprobs=[])
        yield event("content_part.done", **place, part=part)
        yield event("output_item.done", output_index=0, item=message)
        yield event(done["status"], response=done)

    def failed(self, error: ApiError) -> dict[str, Any]:
        failure = {"code": "server_error", "message": error.message}
        return self._event("failed", response={**self._begun, "status": "failed", "error": failure})


def _finished(head: dict[str, Any], item: str, exchange: Exchange) -> dict[str, Any]:
    usage = exchange.usage
    cut = exchange.finish == "length"
    status = "incomplete" if cut else "completed"
    return {
        **head,
        "status": status,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": [_item(item, "".join(exchange.texts), status)],
        "usage": {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        },
    }


def _item(item: str, text: str | None, status: str) -> dict[str, Any]:
    content = [] if text is None else [_part(text)]
    return {"id": item, "type": "message", "status": status, "role": "assistant", "content": content}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
