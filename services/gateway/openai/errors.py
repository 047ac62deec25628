"""Errors as OpenAI's clients understand them: the body, the status and the headers."""

import math

from pydantic_core import to_json
from starlette.responses import Response

from shared.errors import RequestError

TYPES = {401: "authentication_error", 429: "rate_limit_error"}


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
