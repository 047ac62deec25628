"""In which order a group's instances load another model, so that requests always find a pair of like weights. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from services.controller.policy.membership import Place
from shared.errors import PDServeError
from shared.messages.records import ROLES, InstanceRecord, Role

LAST_PATIENCE_S = 600.0
"""How long the last decode instance with the old weights lets its requests end: nobody else could go on with them."""


class ImpossibleUpgrade(PDServeError):
    """A group cannot be upgraded without failing requests; the message says what it lacks."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Instances that change together: until the last of them has, nobody is sent to the others."""

    places: tuple[tuple[str, Place], ...]
    patience_s: float | None = None

    @property
    def instance_ids(self) -> list[str]:
        return [instance_id for instance_id, _ in self.places]


def batches(group: str, members: Sequence[InstanceRecord], spares: Sequence[InstanceRecord], model: str) -> list[Batch]:
    """The order for one group.

    First one instance of each role gets the new model, so that there is a new pair beside the old ones: a spare where
    the role has a single instance. Then the others follow one by one, and at the end the last old prefill instance
    before the last old decode instance, which lets its requests end.

    Args:
        members: of the group, those that have `model` already among them.
        spares: instances without a role.

    Raises:
        ImpossibleUpgrade: a role has a single instance, and there are not enough spares.
    """
    old: dict[Role, list[str]] = {
        role: [one.id for one in members if one.role == role and one.model_path != model] for role in ROLES
    }
    new = {role: [one.id for one in members if one.role == role and one.model_path == model] for role in ROLES}
    if not any(old.values()):
        return []
    free = [one.id for one in spares]
    first: list[tuple[str, Place]] = []
    for role in ROLES:
        if new[role]:
            continue
        if len(old[role]) > 1:
            first.append((old[role].pop(0), Place(group, role)))
        elif free:
            first.append((free.pop(0), Place(group, role)))
        else:
            raise ImpossibleUpgrade(
                f"group {group} has a single {role} instance, and there is no spare to stand in for it while it loads: "
                f"start another instance (PDSERVE_ROLE=spare), then upgrade again"
            )
    rest = [(one, Place(group, role)) for role in ROLES for one in old[role][:-1]]
    last = [(old[role][-1], Place(group, role)) for role in ROLES if old[role]]
    plan = [Batch(tuple(first))] if first else []
    plan += [Batch((one,)) for one in rest]
    return plan + [Batch((one,), LAST_PATIENCE_S if one[1].role == "decode" else None) for one in last]
