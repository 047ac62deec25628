"""Checks of what Redis contains. A value that cannot be used is skipped, and the log says so once."""

import logging
import re
import time
from collections.abc import Callable
from typing import TypeVar

from pydantic import ValidationError

from shared.messages.records import GroupMap

MAX_VERSION_AHEAD_MS = 86_400_000
"""Versions of maps are Unix milliseconds. One that is further ahead than a day was not written by a controller."""
MAX_TERM_AHEAD_MS = 30 * 86_400_000
"""Terms are Unix milliseconds, too, but they go on growing where a clock is set back."""
MAX_REPORTED = 1000

_IDENTIFIER = re.compile(r"[A-Za-z0-9_.:-]{1,200}")

AnyValue = TypeVar("AnyValue")
log = logging.getLogger(__name__)


class Unusable:
    """The names of values that were skipped, so that a value that is read five times a second is reported once."""

    def __init__(self) -> None:
        self._names: set[str] = set()

    def parsed(self, name: str, parse: Callable[[str], AnyValue], text: str) -> AnyValue | None:
        """Parses the value of a key or field; None if it cannot be used."""
        try:
            value = parse(text)
        except ValidationError as error:
            self._report(logging.WARNING, name, f"this version cannot read it: {error}")
            return None
        except ValueError as error:
            self._report(logging.ERROR, name, str(error))
            return None
        self._names.discard(name)
        return value

    def _report(self, level: int, name: str, reason: str) -> None:
        if name in self._names:
            return
        if len(self._names) >= MAX_REPORTED:
            self._names.clear()
        self._names.add(name)
        log.log(level, "skipping %s in Redis: %s", name, reason[:500])


def checked_version(text: str) -> int:
    """Returns the version of a map.

    Raises:
        ValueError: it is no number, negative, or further ahead than a day.
    """
    try:
        version = int(text)
    except ValueError:
        raise ValueError(f"version {text[:40]!r} is not a number") from None
    if not 0 <= version <= time.time() * 1000 + MAX_VERSION_AHEAD_MS:
        raise ValueError(f"version {text[:40]} is more than a day ahead: another program wrote it, or a clock is wrong")
    return version


def checked_map(name: str, text: str) -> GroupMap:
    """Returns the map that a group's field contains.

    Raises:
        ValueError: it belongs to another group, or has a version or a term that no controller has given it.
    """
    found = GroupMap.model_validate_json(text)
    if found.name != name:
        raise ValueError(f"it is the map of group {found.name[:40]!r}")
    checked_version(str(found.version))
    if not 0 <= found.term <= time.time() * 1000 + MAX_TERM_AHEAD_MS:
        raise ValueError(f"term {str(found.term)[:40]} is more than 30 days ahead: another program wrote it")
    return found


def checked_id(name: str, value_id: str) -> None:
    """Checks the id of a record that was written under the key of `name`.

    Raises:
        ValueError: it belongs to another, or cannot be a part of a subject.
    """
    if value_id != name:
        raise ValueError(f"it belongs to {value_id[:40]!r}")
    if not is_identifier(name):
        raise ValueError(f"{name[:40]!r} is not an id")


def is_identifier(text: str) -> bool:
    """Returns whether a text can be an id, which becomes a part of subjects (as `Identifier` in messages)."""
    return _IDENTIFIER.fullmatch(text) is not None
