"""What tests of the controller stand on: records and maps made by hand."""

from shared.messages.records import GroupMap, InstanceRecord, Member, Role
from tests.registry.test_view import record


def spare(name: str, **changes: object) -> InstanceRecord:
    """An instance without a role or a wish."""
    values: dict[str, object] = {"role": None, "group": None, "epoch": 0, "state": "spare"}
    return record(name, **values | changes)


def newcomer(name: str, role: Role, **changes: object) -> InstanceRecord:
    """One that has not been anything yet, and wishes to play a role in the group chat."""
    return spare(name, **{"preferred_role": role, "preferred_group": "chat"} | changes)


def serving(name: str, role: Role, **changes: object) -> InstanceRecord:
    """One that plays a role, in the group chat unless said otherwise, in its first epoch."""
    return record(name, **{"role": role, "group": "chat", "epoch": 1} | changes)


def member(one: InstanceRecord) -> Member:
    """An instance as a map has it that knows its record."""
    return Member.model_validate({"instance_id": one.id, **one.model_dump(include=set(Member.model_fields))})


def map_of(name: str, *members: InstanceRecord, **changes: object) -> GroupMap:
    values: dict[str, object] = {"name": name, "scenario": name, "version": 1, "term": 1}
    return GroupMap.model_validate(values | {"members": tuple(map(member, members))} | changes)
