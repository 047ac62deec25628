"""What the command line of `pdserve up` asks for."""

from collections import Counter
from dataclasses import dataclass, field

from shared.groups import DEFAULT, GroupsFile


@dataclass(frozen=True, slots=True)
class Place:
    """What an instance is to begin as."""

    group: str
    role: str
    number: int

    @property
    def name(self) -> str:
        name = f"{self.role}-{self.number}"
        return name if self.group == DEFAULT else f"{self.group}-{name}"


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the command line asks for; settings by field name, only those that it gives."""

    places: list[Place]
    gateway: dict[str, object]
    instance: dict[str, object]
    controller: dict[str, object]
    max_instances: int = 0
    """How many instances the controller may have in all; 0 is those that there are from the beginning."""
    launcher: dict[str, object] = field(default_factory=dict)
    """Settings of `pdserve up` itself."""

    @property
    def summary(self) -> str:
        """How many of what, as "2 prefill and 1 decode"."""
        counts = Counter(place.role for place in self.places)
        return " and ".join(f"{number} {role}" for role, number in counts.items())


def places_of(groups: GroupsFile, num_spares: int) -> list[Place]:
    """An instance for each that the groups begin with, and spares."""
    declared = [
        Place(spec.name, role, number)
        for role in ("prefill", "decode")
        for spec in groups.groups
        for number in range(spec.prefill if role == "prefill" else spec.decode)
    ]
    return declared + [Place(DEFAULT, "spare", number) for number in range(num_spares)]
