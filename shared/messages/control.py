"""Messages of the controller, version 1: its orders, operators' requests to it, and its view of the cluster."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from shared.messages.records import GatewayRecord, InstanceRecord, Role
from shared.messages.serving import Message

OrderRejection = Literal["old_term", "old_epoch", "busy", "draining"]


class Assign(Message):
    """The leading controller's order to an instance (`assign`): take this role in this group, under this epoch.

    Without a role the instance becomes a spare. It answers at once with `Assigned`; its record shows the progress.
    `peers` are KV addresses that it connects to before it is ready.
    """

    term: int
    epoch: int
    role: Role | None
    group: str | None
    model: str | None = None
    """A folder or hub id to load first; None keeps the current model."""
    peers: list[tuple[str, int]] = Field(default_factory=list)
    drained: bool = False
    """Without a role: the instance stays drained until an operator gives it a role."""
    patience_s: float | None = None
    """How long requests may take to end before they move; None takes the instance's setting."""


class Assigned(Message):
    """An instance's answer to an order: accepted, or rejected with the reason."""

    accepted: bool
    reason: OrderRejection | None = None


class Provision(Message):
    """The leading controller to a process that can start instances (`provision`): start spares, end processes.

    Answered by `Provisioned`.
    """

    start: int = 0
    end: list[tuple[str, int]] = Field(default_factory=list)
    """Hosts and process ids of instances that were started on demand."""


class Provisioned(Message):
    """How many spares are being started, and how many more could be."""

    started: int
    capacity: int


class AdminRequest(Message):
    """An operator's request to the leading controller (`admin.<verb>`): `flip` (instance, role, group), `drain`
    (instance), `control` (control), `upgrade` (model), `pause`, `resume`, `abort`.
    """

    key: str = ""
    instance: str | None = None
    role: Role | None = None
    group: str | None = None
    model: str | None = None
    control: Literal["auto", "advise", "off"] | None = None


class AdminAnswer(Message):
    """The result of an operator's request, in a sentence."""

    ok: bool
    message: str


class GroupStatus(Message):
    """A group as the controller sees it; instances by id. Heartbeats of the `late` ones are late."""

    name: str
    scenario: str
    model: str | None
    prefill: list[str]
    decode: list[str]
    late: list[str]
    map_version: int = 0
    waiting: int = 0
    open: int = 0
    load: dict[str, float | None] = Field(default_factory=dict)
    """What the controller has measured over its last window, by the names of `GroupLoad`."""


class DecisionStatus(BaseModel):
    """One decision of the controller, its time (Unix seconds) and its reason. `outcome` is empty until it is done."""

    at: float
    group: str
    what: str
    why: str
    outcome: str = ""


class InstanceStatus(InstanceRecord):
    """An instance's record and the age of its last heartbeat in seconds; `late` if that is too old."""

    heartbeat_age_s: float
    late: bool


class StatusRequest(Message):
    """An operator asks the controller for one page of its status; pages count from 0."""

    page: Annotated[int, Field(ge=0, le=1_000_000)] = 0


class Status(Message):
    """The controller's answer on STATUS: one of `num_pages` pages, so that no answer is too large for NATS.

    A page has some of the instances and gateways, and of each group the members among its instances. The first page
    has the decisions. `merged_status` puts pages together.
    """

    page: int = 0
    num_pages: int = 1
    version: str
    controller: str
    """The controller that answers, with its process id; `leader` is the leading one."""
    pid: int = 0
    leader: str | None = None
    control: str = "auto"
    groups: list[GroupStatus]
    instances: list[InstanceStatus]
    gateways: list[GatewayRecord]
    decisions: list[DecisionStatus] = Field(default_factory=list)
    upgrade: str | None = None
    """The progress of an upgrade."""


def merged_status(pages: Sequence[Status]) -> Status:
    """Puts the pages of a status together. What changed places between two pages is taken from the first."""
    groups: dict[str, GroupStatus] = {}
    for group in (group for page in pages for group in page.groups):
        known = groups.get(group.name)
        if known is None:
            groups[group.name] = group
        else:
            lists = {key: _joined(getattr(known, key), getattr(group, key)) for key in ("prefill", "decode", "late")}
            groups[group.name] = known.model_copy(update=lists)
    instances = {one.id: one for page in reversed(pages) for one in page.instances}
    gateways = {one.id: one for page in reversed(pages) for one in page.gateways}
    return pages[0].model_copy(
        update={
            "num_pages": 1,
            "groups": [groups[name] for name in sorted(groups)],
            "instances": [instances[name] for name in _joined(*([one.id for one in page.instances] for page in pages))],
            "gateways": [gateways[name] for name in sorted(gateways)],
        }
    )


def _joined(*lists: list[str]) -> list[str]:
    return list(dict.fromkeys(name for one in lists for name in one))
