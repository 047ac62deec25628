"""Every NATS subject. `docs/protocol.md` has the same table with the messages beside it.

`pdserve/nats_accounts.py` derives from these functions who may publish and subscribe where.
"""

PREFIX = "pdserve.v1"

INBOX_PREFIX = "_INBOX."
"""Of all reply subjects: NATS libraries use it by default, and the gateway's NATS user may publish nowhere else."""

GENERATE = f"{PREFIX}.generate"
"""The public request API; gateways share it as one queue group."""

CANCEL = f"{PREFIX}.cancel"
"""Public: ends a request of the API by its id; every gateway receives it."""

STATUS = f"{PREFIX}.controller.status"
"""For operators: the controller's view of groups, instances and gateways, page by page."""

CHANGED = f"{PREFIX}.changed"
"""A map, or more of an instance's record than its figures, has changed in Redis: read it now. Carries no content."""

PROVISION = f"{PREFIX}.provision"
"""Received by the process that can start and end instances: `pdserve up`."""

GATEWAYS = "gateways"
"""The queue group in which gateways share GENERATE."""


def instance(instance_id: str, verb: str) -> str:
    """Returns the subject of one verb of an instance.

    Verbs: `prefill`, `decode`, `start`, `cancel`, `ping`, `assign`, and `gone.<gateway id>` (`gone`). All arrive over
    one subscription (`instance(id, ">")`), so a cancel never overtakes its request.
    """
    return f"{PREFIX}.instance.{instance_id}.{verb}"


def gateway(gateway_id: str, verb: str) -> str:
    """Returns the subject of one verb of a gateway, or of a controller while it sends a canary request.

    Verbs: `prefilled`, `tokens`, `moved`, `failed`, `slot_freed`, `ping`, and `gone.<request>.<index>` (`gone`).
    """
    return f"{PREFIX}.gateway.{gateway_id}.{verb}"


def admin(verb: str) -> str:
    """Returns the subject of an operator's request to the leading controller (`pdserve flip` and the like)."""
    return f"{PREFIX}.admin.{verb}"


def gone(key: str) -> str:
    """Returns the verb under which NATS reports to a sender (503, no responders) that nobody is subscribed to `key`."""
    return f"gone.{key}"


def verb_and_key(subject: str) -> tuple[str, str]:
    """Returns the verb of a subject of `instance` or `gateway`, and the key behind it, if any."""
    tokens = subject.split(".")
    return tokens[4], ".".join(tokens[5:])


def is_inbox(subject: str) -> bool:
    """Returns whether a client may receive answers there, as at every subject that a NATS library makes for replies."""
    return subject.startswith(INBOX_PREFIX)
