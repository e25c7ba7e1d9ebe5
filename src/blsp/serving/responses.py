"""Responses API of OpenAI (POST /v1/responses), as a thin layer over chat.

In:  `input` (text, or messages with `input_text`, `output_text` and `input_audio` parts) and `instructions`.
Out: a response object, whole or as its server-sent events. Nothing is kept: every request brings its conversation.
Try: `client.responses.create(model="blsp-tiny", input="What is the capital of Canada?")`
Flow: app.py → **responses.py** → api.ChatRequest → app.Service.begin → exchange.py
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import AsyncIterator
from itertools import count
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Body, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError

from blsp.serving import api
from blsp.serving.api import ChatRequest
from blsp.serving.exchange import CLIENT_LEFT, Exchange, gather, while_connected
from blsp.serving.refusals import ApiError, refusal_of

if TYPE_CHECKING:
    from blsp.serving.app import Service

TEXT_PARTS = ("input_text", "output_text")
NEUTRAL: dict[str, tuple[Any, ...]] = {  # fields that are not supported, and their values that ask for nothing
    "previous_response_id": (),
    "conversation": (),
    "prompt": (),
    "background": (False,),
    "include": ([],),
    "store": (False,),
    "text": ({}, {"format": {"type": "text"}}),
    "reasoning": ({}, {"effort": "none"}),
    "truncation": ("disabled",),
    "max_tool_calls": (),
}
RENAMED = {"max_completion_tokens": "max_output_tokens", "messages": "input"}  # chat's field → ours


def as_chat(body: dict[str, Any]) -> ChatRequest:
    """The same question as a chat request; ApiError names the fields of `body`."""
    body = api.without_nulls(body)
    for name, neutral in NEUTRAL.items():
        if name in body and body.pop(name) not in neutral:
            raise _refusal(name, "is not supported by this server; leave it out")
    if "input" not in body:
        raise _refusal("input", "is missing", "missing_required_parameter")
    given, instructions = body.pop("input"), body.pop("instructions", None)
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if not isinstance(items, list):
        raise _refusal("input", "must be text or a list of messages", "invalid_type")
    messages = [_message(number, item) for number, item in enumerate(items)]
    if instructions is not None:
        if not isinstance(instructions, str):
            raise _refusal("instructions", "must be text", "invalid_type")
        messages.insert(0, {"role": "system", "content": instructions})
    body["messages"] = messages
    body["max_completion_tokens"] = body.pop("max_output_tokens", None)
    try:
        return ChatRequest.model_validate(body)
    except ValidationError as error:
        refusal = refusal_of(RequestValidationError(error.errors(), body=body))
        raise _renamed(refusal, shift=instructions is not None) from error


def _message(number: int, item: Any) -> Any:
    """An item of `input` as a message of chat."""
    if not isinstance(item, dict):
        raise _refusal(f"input[{number}]", "must be an object", "invalid_type")
    if item.get("type", "message") != "message":
        text = f"items of type {item['type']!r:.40} are not supported by this server; it takes messages"
        raise _refusal(f"input[{number}].type", text, "unsupported_value")
    message = {name: value for name, value in item.items() if name not in ("type", "id", "status")}
    if isinstance(parts := message.get("content"), list):
        message["content"] = [
            {**part, "type": "text"} if isinstance(part, dict) and part.get("type") in TEXT_PARTS else part
            for part in parts
        ]
    return message


def _renamed(refusal: ApiError, shift: bool) -> ApiError:
    """A refusal of chat with the fields' names here. shift: the first message is `instructions`."""
    old = refusal.param or ""
    new = re.sub(r"^\w+", lambda name: RENAMED.get(name[0], name[0]), old)
    if shift and (number := re.match(r"input\[(\d+)\]", new)):
        new = f"input[{int(number[1]) - 1}]{new[number.end() :]}"
    refusal.message = refusal.message.replace(old, new, 1)
    refusal.param = new or None
    return refusal


def _refusal(param: str, text: str, code: str = "unsupported_parameter") -> ApiError:
    return ApiError(400, f"{param}: {text}", param=param, code=code)


class Responses:
    """The route, around a `Service`."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def respond(self, body: Annotated[dict[str, Any], Body()], request: Request) -> Response:
        """Answer as OpenAI's Responses API does; with `stream`, piece by piece."""
        began = time.monotonic()
        chat = as_chat(body)
        try:
            exchange = await self.service.begin(chat, request)
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
            "metadata": body.get("metadata") or {},
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": chat.temperature or 0.0,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": chat.top_p or 1.0,
            "truncation": "disabled",
        }
        item = f"msg_{secrets.token_hex(12)}"
        if chat.stream:
            return api.events(self._events(exchange, head, item, began), named=True)
        text = await while_connected(request, gather(exchange), exchange)
        self.service.log_answer("responses", 200, began, exchange, text)
        return JSONResponse(_finished(head, item, text, exchange))

    async def _events(
        self, exchange: Exchange, head: dict[str, Any], item: str, began: float
    ) -> AsyncIterator[dict[str, Any]]:
        """OpenAI's events of one message with one text; an error inside ends the stream with response.failed."""
        number = count()
        texts: list[str] = []
        status = CLIENT_LEFT
        place = {"item_id": item, "output_index": 0, "content_index": 0}

        def event(name: str, fields: dict[str, Any]) -> dict[str, Any]:
            return {"type": f"response.{name}", "sequence_number": next(number), **fields}

        begun = {**head, "status": "in_progress", "output": [], "usage": None}
        try:
            yield event("created", {"response": begun})
            yield event("in_progress", {"response": begun})
            yield event("output_item.added", {"output_index": 0, "item": _item(item, None, "in_progress")})
            yield event("content_part.added", {**place, "part": _part("")})
            async for piece in exchange.pieces():
                texts.append(piece)
                yield event("output_text.delta", {**place, "delta": piece, "logprobs": []})
            text = "".join(texts)
            done = _finished(head, item, text, exchange)
            yield event("output_text.done", {**place, "text": text, "logprobs": []})
            yield event("content_part.done", {**place, "part": _part(text)})
            yield event("output_item.done", {"output_index": 0, "item": done["output"][0]})
            status = 200
            yield event(done["status"], {"response": done})
        except ApiError as error:
            status = error.status
            failure = {"code": "server_error", "message": error.message}
            yield event("failed", {"response": {**begun, "status": "failed", "error": failure}})
        finally:
            exchange.cancel()
            self.service.log_answer("responses", status, began, exchange, "".join(texts))


def _finished(head: dict[str, Any], item: str, text: str, exchange: Exchange) -> dict[str, Any]:
    usage = exchange.usage
    cut = exchange.finish == "length"
    status = "incomplete" if cut else "completed"
    return {
        **head,
        "status": status,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": [_item(item, text, status)],
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
