"""Every NATS subject. `docs/protocol.md` has the same table with the messages beside it."""

PREFIX = "pdserve.v1"

GENERATE = f"{PREFIX}.generate"
"""The public request API; gateways share it as one queue group."""

CANCEL = f"{PREFIX}.cancel"
"""Public: ends a request of the API by its id; every gateway hears it."""

STATUS = f"{PREFIX}.controller.status"
"""Public: the controller's view of groups, instances and gateways."""

CHANGED = f"{PREFIX}.changed"
"""An instance's record has changed in more than its figures: read it now."""

PROVISION = f"{PREFIX}.provision"
"""Whoever can start and end instances listens here: `pdserve up`."""

GATEWAYS = "gateways"
"""The queue group in which gateways share GENERATE."""


def instance(instance_id: str, verb: str) -> str:
    """The subject of one verb of an instance: `prefill`, `decode`, `cancel`, `assign`, or `gone.<gateway id>` (`gone`).

    All verbs of an instance arrive over one subscription (`instance(id, ">")`), so a cancel never overtakes its
    request.
    """
    return f"{PREFIX}.instance.{instance_id}.{verb}"


def map_of(group: str) -> str:
    """Where the leading controller announces a group's map: `GroupMap` as it stands in Redis."""
    return f"{PREFIX}.map.{group}"


def admin(verb: str) -> str:
    """The operator's wishes to the leading controller (`pdserve flip` and the like)."""
    return f"{PREFIX}.admin.{verb}"


def gateway(gateway_id: str, verb: str) -> str:
    """The subject of one kind of event for a gateway: `prefilled`, `tokens`, `moved`, `failed`, `slot_freed` or
    `gone.<request>.<index>`.
    """
    return f"{PREFIX}.gateway.{gateway_id}.{verb}"


def gone(key: str) -> str:
    """The verb under which NATS tells a sender (503, no responders) that nobody listens to its stream `key`."""
    return f"gone.{key}"


def verb_and_key(subject: str) -> tuple[str, str]:
    """The verb of a subject of `instance` or `gateway`, and the key behind it, if any."""
    tokens = subject.split(".")
    return tokens[4], ".".join(tokens[5:])
