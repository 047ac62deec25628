"""API keys, as OpenAI's clients send them: `Authorization: Bearer <key>`."""

import hmac
from collections.abc import Iterable

from shared.errors import InvalidAPIKey

OPEN_PATHS = frozenset({"/health/live", "/health/ready", "/metrics"})


def authenticate(api_keys: frozenset[str], path: str, authorization: str | None) -> None:
    """Let the request pass if its path is open, if there are no keys at all, or if it has one of them.

    Raises:
        InvalidAPIKey: it has none, or a wrong one.
    """
    if not api_keys or path in OPEN_PATHS:
        return
    scheme, _, key = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not key:
        raise InvalidAPIKey("There is no API key: send the header `Authorization: Bearer <key>`.")
    if not _is_among(key, api_keys):
        raise InvalidAPIKey("The API key is not valid: ask this service's operator for one.")


def _is_among(key: str, api_keys: Iterable[str]) -> bool:
    # Headers come decoded as Latin-1. Every key is compared, in constant time, so that the time tells nothing of any.
    sent = key.encode("latin-1")
    matches = [hmac.compare_digest(sent, known.encode()) for known in api_keys]
    return any(matches)
