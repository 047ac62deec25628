"""The line in which requests wait for a slot of one role of one group: first those whose stream has begun, then
interactive ones, then batch ones, each in the order of their deadlines.

Only the head of the line asks: one candidate after another, until one accepts. When all refuse it waits for a hint that
a slot may be free, or a moment, and asks again. So a full system hears a few questions at a time, however long the line
is. P/D-Serve (arXiv 2408.08147, 3.4) calls it on-demand forwarding. A request that no instance suits stands aside.

While instances have unlike weights, there is a head for each that requests are bound to, and one for those bound to
none: what refuses the one may be idle for the other.
"""

import asyncio
import logging
import random
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from services.gateway import policy
from services.gateway.turn import Rank, Turn
from shared.bus import subjects
from shared.bus.connection import Bus
from shared.errors import RETRY_AFTER_S, InstanceFailed, NoInstance, Overloaded, PDServeError, PeerUnavailable
from shared.messages.records import InstanceRecord, Role
from shared.messages.serving import AskReply, Cancel, DecodeRequest, PrefillRequest, RejectionReason
from shared.settings import GatewaySettings

ASK_AGAIN_S = 0.02
ASK_AGAIN_AT_MOST_S = 0.2
"""How long the head waits before it asks again; longer and longer while there is no hint."""
AVOID_S = 1.0
AVOID_AT_MOST_S = 60.0
"""How long an instance that gave no answer is not asked; longer and longer until it gives one."""

log = logging.getLogger(__name__)


@dataclass(slots=True, frozen=True)
class Wish:
    """What a request stands in line for.

    Attributes:
        request_for: the message for an instance.
        suits: whether an instance may be asked at all.
        holders: gets the id of each instance that may hold something of the request: from before it is asked, and for
            good if it accepts.
        until: when to give up waiting (Unix seconds).
        deadline: the whole request's (Unix seconds), which the instance is told.
        has_begun: its client has tokens already. It is served before newcomers, is never refused for the length of the
            line, and waits for an instance as long as it may.
        fingerprint: of the weights that it is bound to; None where any will do.
        is_batch: it is served after all that are not.
        matched: the share (0 .. 1) of its tokens that an instance has, by instance id.
        elsewhere: whether it can be served in another line, and not in this one.
    """

    request_for: Callable[[InstanceRecord], PrefillRequest | DecodeRequest]
    suits: Callable[[InstanceRecord], bool]
    holders: set[str]
    until: float
    deadline: float
    has_begun: bool
    fingerprint: str | None
    is_batch: bool = False
    matched: Mapping[str, float] = field(default_factory=dict)
    elsewhere: Callable[[], bool] = lambda: False

    @property
    def rank(self) -> Rank:
        """The earliest deadline first, of those that matter alike."""
        return (0 if self.has_begun else 2 if self.is_batch else 1, self.until)


class TooLate(PDServeError):
    """Every instance says that it cannot be in time, and waiting makes it no better."""


class NobodyHere(PDServeError):
    """All that could accept have left, and there are others elsewhere."""


@dataclass(slots=True, frozen=True)
class Accepted:
    """Who accepted, and how many refusals came before."""

    instance: InstanceRecord
    num_refusals: int


@dataclass(slots=True)
class _Asking:
    """How often a request was refused, and since when (monotonic seconds) no instance suits it, if that is so. One that
    has begun counts from when others have taken the place of its weights.
    """

    num_refusals: int = 0
    alone_since: float | None = None


class Line:
    """The line for one role's slots."""

    def __init__(
        self,
        bus: Bus,
        role: Role,
        ready: Callable[[Role], list[InstanceRecord]],
        num_open: Callable[[], Mapping[str, int]],
        settings: GatewaySettings,
    ) -> None:
        self._bus = bus
        self._role: Role = role
        self._ready = ready
        self._num_open = num_open
        self._settings = settings
        self._turns: defaultdict[str | None, Turn] = defaultdict(Turn)
        """By fingerprint; that of None is everybody's as long as all instances have the same weights."""
        self._hint = asyncio.Event()
        self._avoided: dict[str, tuple[float, float]] = {}
        """By id: until when (monotonic), and for how long in all."""
        self._tie = random.Random()
        self.num_waiting = 0

    def hint(self) -> None:
        """A slot may be free. Whoever began to ask before it hears of it."""
        self._hint.set()
        self._hint = asyncio.Event()

    async def ask(self, wish: Wish) -> Accepted:
        """Waits for a turn, then asks until an instance accepts.

        Raises:
            TimeoutError: none accepted in time.
            TooLate: none would be in time.
            NobodyHere: none is there, but elsewhere.
            NoInstance: for a while no instance that suits has been there at all.
            InstanceFailed: it has begun, and for a while there have been instances of other weights only.
            Overloaded: the line is too long already.
        """
        if self.num_waiting >= self._settings.max_waiting and not wish.has_begun:
            raise Overloaded(
                f"{self.num_waiting} requests wait for a {self._role} slot: try again later",
                retry_after_s=RETRY_AFTER_S,
            )
        self.num_waiting += 1
        asking = _Asking()
        try:
            async with asyncio.timeout(wish.until - time.time()):
                while True:
                    turn = self._turn_of(wish)
                    async with turn.of(wish.rank):
                        accepted = await self._ask_while_first(wish, asking, turn)
                    if accepted is not None:
                        return accepted
                    if asking.alone_since is not None:
                        await _is_set(self._hint, ASK_AGAIN_AT_MOST_S)
        finally:
            self.num_waiting -= 1

    def _turn_of(self, wish: Wish) -> Turn:
        """Where the request stands in line: with all, unless instances have other weights than those it is bound to."""
        is_with_all = all(one.fingerprint == wish.fingerprint for one in self._ready(self._role))
        return self._turns[None if is_with_all else wish.fingerprint]

    async def _ask_while_first(self, wish: Wish, asking: "_Asking", turn: Turn) -> Accepted | None:
        """Asks until an instance accepts. None when somebody has come who is to be served before, when another turn is
        the right one by now, or when no instance suits: one may suit those behind.
        """
        pause_s = ASK_AGAIN_S
        while self._turn_of(wish) is turn:
            hint = self._hint
            present = [one for one in self._ready(self._role) if wish.suits(one)]
            if not present:
                self._refuse_if_nobody_comes(wish, asking)
                return None
            asking.alone_since = None
            accepted = await self._ask_each(present, wish, asking)
            if accepted is not None:
                return accepted
            hinted = await _is_set(hint, pause_s)
            pause_s = ASK_AGAIN_S if hinted else min(2 * pause_s, ASK_AGAIN_AT_MOST_S)
            if turn.is_wanted_before(wish.rank):
                return None
        return None

    async def _ask_each(self, present: list[InstanceRecord], wish: Wish, asking: "_Asking") -> Accepted | None:
        reasons: list[RejectionReason | None] = []
        candidates = policy.order(filter(self._is_answering, present), self._num_open(), self._tie, wish.matched)
        for instance in candidates:
            answer = await self._ask(instance, wish)
            if answer is not None and answer.accepted:
                return Accepted(instance, asking.num_refusals)
            asking.num_refusals += 1
            reasons.append(answer.reason if answer is not None else None)
        if reasons and all(reason == "no_time" for reason in reasons):
            raise TooLate(f"all {len(reasons)} {self._role} instances would be too late")
        return None

    def _refuse_if_nobody_comes(self, wish: Wish, asking: "_Asking") -> None:
        if wish.elsewhere():
            raise NobodyHere(f"no {self._role} instance is left that can serve this request")
        now = time.monotonic()
        if asking.alone_since is None or self._may_come_back(wish):
            asking.alone_since = now
        if now - asking.alone_since <= self._settings.instance_wait_s:
            return
        if wish.has_begun:
            raise InstanceFailed("the weights that this request has begun with are served no more: send it again")
        raise NoInstance(
            f"no {self._role} instance is there that can serve this request: try again", retry_after_s=RETRY_AFTER_S
        )

    def _may_come_back(self, wish: Wish) -> bool:
        """Whether a request that has begun is to wait for an instance of its weights: others have not replaced them."""
        ready = {one.fingerprint for one in self._ready(self._role)}
        return wish.has_begun and (not ready or wish.fingerprint in ready)

    async def _ask(self, instance: InstanceRecord, wish: Wish) -> AskReply | None:
        """What the instance says. One that gave no answer in time may have accepted: it is told to cancel."""
        subject = subjects.instance(instance.id, self._role)
        request = wish.request_for(instance)
        timeout_s = self._settings.answer_timeout_s
        held_before = instance.id in wish.holders
        wish.holders.add(instance.id)
        try:
            answer = await self._bus.request(subject, request, AskReply, timeout_s=timeout_s, deadline=wish.deadline)
        except PeerUnavailable as error:
            log.warning("%s", error)
            self._avoid(instance.id)
            wish.holders.discard(instance.id)
            cancel = Cancel(request_ids=[request.request_id])
            await self._bus.publish(subjects.instance(instance.id, "cancel"), cancel)
            return None
        self._avoided.pop(instance.id, None)
        if not answer.accepted and not held_before:
            wish.holders.discard(instance.id)
        if answer.reason == "invalid":
            raise InstanceFailed(f"{instance.id} cannot read this request: do gateway and instances run one version?")
        return answer

    def _avoid(self, instance_id: str) -> None:
        _, before_s = self._avoided.get(instance_id, (0.0, AVOID_S / 2))
        for_s = min(2 * before_s, AVOID_AT_MOST_S)
        self._avoided[instance_id] = (time.monotonic() + for_s, for_s)

    def _is_answering(self, instance: InstanceRecord) -> bool:
        until, _ = self._avoided.get(instance.id, (0.0, 0.0))
        return until <= time.monotonic()


async def _is_set(hint: asyncio.Event, pause_s: float) -> bool:
    try:
        async with asyncio.timeout(pause_s):
            await hint.wait()
    except TimeoutError:
        return False
    return True
