"""Reads the groups file. One that cannot be meant is refused at start, with a sentence that names the file, the group
and the line, and says what to write.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from shared.errors import MAX_SHOWN_CHARS, SettingsInvalid
from shared.groups import MAX_NAME_CHARS, GroupsFile, GroupSpec, PlanEntry

_KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")
_PARTS: tuple[tuple[type[BaseModel], str], ...] = (
    (GroupsFile, "the groups file"),
    (GroupSpec, "a group"),
    (PlanEntry, "an entry of a plan"),
)
"""What a line can belong to, by how deep it stands."""


def read_groups(path: Path | str) -> GroupsFile:
    """Reads a groups file.

    Raises:
        SettingsInvalid: it cannot be read, or not be meant.
    """
    try:
        loaded = _loaded(Path(path))
        if not isinstance(loaded, Mapping):
            raise SettingsInvalid("there is no mapping in it: begin with the line `groups:`")
        return GroupsFile.model_validate(loaded, by_alias=True, by_name=False)
    except SettingsInvalid as error:
        raise SettingsInvalid(f"{path}: {error}") from error
    except ValidationError as error:
        raise SettingsInvalid(f"{path}: {_sentence(error, loaded)}") from error


def _loaded(path: Path) -> object:
    """What the YAML in the file says."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsInvalid(f"it cannot be read ({error.strerror}): write the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise SettingsInvalid("it is no text: write YAML in UTF-8") from error
    try:
        _refuse_keys(yaml.compose(text, Loader=yaml.SafeLoader))
        loaded: object = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise SettingsInvalid(f"it is not YAML: {place}{error.problem}; docs/groups.md has an example") from error
    except (yaml.YAMLError, ValueError) as error:
        raise SettingsInvalid(f"it is not YAML: {str(error).splitlines()[0]}; docs/groups.md has an example") from error
    return loaded


def _refuse_keys(root: Any) -> None:
    """Refuses keys that PyYAML would take in silence: one that is there twice (the last one counts), or is no word.

    Args:
        root: the node of a whole document; an anchor lets a node be met again, even within itself.
    """
    nodes, seen = [root], set()
    while nodes:
        node = nodes.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            _refuse_keys_of(node)
            nodes += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value


def _refuse_keys_of(mapping: Any) -> None:
    met: set[str] = set()
    for key, _ in mapping.value:
        line = key.start_mark.line + 1
        if key.tag not in _KEY_TAGS:
            shown = f" `{key.value}`" if isinstance(key, yaml.ScalarNode) else ""
            raise SettingsInvalid(f"line {line} has a key{shown} that YAML takes for no word: write one of ours")
        if key.value in met:
            raise SettingsInvalid(f"line {line} has `{key.value}` a second time: write it once")
        met.add(key.value)


def _sentence(error: ValidationError, loaded: object) -> str:
    """The most telling of pydantic's findings: an unknown key may be why another is missing."""
    found = error.errors(include_url=False)
    first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
    where = _where(first["loc"], loaded)
    if first["type"] == "value_error":
        return f"{where}{first['ctx']['error']}"
    keys = [part for part in first["loc"] if isinstance(part, str)]
    part, called = _PARTS[len(keys) - 1]
    fields = {str(info.validation_alias or name): info for name, info in part.model_fields.items()}
    key = keys[-1]
    if first["type"] == "extra_forbidden":
        return f"{where}`{key}` is no key of {called}: {_meant(key, fields)}"
    return f"{where}{_fault(first, key)}: write {fields[key].description}"


def _fault(found: ErrorDetails, key: str) -> str:
    if found["type"] == "missing":
        return f"`{key}` is missing"
    if found["type"] == "too_short":
        return f"`{key}` is empty"
    shown = repr(found["input"])
    shown = shown if len(shown) <= MAX_SHOWN_CHARS else f"{shown[:MAX_SHOWN_CHARS]}..."
    line = shown if isinstance(found["loc"][-1], int) else f"{key}: {shown}"
    return f"`{line}` cannot be used"


def _meant(key: str, fields: Mapping[str, FieldInfo]) -> str:
    near = difflib.get_close_matches(key, fields, n=2)
    return f"did you mean {' or '.join(near)}?" if near else f"write one of {', '.join(fields)}"


def _where(location: tuple[int | str, ...], loaded: object) -> str:
    """The group, by name where it has a good one, and the entry of its plan."""
    numbers = [part for part in location if isinstance(part, int)]
    if not numbers:
        return ""
    name = _name_of(loaded, numbers[0])
    group = f"`{name}`" if name and location[-1] != "name" else f"{numbers[0] + 1}"
    entry = f", entry {numbers[1] + 1} of `plan`" if len(numbers) > 1 else ""
    return f"group {group}{entry}: "


def _name_of(loaded: object, index: int) -> str | None:
    groups = loaded.get("groups") if isinstance(loaded, Mapping) else None
    group = groups[index] if isinstance(groups, list) else None
    name = group.get("name") if isinstance(group, Mapping) else None
    return name if isinstance(name, str) and name.isprintable() and len(name) <= MAX_NAME_CHARS else None
