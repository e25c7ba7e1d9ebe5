"""Application: OpenAI's routes and the page, around a loaded model.

In:  settings; HTTP. Out: answers, whole or as server-sent events.
Try: `create_app(listener, ServeSettings())`
Flow: server.py → middleware.py → **app.py** → audio_input.py → exchange.py → scheduler.py

Conventions (roles, parts, chunks, usage, error objects) are OpenAI's, so that its client libraries work unchanged.
Questions and answers are logged only with --log-content.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from blsp.inference.listener import Listener
from blsp.llm.decoding import Decoding
from blsp.serving import api
from blsp.serving.api import ChatRequest, TextPart
from blsp.serving.audio_input import AudioInput
from blsp.serving.errors import ApiError, internal, no_route, refusal_of
from blsp.serving.exchange import CLIENT_LEFT, UNWRITTEN, Exchange, client_of, joined, while_connected
from blsp.serving.metrics import Metrics
from blsp.serving.middleware import RequestGuard, is_local
from blsp.serving.page import mount_page
from blsp.serving.rate_limit import Quiet
from blsp.serving.remote import RemoteChat
from blsp.serving.responses import Responses
from blsp.serving.scheduler import Limits, Scheduler
from blsp.serving.shared_recogniser import RECOGNISER, SharedRecogniser
from blsp.serving.transcription import Transcriptions

if TYPE_CHECKING:
    from blsp.settings import ServeSettings

log = logging.getLogger("blsp.serving")
ROUTES = {  # names of the routes in the metrics; all others are "other"
    "/v1/chat/completions": "chat",
    "/v1/responses": "responses",
    "/v1/audio/transcriptions": "transcriptions",
    "/v1/audio/translations": "translations",
    "/v1/models": "models",
}
FLOODS = (401, 403, 429)  # statuses of refusals that are logged once a minute for each client
OFFERED = {path: "GET" if path == "/v1/models" else "POST" for path in ROUTES}  # path -> method
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
CHARACTERS_PER_TOKEN = 16  # text with more characters than this for each token of the context is not tokenised
MAX_CHARACTERS = 500_000  # of text in a request, for a context of any length


def create_app(listener: Listener, settings: ServeSettings) -> FastAPI:
    """The application around a loaded model."""
    service = Service(listener, settings)
    speech = Transcriptions(service)
    app = FastAPI(title="BLSP", description=__doc__, lifespan=service.lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(
        RequestGuard,
        keys=settings.keys,
        max_bytes=int(settings.max_upload_mb * 1e6),
        deadline=settings.deadline,
        refused=service.count_refusal,
        local=is_local(settings.host) and not settings.keys and not settings.insecure,
        rate_limit=settings.rate_limit,
        origins=settings.cors_origin,
    )
    if settings.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origin),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's JavaScript client sends headers of its own (x-stainless-…)
        )
    if service.remote:
        app.post("/v1/chat/completions", response_model=None)(service.remote.chat)
    else:
        app.post("/v1/chat/completions", response_model=None)(service.chat)
    app.post("/v1/responses", response_model=None)(Responses(service).respond)
    app.post("/v1/audio/transcriptions", response_model=None)(speech.transcriptions)
    app.post("/v1/audio/translations", response_model=None)(speech.translations)
    app.get("/v1/models")(service.models)
    app.get("/v1/models/{name:path}")(service.model)
    for path in ("/health", "/health/ready"):
        app.api_route(path, methods=["GET", "HEAD"], response_model=None)(service.health)
    app.api_route("/health/live", methods=["GET", "HEAD"], response_model=None)(service.live)
    app.get("/metrics", response_model=None)(service.report_metrics)
    app.add_exception_handler(ApiError, service.refuse)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, service.refuse_form)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, service.refuse_route)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, service.refuse_defect)
    app.state.scheduler, app.state.audio, app.state.refused = service.scheduler, service.audio, service.count_refusal
    app.api_route("/v1/{path:path}", methods=METHODS, include_in_schema=False, response_model=None)(service.no_route)
    mount_page(app)
    return app


class Service:
    """The routes, with their shared scheduler, limits, metrics and recogniser."""

    def __init__(self, listener: Listener, settings: ServeSettings) -> None:
        self.listener, self.settings = listener, settings
        self.name = os.path.basename(os.path.abspath(settings.model))  # `.` alone has no name
        self.metrics = Metrics()
        limits = Limits(settings.max_batch, settings.queue, settings.prefix_cache)
        self.scheduler = Scheduler(listener, limits, self.metrics)
        self.recogniser = SharedRecogniser(settings.asr, listener)
        self.audio = AudioInput(settings)
        self.remote = RemoteChat(self) if settings.engine_url else None
        self._quiet = Quiet()
        self.ready = self.failed = False
        self.created = int(time.time())
        context = getattr(listener.model.config.text_config, "max_position_embeddings", None)
        self.most_characters = min(MAX_CHARACTERS, CHARACTERS_PER_TOKEN * context if context else MAX_CHARACTERS)

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.scheduler.start()
        warming = asyncio.create_task(self._warm_up())
        yield
        warming.cancel()
        self.ready = False
        self.recogniser.close()
        self.audio.close()
        if self.remote:
            await self.remote.close()
        await run_in_threadpool(self.scheduler.stop)

    async def _warm_up(self) -> None:
        """Answer one spoken and one written question, so that one-time work does not delay the first user.

        There is no deadline, so the server also gets ready with a short --deadline.
        """
        try:
            noise = np.random.default_rng(0).normal(scale=0.01, size=16_000).astype(np.float32)
            for parts in ([noise, "Hello."], ["Hello."]):
                exchange = self.ask(
                    [{"role": "user", "parts": parts}], replace(self.listener.decoding, max_new_tokens=2), end=math.inf
                )
                await exchange.started()
                [_ async for _ in exchange.pieces()]
        except ApiError as error:
            self.failed = True
            log.error("the warm-up failed: %s", error)
            return
        self.ready = True

    # --- routes -------------------------------------------------------------------------------------------

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer a conversation of text and speech; with `stream`, piece by piece."""
        began = time.monotonic()
        exchange = await self.begin(body, request)
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": self.name}
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            chunks = self._chunks(exchange, head, usage)
            return api.events(self.streamed("chat", began, chunks, exchange.texts, exchange))
        text = await while_connected(request, joined(exchange.pieces()), exchange)
        answer = api.completion(head, text, exchange.finish, exchange.usage)
        self.log_answer("chat", 200, began, exchange, text)
        return answer

    async def models(self) -> dict[str, Any]:
        """The model, and the recogniser for transcriptions if there is one."""
        names = [self.name] + ([RECOGNISER] if self.recogniser.available else [])
        data = [{"id": name, "object": "model", "created": self.created, "owned_by": "blsp"} for name in names]
        return {"object": "list", "data": data}

    async def model(self, name: str) -> dict[str, Any]:
        """One of the models."""
        data = (await self.models())["data"]
        for model in data:
            if model["id"] == name:
                return dict(model)
        there = ", ".join(model["id"] for model in data)
        raise ApiError(404, f"the model {name!r} is not here; there is {there}", param="model", code="model_not_found")

    async def health(self) -> Response:
        """200 after the warm-up, while the thread of the model runs."""
        status = "failed" if not self._running else "ok" if self.ready else "starting"
        return JSONResponse({"status": status, "model": self.name}, status_code=200 if status == "ok" else 503)

    async def live(self) -> Response:
        """200 from the start on, while the thread of the model runs; otherwise a restart is needed."""
        status = "ok" if self._running else "failed"
        return JSONResponse({"status": status, "model": self.name}, status_code=200 if status == "ok" else 503)

    @property
    def _running(self) -> bool:
        return self.scheduler.alive and not self.failed

    async def no_route(self, request: Request) -> Response:
        """The refusal of an unknown route under /v1; it says what to use instead."""
        error, headers = no_route(request.method, request.url.path, OFFERED)
        response = await self.refuse(request, error)
        response.headers.update(headers)
        return response

    async def report_metrics(self) -> Response:
        return PlainTextResponse(
            generate_latest(self.metrics.registry).decode(), media_type="text/plain; version=0.0.4"
        )

    # --- from requests to the scheduler -------------------------------------------------------------------

    async def begin(self, body: ChatRequest, request: Request) -> Exchange:
        """The exchange for a conversation, after the scheduler has accepted its prompt."""
        end = request.state.end
        body.check_length(self.most_characters)
        client = client_of(request)
        self.scheduler.check_room(client)  # before any clip is decoded
        messages = await self._decoded(body, request, end)
        options: dict[str, Any] = {
            "client": client,
            "sharing": body.prompt_cache_key,
            "hear_only": self.remote is not None,
        }
        options |= {"stops": body.stops, "end": end, "may_shorten": body.new_tokens is None}
        exchange = self.ask(messages, self._decoding(body), **options)
        await while_connected(request, exchange.started(), exchange)
        return exchange

    async def _decoded(self, body: ChatRequest, request: Request, end: float) -> list[dict[str, Any]]:
        """Messages with their clips decoded, in order. end: the monotonic time at which the deadline passes."""
        spoken = [part for message in body.messages for part in message.parts if not isinstance(part, TextPart)]
        clips = iter(await self.audio.clips(spoken, request, end))
        messages = []
        for message in body.messages:
            parts = [part.text if isinstance(part, TextPart) else next(clips) for part in message.parts]
            role = "system" if message.role == "developer" else message.role
            messages.append({"role": role, "parts": parts})
        if not any(isinstance(part, np.ndarray) or part.strip() for part in messages[-1]["parts"]):
            raise ApiError(
                400,
                "messages: the last one is empty; ask something",
                param="messages",
                code="missing_required_parameter",
            )
        return messages

    def _decoding(self, body: ChatRequest) -> Decoding:
        limit = self.settings.max_new_tokens
        return replace(
            self.listener.decoding,
            max_new_tokens=min(body.new_tokens or limit, limit),
            temperature=body.temperature or 0.0,
            top_p=body.top_p or 1.0,
            seed=body.seed if body.seed is not None else secrets.randbits(32),
        )

    def ask(self, messages: list[dict[str, Any]], decoding: Decoding, **options: Any) -> Exchange:
        return Exchange(self.scheduler, messages, decoding, **options)

    @staticmethod
    async def _chunks(
        exchange: Exchange, head: dict[str, Any], usage: bool
    ) -> AsyncGenerator[dict[str, Any] | str, None]:
        """OpenAI's chunks: role, content, finish_reason, usage, [DONE]."""
        head = {**head, "object": "chat.completion.chunk"} | ({"usage": None} if usage else {})
        yield head | api.delta({"role": "assistant", "content": ""})
        async for piece in exchange.pieces():
            yield head | api.delta({"content": piece})
        yield head | api.delta({}, exchange.finish)
        if usage:
            yield head | {"choices": [], "usage": exchange.usage}
        yield "[DONE]"

    async def streamed(
        self,
        route: str,
        began: float,
        chunks: AsyncGenerator[Any, None],
        texts: Sequence[str],
        exchange: Exchange | None = None,
        failed: Callable[[ApiError], dict[str, Any]] = ApiError.body,
    ) -> AsyncIterator[Any]:
        """The chunks of an answer; an error becomes the last chunk. The answer is logged at the end.

        texts: the pieces of the answer so far. failed: the route's form of an error.
        """
        status = CLIENT_LEFT
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    yield chunk
            status = 200
        except ApiError as error:
            status = error.status
            yield failed(error)
        except Exception as error:
            log.error("%s failed", route, exc_info=error)
            status = 500
            yield failed(internal(error))
        finally:
            if exchange:
                exchange.cancel()
            self.log_answer(route, status, began, exchange, "".join(texts))

    # --- logs, counts and refusals -------------------------------------------------------------------------

    def log_answer(self, route: str, status: int, began: float, exchange: Exchange | None, text: str) -> None:
        self.metrics.requests.labels(route, str(status)).inc()
        seconds = time.monotonic() - began
        fields: dict[str, Any] = {"route": route, "status": status, "seconds": round(seconds, 3)}
        if exchange:
            fields |= {"prompt_tokens": exchange.usage["prompt_tokens"], "completion_tokens": exchange.tokens}
        content = ""
        if self.settings.log_content:
            asked = exchange.asked if exchange else [f"user: {UNWRITTEN}"]
            fields |= {"question": asked, "content": text}
            content = f": {asked!r} -> {text!r}"
        cost = f", {exchange.usage['prompt_tokens']} + {exchange.tokens} tokens" if exchange else ""
        log.info("%s %d, %.2f s%s%s", route, status, seconds, cost, content, extra={"fields": fields})

    def count_refusal(self, path: str, client: str, error: ApiError) -> None:
        """Count a refusal and log it without its content; repeated ones of a client are logged once a minute."""
        route = ROUTES.get(path, "other")
        self.metrics.requests.labels(route, str(error.status)).inc()
        flood = error.status in FLOODS
        if count := self._quiet.count(f"{client} {error.status}") if flood else 1:
            fields = {"route": route, "status": error.status, "code": error.code, "client": client, "count": count}
            times = f", {count} times since the last such line" if count > 1 else ""
            log.info("%s %d, %s, %s%s", route, error.status, error.code, client, times, extra={"fields": fields})

    async def refuse(self, request: Request, error: ApiError) -> Response:
        client = request.client.host if request.client else "unknown"
        self.count_refusal(request.url.path, client, error)
        headers = {"Retry-After": str(error.retry_after)} if error.retry_after else None
        return JSONResponse(error.body(), status_code=error.status, headers=headers)

    async def refuse_form(self, request: Request, error: RequestValidationError) -> Response:
        return await self.refuse(request, refusal_of(error))

    async def refuse_defect(self, request: Request, error: Exception) -> Response:
        """The answer after an error that no route expects; uvicorn logs it."""
        return await self.refuse(request, internal(error))

    async def refuse_route(self, request: Request, error: HTTPException) -> Response:
        if error.status_code == 404:
            return await self.no_route(request)
        code = "method_not_allowed" if error.status_code == 405 else "invalid_request"
        response = await self.refuse(request, ApiError(error.status_code, str(error.detail), code=code))
        response.headers.update(error.headers or {})
        return response
