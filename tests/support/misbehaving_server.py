"""An OpenAI-compatible server that misbehaves on purpose: full queues, errors, hangs, broken replies.

In:  a list of misdeeds, done to the first requests that arrive; then it answers every prompt with an echo.
Out: a server on localhost that counts what it was asked.
Try: `with misbehaving_server(["429", "drop"]) as server: httpx.post(server.url + "/chat/completions", …)`
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse


@dataclass
class Misbehaving:
    """What the server was asked, and what it still has in store."""

    misdeeds: list[str]
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)  # every request's body
    at: list[float] = field(default_factory=list)  # seconds, when it came
    keys: set[str] = field(default_factory=set)
    together: int = 0
    most_together: int = 0
    pause: float = 0.0  # seconds before an answer
    extra: dict[str, Any] = field(default_factory=dict)  # merged into each choice
    poison: dict[str, str] = field(default_factory=dict)  # the end of a prompt → its misdeed, each time

    async def misbehave(self, misdeed: str) -> Response:
        """Do one misdeed to the request at hand."""
        if misdeed.startswith("429"):
            _, _, seconds = misdeed.partition(" ")
            headers = {"Retry-After": seconds} if seconds else {}
            return JSONResponse({"error": {"message": "slow down"}}, 429, headers=headers)
        if misdeed.isdecimal():
            return JSONResponse({"error": {"message": f"failure {misdeed}"}}, int(misdeed))
        if misdeed == "hang":
            await asyncio.sleep(3600)
        if misdeed == "drip":
            return StreamingResponse(self._dripped(), media_type="application/json")
        if misdeed == "drop":
            return StreamingResponse(self._dropped(), media_type="application/json")
        return Response(misdeed, media_type="application/json")  # a reply that is not what it should be

    async def _dropped(self) -> Any:
        yield b'{"choices": [{"mess'
        raise ConnectionResetError("dropped on purpose")

    async def _dripped(self) -> Any:
        while True:
            yield b" "
            await asyncio.sleep(0.2)

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """The echo of the user's words, as a chat completion."""
        message = {"role": "assistant", "content": f"You said: {body['messages'][-1]['content']}"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"} | self.extra
        return {"object": "chat.completion", "model": body["model"], "choices": [choice]}


@contextmanager
def misbehaving_server(misdeeds: list[str], port: int = 0, **more: Any) -> Iterator[Misbehaving]:
    """The server in a thread. port 0: one of the system's choice."""
    state = Misbehaving(list(misdeeds), **more)
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await request.json()
        state.asked.append(body)
        state.at.append(time.monotonic())
        state.keys.add(request.headers.get("Authorization", ""))
        state.together += 1
        state.most_together = max(state.most_together, state.together)
        try:
            words = str(body["messages"][-1]["content"]).removesuffix("\nPlease repeat the following words:")
            for end, misdeed in state.poison.items():
                if words.endswith(f" {end}"):
                    return await state.misbehave(misdeed)
            if state.misdeeds and (misdeed := state.misdeeds.pop(0)) != "answer":
                return await state.misbehave(misdeed)
            await asyncio.sleep(state.pause)
            return Response(json.dumps(state.answer(body)), media_type="application/json")
        finally:
            state.together -= 1

    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    state.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    try:
        yield state
    finally:
        server.should_exit = True
        thread.join(10)
