"""Every error that crosses a boundary, with its HTTP status and its code on the wire.

PDServeError
├── RequestError                what a client can be told
│   ├── InvalidRequest          400  invalid_request
│   │   └── ContextTooLong      400  context_length_exceeded
│   ├── InvalidAPIKey           401  invalid_api_key
│   ├── ModelNotFound           404  model_not_found
│   ├── PathNotFound            404  path_not_found
│   ├── MethodNotAllowed        405  method_not_allowed
│   ├── RequestTimeout          408  request_timeout        the client did not send its request in time
│   ├── IdempotencyConflict     409  idempotency_conflict   another request has the same Idempotency-Key
│   ├── BodyTooLarge            413  body_too_large
│   ├── UnsupportedEncoding     415  unsupported_encoding
│   ├── HeadersTooLarge         431  headers_too_large
│   ├── Overloaded              429  overloaded             no free slot before the TTFT deadline
│   ├── SlowClient              499  slow_client            the client leaves too many tokens unread
│   ├── Cancelled               499  cancelled
│   ├── InternalError           500  internal_error         a fault of this program; its log says more
│   ├── InstanceFailed          500  instance_failed        every attempt met a failing instance
│   ├── NoInstance              503  no_instance            nobody there to serve it
│   └── DeadlineExceeded        504  deadline_exceeded
├── TransferFailed              a KV fetch that did not end in a verified copy
├── PeerUnavailable             a peer that did not answer a request on the bus in time
│   └── NoResponders            nobody is subscribed to the subject of the request
├── MessageTooLarge             a message above max_payload of NATS, or with subjects above its control line limit
├── BusUnavailable              NATS cannot be reached
├── RegistryUnavailable         Redis cannot be reached
├── ModelRefused                a model that this engine cannot serve right
└── SettingsInvalid             a setting that is unknown or has a bad value
"""

from typing import ClassVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

RETRY_AFTER_S = 1.0
"""After which a client may try again that met no free slot, or nobody."""

_JSON_NAMES = {"None": "null", "True": "true", "False": "false"}
MAX_SHOWN_CHARS = 60
MAX_MESSAGE_CHARS = 2000
"""A longer error text is cut, since it may quote a request."""
MAX_PARAM_CHARS = 200


class ErrorBody(BaseModel):
    """An error as it travels: in a NATS message, or as the `error` object of an HTTP answer."""

    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None


class PDServeError(Exception):
    """The root of all errors of this project."""


class RequestError(PDServeError):
    """An error that ends one request and is told to its client.

    Args:
        message: one sentence that says what is wrong and what to do.
        param: the request field that is at fault, if one is.
        retry_after_s: seconds after which trying again makes sense, if it does.
    """

    status: ClassVar[int]
    code: ClassVar[str]

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> ErrorBody:
        """Returns the error as it travels; text and field name have bounded lengths."""
        return ErrorBody(
            code=self.code,
            message=shortened(self.message, MAX_MESSAGE_CHARS),
            param=None if self.param is None else shortened(self.param, MAX_PARAM_CHARS),
            retry_after_s=self.retry_after_s,
        )


class InvalidRequest(RequestError):
    status = 400
    code = "invalid_request"


class ContextTooLong(InvalidRequest):
    code = "context_length_exceeded"


class InvalidAPIKey(RequestError):
    status = 401
    code = "invalid_api_key"


class ModelNotFound(RequestError):
    status = 404
    code = "model_not_found"


class PathNotFound(RequestError):
    status = 404
    code = "path_not_found"


class MethodNotAllowed(RequestError):
    """The path does not take the method.

    Args:
        allow: the methods it takes, separated by commas, as in the header Allow.
    """

    status = 405
    code = "method_not_allowed"

    def __init__(self, message: str, *, allow: str) -> None:
        super().__init__(message)
        self.allow = allow


class RequestTimeout(RequestError):
    status = 408
    code = "request_timeout"


class IdempotencyConflict(RequestError):
    status = 409
    code = "idempotency_conflict"


class UnsupportedEncoding(RequestError):
    status = 415
    code = "unsupported_encoding"


class HeadersTooLarge(RequestError):
    status = 431
    code = "headers_too_large"


class SlowClient(RequestError):
    status = 499
    code = "slow_client"


class BodyTooLarge(RequestError):
    status = 413
    code = "body_too_large"


class Overloaded(RequestError):
    status = 429
    code = "overloaded"


class Cancelled(RequestError):
    status = 499
    code = "cancelled"


class InternalError(RequestError):
    """A fault of this program, of which a client is told nothing but that it happened."""

    status = 500
    code = "internal_error"


class InstanceFailed(RequestError):
    status = 500
    code = "instance_failed"


class NoInstance(RequestError):
    status = 503
    code = "no_instance"


class DeadlineExceeded(RequestError):
    status = 504
    code = "deadline_exceeded"


class TransferFailed(PDServeError):
    """A KV fetch broke off, came late, or did not match its header."""


class PeerUnavailable(PDServeError):
    """A peer gave no answer on the bus in time."""


class NoResponders(PeerUnavailable):
    """Nobody is subscribed to the subject: NATS reported it at once, so the peer is gone."""


class MessageTooLarge(PDServeError):
    """A message cannot be sent: NATS would reject it. The text says which limit it exceeds and what to do."""


class BusUnavailable(PDServeError):
    """NATS cannot be reached."""


class RegistryUnavailable(PDServeError):
    """Redis cannot be reached."""


class ModelRefused(PDServeError):
    """The model cannot be served right; the message names the model and the reason."""


class SettingsInvalid(PDServeError):
    """A setting is unknown or has a bad value; the message says what to write."""


def shortened(text: str, max_chars: int) -> str:
    """`text` with at most `max_chars` characters; dots mark where it was cut."""
    return text if len(text) <= max_chars else f"{text[: max_chars - 3]}..."


def gateway_is_ending() -> NoInstance:
    """Returns the error for a request that outlasts its gateway."""
    return NoInstance("This gateway is ending: send the request again.", retry_after_s=RETRY_AFTER_S)


def invalid_request(error: ValidationError) -> InvalidRequest:
    """Returns the first of pydantic's findings, in one sentence that names the field."""
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    if field := first.get("ctx", {}).get("field"):
        path.append(field)
    param = ".".join(path)[:MAX_PARAM_CHARS]
    return InvalidRequest(_sentence(first, param), param=param or None)


def _sentence(found: ErrorDetails, param: str) -> str:
    message = found["msg"]
    if found["type"] == "missing":
        return f"`{param}` is required."
    if found["type"] == "request":
        return f"`{param}` {message}."
    if found["type"] == "extra_forbidden":
        return f"`{param}` is unknown: remove it, or check its spelling."
    if found["type"] == "json_invalid":
        return f"This is not JSON: {message.removeprefix('Invalid JSON: ')}."
    if not param:
        return f"The request cannot be read: {message[0].lower()}{message[1:]}."
    if found["type"] == "too_short":
        return f"`{param}` is too short: it needs at least {found['ctx']['min_length']} items."
    shown = _JSON_NAMES.get(repr(found["input"]), repr(found["input"]))
    if len(shown) > MAX_SHOWN_CHARS:
        shown = f"{shown[:MAX_SHOWN_CHARS]}..."
    return f"`{param}`: {message[0].lower()}{message[1:]}, but it is {shown}."
