"""Which scenario that gateways found in unlabelled traffic earns a group of its own, and which has to give it up. Pure.

A label **earns** a group when for `earn_s` it has had a good part of the work, there was other work beside it, and it
differed from that: its ratio of prompt to output wants another ratio of instances, or its common prefix a cache of its
own. It **falls back** when for `fall_s` it has had hardly any work. The shares lie far apart, and each change has to
settle before the next, so that groups do not come and go with the weather.

Shares are of work and not of requests: one long prompt costs what a hundred short ones do.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True, slots=True)
class LabelLoad:
    """What one label's requests did over the last window, over all gateways.

    Attributes:
        requests_per_s: requests.
        prompt_tokens, output_tokens: of one of them, on average.
        shared_prefix_tokens: leading tokens that their prompts have in common, at least.
    """

    requests_per_s: float = 0.0
    prompt_tokens: float = 0.0
    output_tokens: float = 0.0
    shared_prefix_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Costs:
    """What a token costs an instance. Only the proportion counts, so any unit will do; seconds, where they are measured
    (`Work` of the instances' records). The default is a guess for lack of these.
    """

    prompt_token: float = 1.0
    output_token: float = 5.0

    def work(self, load: LabelLoad) -> float:
        """Of a label, per second. The whole prompt counts: out of a shared pool's cache, its prefix may be evicted."""
        one = self.prompt_token * load.prompt_tokens + self.output_token * load.output_tokens
        return load.requests_per_s * one


@dataclass(frozen=True, slots=True)
class Rules:
    """When a label earns a group, and when it falls back.

    Attributes:
        earn_share, earn_s: it has to have at least this share (0 .. 1) of the work, for so long.
        earn_requests_per_s: and so many requests: of fewer, shares are chance.
        ratio_factor: it differs when its prompt tokens for each output token are so many times the others', or
            the others' are so many times its.
        prefix_tokens: or when its prompts have so many leading tokens in common.
        fall_share, fall_s: it falls back having had less than this share for so long. Others have to have as much.
        group_instances: that a new group gets.
        default_instances: that the default group keeps.
        settle_s: between two changes.
    """

    earn_share: float = 0.25
    earn_s: float = 30.0
    earn_requests_per_s: float = 0.5
    ratio_factor: float = 3.0
    prefix_tokens: int = 256
    fall_share: float = 0.05
    fall_s: float = 60.0
    group_instances: int = 2
    default_instances: int = 2
    settle_s: float = 30.0


@dataclass(frozen=True, slots=True)
class State:
    """What one decision leaves to the next. It begins with the groups that there are.

    Attributes:
        groups: the labels that have a group.
        due_since: since when (seconds, on the caller's clock) a label has been due for a change, for those that are: to
            get a group, or to give it up.
        changed_at: when the last change was decided.
    """

    groups: frozenset[str] = frozenset()
    due_since: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    changed_at: float | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """A label's group is to be founded, or dissolved: its instances and its requests go (back) to the default group."""

    action: Literal["found", "dissolve"]
    label: str
    reason: str


@dataclass(frozen=True, slots=True)
class Instances:
    """How many there are to give: those of the default group, and those of no group."""

    default: int
    spare: int = 0


def decide(
    labels: Mapping[str, LabelLoad],
    others: LabelLoad,
    instances: Instances,
    state: State,
    now: float,
    rules: Rules = Rules(),
    costs: Costs = Costs(),
) -> tuple[State, Decision | None]:
    """At most one change, and the state for the next call. To be called again and again, about each second or faster.

    Without any work nothing changes and nothing becomes due: there is nothing to measure shares by.

    Args:
        labels: the load of each label, whether it has a group or not.
        others: of the rest of the default group: requests without a label.
        now: seconds, on any clock that does not go back.
    """
    traffic = _traffic(labels, others, state.groups, costs)
    if traffic.work == 0:
        return replace(state, due_since=MappingProxyType({})), None
    due = {label for label in labels.keys() | state.groups if _is_due(traffic, label, rules)}
    state = replace(state, due_since=MappingProxyType({label: state.due_since.get(label, now) for label in due}))
    if state.changed_at is not None and now - state.changed_at < rules.settle_s:
        return state, None
    decision = next(iter(_decisions(traffic, instances, state, now, rules)), None)
    return (state, None) if decision is None else (_after(state, decision, now), decision)


@dataclass(frozen=True, slots=True)
class _Traffic:
    """The loads, and what they cost.

    Attributes:
        pooled: the loads that the default group serves.
        work: of all together.
    """

    labels: Mapping[str, LabelLoad]
    pooled: Mapping[str | None, LabelLoad]
    groups: frozenset[str]
    costs: Costs
    work: float

    def load(self, label: str) -> LabelLoad:
        return self.labels.get(label, LabelLoad())

    def share(self, label: str) -> float:
        """Of the work."""
        return self.costs.work(self.load(label)) / self.work

    def beside(self, label: str) -> list[LabelLoad]:
        """What the default group serves beside this label."""
        return [load for other, load in self.pooled.items() if other != label]

    def share_beside(self, label: str) -> float:
        return sum(map(self.costs.work, self.beside(label))) / self.work


def _traffic(labels: Mapping[str, LabelLoad], others: LabelLoad, groups: frozenset[str], costs: Costs) -> _Traffic:
    pooled: dict[str | None, LabelLoad] = {label: load for label, load in labels.items() if label not in groups}
    pooled[None] = others
    work = sum(map(costs.work, labels.values())) + costs.work(others)
    return _Traffic(labels, pooled, groups, costs, work)


def _is_due(traffic: _Traffic, label: str, rules: Rules) -> bool:
    """Whether a label should change, if it stays like this."""
    if label in traffic.groups:
        return traffic.share(label) < rules.fall_share
    return (
        traffic.share(label) >= rules.earn_share
        and traffic.load(label).requests_per_s >= rules.earn_requests_per_s
        and traffic.share_beside(label) >= rules.fall_share
        and _difference(traffic, label, rules) is not None
    )


def _difference(traffic: _Traffic, label: str, rules: Rules) -> str | None:
    """By what a label differs from what is served beside it, in words; None where it does not."""
    load = traffic.load(label)
    if load.shared_prefix_tokens >= rules.prefix_tokens:
        return f"its prompts begin with the same {load.shared_prefix_tokens} tokens"
    own, beside = _ratio([load]), _ratio(traffic.beside(label))
    if max(own, beside) >= rules.ratio_factor * min(own, beside):
        return f"it has {own:,.2f} prompt tokens for each output token, the others {beside:,.2f}"
    return None


def _ratio(loads: Iterable[LabelLoad]) -> float:
    """Prompt tokens for each output token. Each request counts as having at least one of both."""
    prompt = output = 0.0
    for load in loads:
        prompt += load.requests_per_s * max(1.0, load.prompt_tokens)
        output += load.requests_per_s * max(1.0, load.output_tokens)
    return prompt / output if output else 1.0


def _decisions(traffic: _Traffic, instances: Instances, state: State, now: float, rules: Rules) -> list[Decision]:
    """All that can be done now, in the order in which it should: groups that nobody needs, then the largest need."""
    due_s = {label: now - since for label, since in state.due_since.items()}
    ripe = sorted(due_s, key=lambda label: (-traffic.share(label), label))
    dissolved = [
        _dissolve(traffic, label, due_s[label], rules)
        for label in reversed(ripe)
        if label in state.groups and due_s[label] >= rules.fall_s
    ]
    to_give = instances.default + instances.spare - rules.default_instances
    if to_give < rules.group_instances:
        return dissolved
    founded = [
        _found(traffic, label, due_s[label], to_give, rules)
        for label in ripe
        if label not in state.groups and due_s[label] >= rules.earn_s
    ]
    return dissolved + founded


def _found(traffic: _Traffic, label: str, due_s: float, to_give: int, rules: Rules) -> Decision:
    reason = (
        f"{label} has had at least {rules.earn_share:.0%} of the work for {due_s:.0f} s "
        f"(now {traffic.share(label):.0%}, {traffic.load(label).requests_per_s:.1f} requests/s), and "
        f"{_difference(traffic, label, rules)}: it gets a group of its own, with {rules.group_instances} of "
        f"{to_give} instances that can be given"
    )
    return Decision("found", label, reason)


def _dissolve(traffic: _Traffic, label: str, due_s: float, rules: Rules) -> Decision:
    reason = (
        f"{label} has had less than {rules.fall_share:.0%} of the work for {due_s:.0f} s "
        f"(now {traffic.share(label):.1%}, {traffic.load(label).requests_per_s:.1f} requests/s): "
        "it goes back to the default group"
    )
    return Decision("dissolve", label, reason)


def _after(state: State, decision: Decision, now: float) -> State:
    """The state, taking it that the decision is carried out."""
    waiting = {label: since for label, since in state.due_since.items() if label != decision.label}
    founds = decision.action == "found"
    groups = state.groups | {decision.label} if founds else state.groups - {decision.label}
    return State(groups, MappingProxyType(waiting), now)
