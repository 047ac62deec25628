"""Messages of the controller, version 1: its orders, what operators wish of it, and what it says of the cluster."""

from typing import Literal

from pydantic import BaseModel, Field

from shared.messages.records import GatewayRecord, InstanceRecord, Role
from shared.messages.serving import Message

OrderRefusal = Literal["old_term", "old_epoch", "busy", "draining"]


class Assign(Message):
    """The leading controller's order to an instance (`assign`): be this role in this group, under this epoch.

    Without a role it becomes a spare. Answered at once by `Assigned`; how it goes on shows in the instance's record.
    `peers` are KV addresses that it connects to before it is ready.
    """

    term: int
    epoch: int
    role: Role | None
    group: str | None
    model: str | None = None
    """A folder or hub id to load first; None keeps the model that it has."""
    peers: list[tuple[str, int]] = Field(default_factory=list)
    drained: bool = False
    """Without a role: it stays so until an operator wishes something else."""
    patience_s: float | None = None
    """How long requests may take to end before they move; None is as the instance's settings say."""


class Assigned(Message):
    """An instance's answer to an order: it follows, or the reason why not."""

    accepted: bool
    reason: OrderRefusal | None = None


class Provision(Message):
    """The leading controller to whoever can start instances (`provision`): start so many spares, end these processes.

    Answered by `Provisioned`.
    """

    start: int = 0
    end: list[tuple[str, int]] = Field(default_factory=list)
    """Hosts and process ids of instances that were started on demand."""


class Provisioned(Message):
    """How many spares are being started, and how many more could be."""

    started: int
    room: int


class AdminRequest(Message):
    """An operator's wish to the leading controller (`admin.<verb>`): `flip` (instance, role, group), `drain`
    (instance), `control` (control), `upgrade` (model), `pause`, `resume`, `abort`.
    """

    key: str = ""
    instance: str | None = None
    role: Role | None = None
    group: str | None = None
    model: str | None = None
    control: Literal["auto", "advise", "off"] | None = None


class AdminAnswer(Message):
    """What became of the wish, in a sentence."""

    ok: bool
    message: str


class GroupStatus(Message):
    """A group as the controller sees it; instances by id. `late` ones are in its map, and their hearts do not beat."""

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
    """One decision of the controller, when (Unix seconds), and why. `outcome` is empty while it is under way."""

    at: float
    group: str
    what: str
    why: str
    outcome: str = ""


class InstanceStatus(InstanceRecord):
    """An instance's record and how long ago (seconds) its heartbeat last moved; `late` if that is too long."""

    heartbeat_age_s: float
    late: bool


class Status(Message):
    """The controller's answer on STATUS."""

    version: str
    controller: str
    """Who answers, with its process id; `leader` is who leads."""
    pid: int = 0
    leader: str | None = None
    control: str = "auto"
    groups: list[GroupStatus]
    instances: list[InstanceStatus]
    gateways: list[GatewayRecord]
    decisions: list[DecisionStatus] = Field(default_factory=list)
    upgrade: str | None = None
    """How far an upgrade is."""
