"""Errors as OpenAI's clients understand them: the body, the status and the headers."""

import math

from pydantic import ValidationError
from pydantic_core import ErrorDetails, to_json
from starlette.responses import Response

from shared.errors import InvalidRequest, RequestError

TYPES = {401: "authentication_error", 429: "rate_limit_error"}
MAX_SHOWN_CHARS = 60


class InternalError(RequestError):
    """A fault of this program, of which a client is told nothing but that it happened."""


class PathNotFound(RequestError):
    status = 404
    code = "path_not_found"


class MethodNotAllowed(RequestError):
    status = 405
    code = "method_not_allowed"


def error_json(error: RequestError) -> bytes:
    """The body `{"error": {"message", "type", "param", "code"}}`."""
    kind = TYPES.get(error.status, "invalid_request_error" if error.status < 499 else "server_error")
    return to_json({"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}})


def error_response(error: RequestError) -> Response:
    """The whole answer, with `Retry-After` in whole seconds where trying again makes sense."""
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(error_json(error), status_code=error.status, headers=headers, media_type="application/json")


def error_event(error: RequestError) -> bytes:
    """The same body as a server-sent event, for a stream whose head is out already."""
    return b"data: " + error_json(error) + b"\n\n"


def invalid_request(error: ValidationError) -> InvalidRequest:
    """The first of pydantic's findings, in one sentence that names the field."""
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    if field := first.get("ctx", {}).get("field"):
        path.append(field)
    param = ".".join(path)
    return InvalidRequest(_sentence(first, param), param=param or None)


def _sentence(found: ErrorDetails, param: str) -> str:
    message = found["msg"]
    if found["type"] == "missing":
        return f"`{param}` is required."
    if found["type"] == "request":
        return f"`{param}` {message}."
    shown = repr(found["input"])
    if len(shown) > MAX_SHOWN_CHARS:
        shown = f"{shown[:MAX_SHOWN_CHARS]}..."
    return f"`{param}`: {message[0].lower()}{message[1:]}, but it is {shown}."
