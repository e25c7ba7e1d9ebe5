"""Answers of an LLM behind vLLM servers: encoder and adapter run here, the LLM runs there on prompt embeddings.

In:  a chat request; URLs of servers started with --enable-prompt-embeds. Out: their answers, whole or streamed.
Try: `blsp serve --engine-url http://localhost:8001/v1`
Flow: app.py → scheduler.py (encodes the clips) → **remote.py** → llm/servers.py → the LLM's server and back

A turn with speech is sent as one part of embeddings: of its text and its clips, in order. So the server does not
tokenise the text beside a clip, and control tokens in the text are plain characters. Other turns are sent as plain
text.

    ["What is this?", clip]  →  {"type": "prompt_embeds", "data": base64 of torch.save((L, D))}

A server that cannot be reached is left out for a while (servers.py). Its requests are sent to another one, if the
client has not got a token yet. The server's answer is passed on: choices (`n`), `logprobs`, JSON of a schema.

Shapes: L positions of a turn, D LLM width.
"""

from __future__ import annotations

import asyncio
import base64
import io
import os
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeAlias

import httpx2
import torch
from fastapi import Request
from fastapi.responses import JSONResponse, Response
from openai import APIError, APIStatusError, AsyncStream
from openai.types.chat import ChatCompletionChunk
from pydantic import Field
from starlette.concurrency import run_in_threadpool

from blsp.llm.language_model import embed
from blsp.llm.prompt import PromptError, text_ids
from blsp.llm.servers import LOST, UNREACHABLE, Server, Servers
from blsp.model.adapter_parts import AudioEmbeds
from blsp.model.lora import has_lora
from blsp.serving import api
from blsp.serving.api import ChatRequest
from blsp.serving.errors import ApiError, late
from blsp.serving.exchange import Exchange, joined, while_connected
from blsp.serving.job import Begun
from blsp.serving.scheduler import as_message
from blsp.settings import SettingsError

if TYPE_CHECKING:
    from blsp.serving.app import Service

KEY = "BLSP_ENGINE_KEY"  # the environment variable with the servers' key
MAX_CHOICES = 16
PLACEHOLDER = "<prompt_embeds>"  # vLLM refuses texts with its own mark for embeddings
CLIENTS_FAULT = (400, 413, 422, 429)  # a server's refusals that the client gets; others are our server's problem
BROKEN = (*LOST, httpx2.TransportError)  # no connection, or one that ended early


Chunk: TypeAlias = dict[str, Any]  # of a streamed answer, or the whole answer
Chunks: TypeAlias = AsyncGenerator[Chunk, None]


class FormattedRequest(ChatRequest):
    """A chat request with a form of the answer, such as a JSON schema, which an LLM's server supports."""

    response_format: dict[str, Any] | None = None


class RemoteChatRequest(FormattedRequest):
    """A chat request with further fields that an LLM's server supports."""

    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)


PASSED = (*RemoteChatRequest.__annotations__, "response_format", "seed", "stop")  # fields that are passed on unchanged


class RemoteChat:
    """The route of chat completions, for a `Service` whose LLM runs on other servers."""

    def __init__(self, service: Service) -> None:
        settings = service.settings
        if has_lora(service.listener.model.config, "llm"):
            raise SettingsError(
                f"--engine-url: {settings.model} has LoRA on its LLM, and the LLM there is the one without it: leave "
                "out --engine-url, or train without --lora llm"
            )
        self.service, self.urls = service, settings.engine_url
        self._model = settings.engine_model
        self._names: dict[str, str] = {}  # URL -> the LLM's name on the server
        self._servers = Servers(self.urls, api_key=os.environ.get(KEY, ""), connections=settings.max_batch)
        self._most = settings.max_batch * len(self.urls) + settings.queue
        self._open = 0  # requests that are sent or wait for a connection

    async def close(self) -> None:
        await self._servers.close()

    async def chat(self, body: RemoteChatRequest, request: Request) -> Response:
        """Answer a conversation of text and speech; with `stream`, chunk by chunk."""
        began = time.monotonic()
        exchange, chunks = await self.begin(body, request)
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": self.service.name}
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            streamed = _streamed(chunks, head, usage)
            return api.events(self.service.streamed("chat", began, streamed, exchange.texts, exchange))
        async with aclosing(chunks):
            answer = await anext(chunks)
        self.service.log_answer("chat", 200, began, exchange, "".join(exchange.texts))
        return JSONResponse(answer | head)

    async def begin(self, body: ChatRequest, request: Request) -> tuple[Exchange, Chunks]:
        """The exchange, and the chunks of a streamed answer, or the whole answer as the only one.

        The first chunk has arrived, so that a refusal can still be an HTTP status. Usage and text of the chunks are
        stored in the exchange.
        """
        if self._open >= self._most:
            text = "too many requests are waiting for the LLM; try again in 2 s"
            raise ApiError(429, text, code="queue_full", retry_after=2)
        exchange = await self.service.begin(body, request)
        await while_connected(request, joined(exchange.pieces()), exchange)
        messages, exchange.finish = exchange.heard, ""
        clips = [part for part in messages[-1]["parts"] if isinstance(part, AudioEmbeds)]
        if clips and not any(clip.speech for clip in clips):
            chunks = self._no_speech(body)
        else:
            sent = await run_in_threadpool(self._request, body, messages)
            chunks = self._chunks(sent, request.state.end)
        first = await while_connected(request, anext(chunks), exchange)
        return exchange, self._noted(exchange, first, chunks)

    async def _noted(self, exchange: Exchange, first: Chunk, others: Chunks) -> Chunks:
        """All chunks, with their usage completed. The text of the first choice is stored in the exchange."""
        chunk: Chunk | None = first
        async with aclosing(others):
            while chunk is not None:
                if usage := chunk.get("usage"):
                    speech = exchange.begun.speech
                    details = usage.get("prompt_tokens_details") or {}
                    usage["prompt_tokens_details"] = {"cached_tokens": 0} | details | {"audio_tokens": speech}
                    exchange.begun, exchange.tokens = Begun(usage["prompt_tokens"], speech), usage["completion_tokens"]
                    self.service.metrics.tokens.inc(exchange.tokens)
                for choice in chunk["choices"]:
                    if not choice["index"]:
                        exchange.texts.append(_said(choice).get("content") or "")
                        exchange.finish = choice.get("finish_reason") or exchange.finish
                yield chunk
                chunk = await anext(others, None)

    async def _no_speech(self, body: ChatRequest) -> Chunks:
        """The fixed sentence, if the question's clips hold no speech; the LLM is not asked."""
        said = {"role": "assistant", "content": self.service.listener.model.config.no_speech_sentence}
        where = "delta" if body.stream else "message"
        count = body.n or 1 if isinstance(body, RemoteChatRequest) else 1
        choices = [{"index": index, where: said, "finish_reason": "stop", "logprobs": None} for index in range(count)]
        usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
        if body.stream:
            yield {"object": "chat.completion.chunk", "choices": choices}
            yield {"object": "chat.completion.chunk", "choices": [], "usage": usage}
        else:
            yield {"object": "chat.completion", "choices": choices, "usage": usage}

    # --- the request to the server ------------------------------------------------------------------------
    def _request(self, body: ChatRequest, messages: list[dict[str, Any]]) -> dict[str, Any]:
        limit = self.service.settings.max_new_tokens
        options = {"stream_options": {"include_usage": True}} if body.stream else {}
        try:
            turns = [self._turn(as_message(message)) for message in messages]
        except PromptError as error:
            raise ApiError(400, str(error), param="messages", code="invalid_prompt") from error
        return {
            "messages": turns,
            "max_completion_tokens": min(body.new_tokens or limit, limit),
            "temperature": body.temperature or 0.0,
            "top_p": body.top_p or 1.0,
            "stream": body.stream,
            **options,
            **body.model_dump(include=set(PASSED), exclude_none=True),
        }

    def _turn(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message in the server's form: plain text, or one part of embeddings."""
        content = message["content"]
        parts = [part for part in ([content] if isinstance(content, str) else content) if part != ""]
        if all(isinstance(part, str) for part in parts) and self._is_plain(text := "".join(parts)):
            return {"role": message["role"], "content": text}
        model, tokenizer = self.service.listener.model, self.service.listener.tokenizer
        embeds = torch.cat(
            [
                part.vectors.to(model.lm_head.weight.dtype)
                if isinstance(part, AudioEmbeds)
                else embed(model, text_ids(tokenizer, part))
                for part in parts
            ]
        )  # (L, D)
        file = io.BytesIO()
        torch.save(embeds.detach().cpu().contiguous(), file)
        part = {"type": "prompt_embeds", "data": base64.b64encode(file.getvalue()).decode()}
        return {"role": message["role"], "content": [part]}

    def _is_plain(self, text: str) -> bool:
        """Whether the server's tokenizer finds no control token in the text."""
        tokenizer = self.service.listener.tokenizer
        read = tokenizer.encode(text, add_special_tokens=False)
        return PLACEHOLDER not in text and read == text_ids(tokenizer, text)

    # --- the server's answer ------------------------------------------------------------------------------
    async def _chunks(self, request: dict[str, Any], end: float) -> Chunks:
        """The chunks of a streamed answer, or the whole answer as the only one.

        Before the first token, a failed request is sent again. end: the deadline, as monotonic time. Raises ApiError.
        """
        self._open += 1
        try:
            for _ in range(len(self.urls) + 1):  # each server once, and one more try
                async with aclosing(self._attempt(request)) as chunks:
                    try:
                        while True:
                            async with asyncio.timeout(end - time.monotonic()):
                                chunk = await anext(chunks, None)
                            if chunk is None:
                                return
                            yield chunk
                    except _SendAgain as failure:
                        said = str(failure)
                    except TimeoutError:
                        raise late() from None
        finally:
            self._open -= 1
        text = f"the LLM's server cannot be reached ({said}); try again in 5 s"
        raise ApiError(503, text, code="engine_unreachable", retry_after=5)

    async def _attempt(self, request: dict[str, Any]) -> Chunks:
        """The chunks from one server; raises _SendAgain if it fails before the first token."""
        held: list[Chunk] = []  # chunks before the first token
        begun = finished = False
        async with self._servers.take() as server:
            sent_at = time.monotonic()
            try:
                async with aclosing(self._sent(server, request)) as chunks:
                    async for chunk in chunks:
                        held.append(chunk)
                        begun = begun or any(map(_has_token, chunk["choices"]))
                        finished = finished or any(choice["finish_reason"] for choice in chunk["choices"])
                        while begun and held:
                            yield held.pop(0)
                if finished:
                    self._servers.answered(server)
                    return
                said = "the answer has no end"
            except APIStatusError as error:
                status, said = error.status_code, f"HTTP {error.status_code}"
                if status in CLIENTS_FAULT:
                    raise _refused(status, error) from error
                if status < 500:
                    text = f"the LLM's server refuses the request of this one (HTTP {status})"
                    raise ApiError(502, text, code="engine_refused") from error
                if status in UNREACHABLE:
                    server.leave_out(sent_at)
            except BROKEN as error:
                server.leave_out(sent_at)
                said = type(error).__name__
            except APIError as error:  # an error that the server reports inside the stream
                said = error.message
            if begun:
                raise ApiError(502, f"the LLM's server has ended the answer early ({said})", code="engine_lost")
            raise _SendAgain(said)

    async def _sent(self, server: Server, request: dict[str, Any]) -> Chunks:
        client = server.client
        name = self._model or self._names.get(server.url)
        if name is None:
            name = self._names[server.url] = (await client.models.list()).data[0].id
        request = {"model": name, **request}
        if not request["stream"]:
            yield (await client.post("/chat/completions", body=request, cast_to=httpx2.Response)).json()
            return
        stream = await client.post(
            "/chat/completions",
            body=request,
            cast_to=ChatCompletionChunk,
            stream=True,
            stream_cls=AsyncStream[ChatCompletionChunk],
        )
        async with stream:
            async for chunk in stream:
                yield chunk.model_dump(exclude_unset=True)


class _SendAgain(Exception):
    """An attempt that failed before the client got a token."""


async def _streamed(chunks: Chunks, head: dict[str, Any], usage: bool) -> AsyncGenerator[dict[str, Any] | str, None]:
    """The server's chunks with our model name, and the usage if the client asked for it."""
    async with aclosing(chunks):
        async for chunk in chunks:
            if chunk["choices"] or usage:
                yield chunk | head
    yield "[DONE]"


async def first_choice(chunks: Chunks) -> AsyncIterator[str]:
    """The pieces of the first choice's text."""
    async with aclosing(chunks):
        async for chunk in chunks:
            for choice in chunk["choices"]:
                if not choice["index"] and (text := _said(choice).get("content")):
                    yield text


def _said(choice: dict[str, Any]) -> dict[str, Any]:
    """The message of a choice: the whole one, or the next piece."""
    said: dict[str, Any] = choice.get("message") or choice["delta"]
    return said


def _has_token(choice: dict[str, Any]) -> bool:
    return bool(choice.get("message") or choice["delta"].get("content") or choice.get("finish_reason"))


def _refused(status: int, error: APIStatusError) -> ApiError:
    """The server's refusal of the client's request, with the server's message."""
    said = error.body if isinstance(error.body, dict) else {}
    retry_after = 2 if status == 429 else None
    text = str(said.get("message") or f"the LLM's server refuses the request (HTTP {status})")
    return ApiError(status, text, param=said.get("param"), code="engine_refused", retry_after=retry_after)
