"""The groups file: which scenarios there are, and what each group begins with, aims at and may take.

docs/groups.md says what the lines mean, `groups_file.py` reads them.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

DEFAULT = "default"
"""The group (and its scenario) that serves what no other group does."""
MAX_NAME_CHARS = 48
REPLICA_MARK = "--"
"""Between a group's name and the number of a further replica."""
DAY_MIN = 24 * 60

Control = Literal["auto", "advise", "off"]


def replica_name(name: str, number: int) -> str:
    """What the controller calls replica `number` (from 1) of a group; the first has the group's own name."""
    return name if number == 1 else f"{name}{REPLICA_MARK}{number}"


def declared_name(name: str) -> str:
    """The name in the groups file of the group that `name` is a replica of."""
    return name.rpartition(REPLICA_MARK)[0] or name


def _without_mark(name: str) -> str:
    if REPLICA_MARK in name:
        raise ValueError(f"`name: {name}` has {REPLICA_MARK}, which stands before the number of a replica: write one -")
    return name


_Word = Annotated[str, Field(strict=True, max_length=MAX_NAME_CHARS, pattern=r"^[A-Za-z0-9_-]+$")]
_Milliseconds = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
_Instances = Annotated[int, Field(strict=True, ge=1)]

_TIME = 'in quotes, as "07:00" (YAML takes a bare 22:00 for a number)'
_WORD = f"at most {MAX_NAME_CHARS} letters, digits, _ and -, in quotes if YAML takes them for anything else"
_ROLE = "a whole number, 1 or more, as a group needs instances of both roles"


class _Line(BaseModel):
    """A part of the file. The description of a field is what to write there."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class PlanEntry(_Line):
    """So many replicas from `start` until before `end`, UTC. One that ends before it starts goes over midnight."""

    start: Annotated[str, Field(strict=True, pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]$")] = Field(
        validation_alias="from", serialization_alias="from", description=f'a time from "00:00" to "23:59", {_TIME}'
    )
    end: Annotated[str, Field(strict=True, pattern=r"^(([01][0-9]|2[0-3]):[0-5][0-9]|24:00)$")] = Field(
        validation_alias="to", serialization_alias="to", description=f'a time from "00:00" to "24:00", {_TIME}'
    )
    replicas: Annotated[int, Field(strict=True, ge=0)] = Field(description="a whole number, 0 or more")

    @model_validator(mode="after")
    def _lasts(self) -> Self:
        if self.start == self.end:
            raise ValueError(
                f'`from` and `to` are both "{self.start}": write two times, or "00:00" and "24:00" for the whole day'
            )
        return self

    def holds(self, minute: int) -> bool:
        """Whether `minute` (after midnight) is in it."""
        start_min, end_min = _minute(self.start), _minute(self.end)
        return (minute - start_min) % DAY_MIN < ((end_min - start_min) % DAY_MIN or DAY_MIN)

    def overlaps(self, other: "PlanEntry") -> bool:
        """Two spans of a circle overlap where one has the start of the other."""
        return self.holds(_minute(other.start)) or other.holds(_minute(self.start))

    def __str__(self) -> str:
        return f"{self.start}-{self.end}"


class GroupSpec(_Line):
    """A group as it is declared. Instances are counted over all its replicas."""

    name: Annotated[_Word, AfterValidator(_without_mark)] = Field(description=_WORD)
    scenario: _Word = Field(default="", description=_WORD)
    """What requests name; the group's name unless given."""
    prefill: _Instances = Field(default=1, description=_ROLE)
    decode: _Instances = Field(default=1, description=_ROLE)
    """The ratio that a replica begins with."""
    ttft_ms: _Milliseconds | None = Field(default=None, description="milliseconds, more than 0")
    """Objective: milliseconds from arrival to the first token; None is none."""
    tpot_ms: _Milliseconds | None = Field(default=None, description="milliseconds, more than 0")
    """Objective: milliseconds for each further token; None is none."""
    share: Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)] = Field(
        default=1.0, description="a number more than 0"
    )
    """Of spare instances, against other groups' shares."""
    min_instances: Annotated[int, Field(strict=True, ge=2)] = Field(
        default=2, description="a whole number, 2 or more: one instance of each role"
    )
    """Never fewer, except where the plan has 0 replicas."""
    max_instances: Annotated[int, Field(strict=True, ge=2)] | None = Field(
        default=None, description="a whole number, 2 or more, or leave it out for no bound"
    )
    plan: tuple[PlanEntry, ...] = Field(
        default=(), description='a list of entries as {from: "07:00", to: "22:00", replicas: 2}'
    )

    @property
    def replica_instances(self) -> int:
        """How many instances a replica begins with."""
        return self.prefill + self.decode

    @property
    def ttft_s(self) -> float | None:
        return None if self.ttft_ms is None else self.ttft_ms / 1000

    @property
    def tpot_s(self) -> float | None:
        return None if self.tpot_ms is None else self.tpot_ms / 1000

    @model_validator(mode="before")
    @classmethod
    def _scenario_is_the_name(cls, given: object) -> object:
        if isinstance(given, Mapping) and "name" in given and "scenario" not in given:
            return {**given, "scenario": given["name"]}
        return given

    @model_validator(mode="after")
    def _bounds_can_be_kept(self) -> Self:
        if self.max_instances is None:
            return self
        bound = f"`max_instances: {self.max_instances}`"
        if self.max_instances < self.min_instances:
            least = self.min_instances
            raise ValueError(f"{bound} is less than `min_instances`, which is {least}: write {least} or more")
        replicas = max((entry.replicas for entry in self.plan), default=1)
        needed = max(replicas, 1) * self.replica_instances
        if self.max_instances < needed:
            times = f" times {replicas} replicas" if replicas > 1 else ""
            raise ValueError(
                f"{bound} is less than {self.prefill} prefill and {self.decode} decode instances{times}: "
                f"write {needed} or more"
            )
        return self

    @model_validator(mode="after")
    def _plan_is_clear(self) -> Self:
        for one, other in combinations(self.plan, 2):
            if one.overlaps(other):
                raise ValueError(
                    f"`plan` has {one} and {other}, which overlap: end one where the next begins, or before"
                )
        if self.name == DEFAULT and any(entry.replicas == 0 for entry in self.plan):
            raise ValueError(
                "`plan` has an entry with `replicas: 0`, but this group serves what no other does: write 1 or more"
            )
        return self


class GroupsFile(_Line):
    """All groups, `default` among them, and how they are controlled."""

    groups: Annotated[tuple[GroupSpec, ...], Field(min_length=1)] = Field(
        description="a list of groups, each beginning with `- name:`"
    )
    control: Control = Field(default="auto", description="auto, advise or off")
    automatic_scenarios: Annotated[bool, Field(strict=True)] = Field(default=False, description="true or false")
    """Whether to find scenarios in traffic that names none."""

    @field_validator("groups")
    @classmethod
    def _each_is_one_of_a_kind(cls, groups: tuple[GroupSpec, ...]) -> tuple[GroupSpec, ...]:
        if name := _repeated(group.name for group in groups):
            raise ValueError(f"two groups have `name: {name}`: write another name for one of them")
        if scenario := _repeated(group.scenario for group in groups):
            first, second = (group.name for group in groups if group.scenario == scenario)
            raise ValueError(
                f"groups `{first}` and `{second}` both have `scenario: {scenario}`: "
                f"write one group for it, with more instances or with a plan"
            )
        for group in groups:
            if group.scenario == DEFAULT and group.name != DEFAULT:
                raise ValueError(
                    f"group `{group.name}` has `scenario: {DEFAULT}`, which is that of group `{DEFAULT}`: "
                    f"write another scenario"
                )
        has_default = any(group.name == DEFAULT for group in groups)
        return groups if has_default else (*groups, GroupSpec(name=DEFAULT))

    @field_validator("control", mode="before")
    @classmethod
    def _off_is_a_word(cls, given: object) -> object:
        """YAML takes a bare `off` for false."""
        return "off" if given is False else given


def default_groups(prefill: int = 1, decode: int = 1) -> GroupsFile:
    """One group `default` that serves everything, with so many instances to begin with."""
    return GroupsFile(groups=(GroupSpec(name=DEFAULT, prefill=prefill, decode=decode),))


def _repeated(names: Iterable[str]) -> str | None:
    """The first name that is there more than once."""
    return next((name for name, times in Counter(names).items() if times > 1), None)


def _minute(clock: str) -> int:
    """Minutes after midnight of `HH:MM`."""
    hours, minutes = clock.split(":")
    return int(hours) * 60 + int(minutes)
