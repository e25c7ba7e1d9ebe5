"""Refusals in the form of OpenAI's error object, in plain English.

In:  a status and a sentence, the errors of pydantic, or an unknown route.
Out: `ApiError`, with `param` (the field as the client wrote it, `messages[0].content[1]`) and `code`.
Try: `raise ApiError(400, "n: is not supported by this server; leave it out", param="n", code="unsupported_parameter")`
Flow: every module of the server → **errors.py** → the client
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic_core import PydanticCustomError


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


def refusal(param: str, text: str, code: str) -> ApiError:
    """The refusal of one field; its message begins with the field's name."""
    return ApiError(400, f"{param}: {text}", param=param, code=code)


def internal(error: Exception) -> ApiError:
    """The answer after an error of ours; only its type is told."""
    return ApiError(500, f"the server failed ({type(error).__name__})", code="internal_error")


def late() -> ApiError:
    return ApiError(504, "the request's deadline passed", code="deadline_exceeded")


def _sendable(text: str) -> str:
    """The text without lone surrogates, which cannot be encoded; messages may repeat a client's text."""
    return text.encode(errors="replace").decode()


# --- fields that are wrong --------------------------------------------------------------------------------
def wrong_field(code: str, message: str, param: str = "") -> PydanticCustomError:
    """An error for pydantic's validators. param: a field inside the validated one, if it is the wrong one."""
    return PydanticCustomError("refused", "{message}", {"message": message, "code": code, "param": param})


SENTENCES = {  # pydantic's types of errors (their beginnings) → code, sentence
    "missing": ("missing_required_parameter", "is missing"),
    "bool_": ("invalid_type", "must be true or false"),
    "int_": ("invalid_type", "must be a whole number"),
    "float_": ("invalid_type", "must be a number"),
    "finite_number": ("invalid_value", "must be a finite number"),
    "string_": ("invalid_type", "must be text"),
    "list_type": ("invalid_type", "must be a list"),
    "dict_": ("invalid_type", "must be an object"),
    "model_": ("invalid_type", "must be an object"),
    "literal_error": ("invalid_value", "must be {expected}"),
    "greater_than_equal": ("invalid_value", "must be at least {ge}"),
    "greater_than": ("invalid_value", "must be above {gt}"),
    "less_than_equal": ("invalid_value", "must be at most {le}"),
    "less_than": ("invalid_value", "must be below {lt}"),
    "too_short": ("invalid_value", "must have at least {min_length} entries"),
    "too_long": ("invalid_value", "must have at most {max_length} entries"),
    "value_error": ("invalid_value", "{error}"),
}


def refusal_of(error: RequestValidationError) -> ApiError:
    """The first of pydantic's errors, with the field's name as the client wrote it and without pydantic's terms."""
    first = error.errors()[0]
    kind, context = first["type"], first.get("ctx") or {}
    if kind == "json_invalid":
        return ApiError(400, f"the body is not JSON: {context.get('error', 'it ends early')}", code="invalid_json")
    param = _path([*first["loc"], context.get("param", "")])
    if kind == "refused":
        code, message = context["code"], context["message"]
    else:
        choices = (SENTENCES[beginning] for beginning in SENTENCES if kind.startswith(beginning))
        code, sentence = next(choices, ("invalid_value", "is not valid"))
        message = sentence.format(**context)
        if "UploadFile" in message:  # FastAPI's own check
            message = "must be a file with a name (curl -F file=@question.wav)"
    if not param and isinstance(error.body, bytes):
        return ApiError(400, "the body must be JSON: send content-type: application/json", code="invalid_json")
    return ApiError(400, f"{param or 'the body'}: {message}", param=param or None, code=code)


def _path(location: Sequence[str | int]) -> str:
    """`("body", "messages", 0, "content", "<parts>", 1)` → `messages[0].content[1]`; `<…>` is a branch of a type."""
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step and step not in ("body", "query", "path") and not step.startswith("<"):
            path += f".{step}" if path else step
    return path


# --- routes that are not there ----------------------------------------------------------------------------

NOT_OFFERED = {  # OpenAI's routes (their beginnings) → what to use
    "/v1/audio/speech": "speech is not made here: let a text-to-speech server (Kokoro-FastAPI, Piper) or the browser's "
    "speechSynthesis read the answer of /v1/chat/completions",
    "/v1/realtime": "the Realtime API is not offered: send each turn to /v1/chat/completions with stream: true",
    "/v1/responses": "responses are not kept: send the whole conversation to /v1/responses",
    "/v1/completions": "completions without roles are not offered: use /v1/chat/completions",
    "/v1/embeddings": "embeddings are not offered: use a server with an embedding model",
    "/v1/images": "images are not offered: text and speech are",
    "/v1/files": "files are not kept: send a recording in the request itself",
    "/v1/batches": "batches are not offered: send requests at once to /v1/chat/completions, they share batches",
}


def no_route(method: str, path: str, offered: Mapping[str, str]) -> tuple[ApiError, dict[str, str]]:
    """The refusal and its headers. offered: the paths that exist, each with its method."""
    if path in offered:
        allowed = offered[path]
        return ApiError(405, f"{path}: takes {allowed}, not {method}", code="method_not_allowed"), {"Allow": allowed}
    for beginning, advice in NOT_OFFERED.items():
        if path == beginning or path.startswith(beginning + "/"):
            return ApiError(404, f"{path}: {advice}", code="not_offered"), {}
    near = f"/v1/{path.strip('/').removeprefix('v1').strip('/').removeprefix('v1/')}"
    if path.rstrip("/") in offered:
        meant = f"; it is {near}, without the slash at its end"
    else:
        meant = f"; it is {near}, so the client's base URL ends in /v1" if near in offered else ""
    return ApiError(404, f"{method} {path:.80}: there is no such route{meant}", code="unknown_url"), {}
