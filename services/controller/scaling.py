"""Groups that grow and shrink: whole replicas by the plan of the day and by load, single instances by need.

What is decided is in `policy/tidal.py` and `policy/placement.py`; here it is said to membership, which moves instances.
"""

import logging
from dataclasses import dataclass, field
from datetime import UTC, datetime

from services.controller.decisions import Decisions
from services.controller.policy import placement, tidal
from services.controller.policy.load import GroupLoad
from services.controller.policy.placement import Gift
from services.controller.policy.tidal import LoadState
from shared.groups import GroupSpec, declared_name, replica_name

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Scaling:
    """How many replicas of each declared group there should be."""

    declared: dict[str, GroupSpec]
    decisions: Decisions
    _counts: dict[str, int] = field(default_factory=dict)
    _states: dict[str, LoadState] = field(default_factory=dict)
    _gifts: placement.State = field(default_factory=placement.State)

    def take_over(self, names: set[str]) -> None:
        """Begins with the replicas that a new leader finds."""
        self._states.clear()
        self._counts = {base: max(1, sum(declared_name(name) == base for name in names)) for base in self.declared}

    def specs(self) -> dict[str, GroupSpec]:
        """The groups that there should be, replicas among them, by name."""
        return {
            replica_name(base, number): spec.model_copy(update={"name": replica_name(base, number)})
            for base, spec in self.declared.items()
            for number in range(1, self._counts.get(base, 1) + 1)
        }

    def follow(self, loads: dict[str, GroupLoad], num_spares: int, now: float) -> None:
        """The plan, and the load of groups that have one. What was of groups that are no more is forgotten."""
        self._counts = {base: count for base, count in self._counts.items() if base in self.declared}
        self._states = {base: state for base, state in self._states.items() if base in self.declared}
        for base, spec in self.declared.items():
            current = self._counts.get(base, 1)
            names = [replica_name(base, number) for number in range(1, current + 1)]
            seen = [loads[name] for name in names if name in loads]
            planned = tidal.replicas_at(spec, datetime.now(UTC).time())
            answer = tidal.replicas_by_load(spec, planned, current, seen, self._states.get(base, LoadState()), now)
            self._states[base] = answer.state
            if answer.count > max(current, planned) and num_spares < spec.replica_instances:
                continue  # nothing to make it of: single instances may still come
            if answer.count != current:
                self.decisions.take(base, f"{answer.count} replicas in place of {current}", answer.reason).end("begun")
                self._counts[base] = answer.count

    def gift(
        self, loads: dict[str, GroupLoad], specs: dict[str, GroupSpec], num_spares: int, now: float
    ) -> Gift | None:
        """An instance for a group that needs one more, if any can be spared."""
        known = {name: load for name, load in loads.items() if name in specs}
        gift, self._gifts = placement.decide(known, specs, num_spares, self._gifts, now)
        return gift
