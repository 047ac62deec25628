"""Request bodies: read within a limit, parsed as a JSON object, and checked against a schema."""

from collections.abc import Mapping
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from shared.errors import BodyTooLarge, Cancelled, InvalidRequest, invalid_request

Schema = TypeVar("Schema", bound=BaseModel)


async def read_object(request: Request, max_body_bytes: int) -> dict[str, object]:
    """The JSON object in a request's body.

    Raises:
        BodyTooLarge: by its Content-Length, before anything is read, or as soon as more has come.
        InvalidRequest: it is not a JSON object in UTF-8.
        Cancelled: the client is gone.
    """
    body = await _read(request, max_body_bytes)
    try:
        content = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"The body is not valid JSON in UTF-8: {error}.") from error
    if not isinstance(content, dict):
        raise InvalidRequest(
            f"The body must be a JSON object, but at line 1 column 1 a {type(content).__name__} begins."
        )
    return content


async def _read(request: Request, max_body_bytes: int) -> bytes:
    too_large = BodyTooLarge(f"The body is larger than the {max_body_bytes} bytes that this service takes: shorten it.")
    if int(request.headers.get("content-length", 0)) > max_body_bytes:
        raise too_large
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_body_bytes:
                raise too_large
    except ClientDisconnect as error:
        raise Cancelled("The client went while it sent the request.") from error
    return bytes(body)


def parse(schema: type[Schema], fields: Mapping[str, object]) -> Schema:
    """The request as its schema.

    Raises:
        InvalidRequest: the first fault, by the field's name.
    """
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        raise invalid_request(error) from error
