"""Scenarios that gateways found in unlabelled traffic: which has a group of its own now (`policy/scenarios.py`)."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from services.controller.policy import scenarios
from services.controller.policy.observe import Samples
from services.controller.policy.scenarios import Decision, Instances, LabelLoad, State
from shared.groups import declared_name
from shared.messages.records import LabelTraffic

WINDOW_S = 10.0
EVERY_S = 1.0
PREFIX = "auto-"
"""How the names of groups begin that were found."""


@dataclass(slots=True)
class Discovery:
    """What has been found, and is being watched."""

    state: State = field(default_factory=State)
    _asked_at: float = 0.0

    def take_over(self, names: Iterable[str]) -> None:
        """Begins with the groups that a new leader finds."""
        self.state = State(groups=frozenset(declared_name(name) for name in names if name.startswith(PREFIX)))

    def decide(self, samples: Samples, instances: Instances, now: float) -> Decision | None:
        """At most one group to be founded or dissolved."""
        if now - self._asked_at < EVERY_S:
            return None
        self._asked_at = now
        loads = label_loads(samples, now)
        others = loads.pop("", LabelLoad())
        self.state, decision = scenarios.decide(loads, others, instances, self.state, now)
        return decision


def label_loads(samples: Samples, now: float) -> dict[str, LabelLoad]:
    """The load of each label over the last window, over all gateways that were there in all of it."""
    window = samples.since(now - WINDOW_S)
    if len(window) < 2:
        return {}
    first, last = window[0], window[-1]
    seconds = last.at - first.at
    totals: dict[str, LabelTraffic] = defaultdict(LabelTraffic)
    for name, gateway in last.gateways.items():
        before = first.gateways.get(name)
        if before is not None:
            for label, traffic in gateway.labels.items():
                totals[label] = _plus(totals[label], traffic, before.labels.get(label, LabelTraffic()))
    return {label: _load(total, seconds) for label, total in totals.items() if total.num_done and seconds > 0}


def _plus(total: LabelTraffic, after: LabelTraffic, before: LabelTraffic) -> LabelTraffic:
    return LabelTraffic(
        num_done=total.num_done + max(0, after.num_done - before.num_done),
        prompt_tokens=total.prompt_tokens + max(0, after.prompt_tokens - before.prompt_tokens),
        output_tokens=total.output_tokens + max(0, after.output_tokens - before.output_tokens),
        shared_prefix_tokens=max(total.shared_prefix_tokens, after.shared_prefix_tokens),
    )


def _load(total: LabelTraffic, seconds: float) -> LabelLoad:
    return LabelLoad(
        requests_per_s=total.num_done / seconds,
        prompt_tokens=total.prompt_tokens / total.num_done,
        output_tokens=total.output_tokens / total.num_done,
        shared_prefix_tokens=total.shared_prefix_tokens,
    )
