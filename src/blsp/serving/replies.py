"""Answers in OpenAI's forms: whole, or as server-sent events.

In:  pieces of text, why they ended, what they cost. Out: responses.
Try: `transcript("Hello.", "text")`
Flow: serving/ — app.py answers every request through it; errors leave through schema.py.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from blsp.serving.schema import ApiError


def completion(head: dict[str, Any], text: str, finish: str, usage: dict[str, Any]) -> Response:
    """A whole answer."""
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
    return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": usage})


def delta(content: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    """What one chunk of a streamed answer adds."""
    return {"choices": [{"index": 0, "delta": content, "finish_reason": finish, "logprobs": None}]}


def transcript(text: str, response_format: str) -> Response:
    return PlainTextResponse(text + "\n") if response_format == "text" else JSONResponse({"text": text})


async def transcript_events(pieces: AsyncIterator[str]) -> AsyncIterator[dict[str, Any]]:
    """OpenAI's events of a transcript that grows; an error ends it."""
    said = ""
    try:
        async for piece in pieces:
            added = f" {piece}" if said else piece
            said += added
            yield {"type": "transcript.text.delta", "delta": added}
        yield {"type": "transcript.text.done", "text": said}
    except ApiError as error:
        yield error.body()


def events(chunks: AsyncIterator[dict[str, Any] | str]) -> Response:
    """Server-sent events, one a chunk."""

    async def lines() -> AsyncIterator[str]:
        async for chunk in chunks:
            yield f"data: {chunk if isinstance(chunk, str) else json.dumps(chunk, ensure_ascii=False)}\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream")
