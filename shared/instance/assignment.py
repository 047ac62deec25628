"""What an instance is: role, group and epoch; and its way from one assignment to the next, while it runs.

    order -> "changing": refuse -> end or move what is held -> (another model) -> reach the peers -> new role -> "ready"

A role that is left goes on for as long as KV of its requests waits to be fetched: the KV server and the pool are not
the role's.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from shared.errors import ModelRefused, TransferFailed
from shared.instance.role import Role
from shared.kv.fetcher import check_path
from shared.messages.control import Assign, Assigned
from shared.messages.records import InstanceState
from shared.messages.records import Role as RoleName
from shared.settings import InstanceSettings

DAY_S = 86_400.0

log = logging.getLogger(__name__)


class Assignment:
    """An instance's current role and group.

    Args:
        make_role: plays a role from now on, with the body that there is.
        change_body: gets another model (hub id or folder) into the process; nothing is held meanwhile. Raises
            ModelRefused, with the old one still there.
        announce: writes the instance's record at once.
    """

    def __init__(
        self,
        settings: InstanceSettings,
        tasks: asyncio.TaskGroup,
        make_role: Callable[[RoleName], Awaitable[Role]],
        change_body: Callable[[str], Awaitable[None]],
        announce: Callable[[], Awaitable[None]],
    ) -> None:
        self._settings = settings
        self._tasks = tasks
        self._make_role = make_role
        self._change_body = change_body
        self._announce = announce
        self._following: asyncio.Task[None] | None = None
        self._last: Assign | None = None
        """The order that is followed, or was last."""
        self.role: Role | None = None
        self.left: list[Role] = []
        """Roles of before, some of whose KV still waits to be fetched."""
        self.group: str | None = None
        self.epoch = 0
        self.term = 0
        self.state: InstanceState = "spare"
        self.problem: str | None = None

    @property
    def roles(self) -> list[Role]:
        """Every role that holds requests."""
        return [*self.left, *([self.role] if self.role else [])]

    @property
    def is_ending(self) -> bool:
        return self.state == "draining"

    def order(self, assign: Assign) -> Assigned:
        """Begins to follow an order, unless it is out of date or another one is being followed."""
        if self.is_ending:
            return Assigned(accepted=False, reason="draining")
        # Terms are Unix milliseconds: one of the far future would shut every real leader out.
        if assign.term < self.term or assign.term > 1000 * (time.time() + DAY_S):
            return Assigned(accepted=False, reason="old_term")
        self.term = assign.term
        if assign == self._last:
            return Assigned(accepted=True)  # its answer was lost
        if assign.epoch <= self.epoch:
            return Assigned(accepted=False, reason="old_epoch")
        if self.state == "changing":
            return Assigned(accepted=False, reason="busy")
        self.epoch = assign.epoch
        self._last = assign
        self.state = "changing"
        self.problem = None
        self._following = self._tasks.create_task(self._follow(assign))
        return Assigned(accepted=True)

    async def _follow(self, assign: Assign) -> None:
        log.info("epoch %d: to be %s in group %s", assign.epoch, assign.role or "a spare", assign.group)
        await self._announce()
        await self._leave(assign.patience_s)
        try:
            if assign.model is not None:
                await self._until_nothing_is_held()
                await self._change_body(assign.model)
            await self._reach(assign.peers)
        except (ModelRefused, TransferFailed) as error:
            log.error("the order cannot be followed: %s", error)
            self.problem = str(error)
        is_able = self.problem is None and not self.is_ending
        role = await self._make_role(assign.role) if is_able and assign.role else None
        if self.is_ending:
            if role is not None:
                role.close()
            return
        self.role = role
        self.group = assign.group if role else None
        self.state = "ready" if role else "drained" if assign.drained else "spare"
        await self._announce()

    async def _reach(self, peers: list[tuple[str, int]]) -> None:
        """Connects to the KV of each; one may just be lost. Raises TransferFailed if none is there."""
        failures = []
        for host, port in peers:
            try:
                await check_path(host, port, self._settings.stall_timeout_s)
            except TransferFailed as error:
                log.warning("%s", error)
                failures.append(error)
        if failures and len(failures) == len(peers):
            raise failures[0]

    async def _leave(self, patience_s: float | None) -> None:
        """Ends or moves what the engine works on. What waits to be fetched stays behind in `left`."""
        role, self.role = self.role, None
        if role is None:
            return
        self.left.append(role)
        if patience_s is None:
            patience_s = self._settings.move_after_s if role.can_move else self._settings.drain_timeout_s
        if not await _within(patience_s, role.until_computed()):
            await role.move_all()
            if not await _within(self._settings.stall_timeout_s, role.until_computed()):
                role.fail_computing("this instance changes its role")
                await role.until_computed()
        self._tasks.create_task(self._forget(role))

    async def _forget(self, role: Role) -> None:
        await role.until_idle()
        role.close()
        self.left.remove(role)

    async def _until_nothing_is_held(self) -> None:
        for role in list(self.left):
            if not await _within(self._settings.lease_s, role.until_idle()):
                role.fail_all("this instance loads another model", counts=False)
                await role.until_idle()

    async def drain(self) -> None:
        """The end: lets what is held end by itself for a while, moves it, and in the end gives it up."""
        self.state = "draining"
        await self._announce()
        settings = self._settings
        if await _within(settings.drain_timeout_s, self._until_idle()):
            return
        if not await _within(settings.stall_timeout_s, self._move_away()):
            await self.give_up("this instance is ending")

    async def give_up(self, why: str) -> None:
        """Fails what is held."""
        for role in self.roles:
            role.fail_all(why, counts=False)
        if not await _within(self._settings.stall_timeout_s, self._until_idle()):
            log.warning("%d requests are still held", sum(role.slots_used for role in self.roles))

    async def _move_away(self) -> None:
        for role in self.roles:
            await role.move_all()
        await self._until_idle()

    async def _until_idle(self) -> None:
        for role in self.roles:
            await role.until_idle()

    def close(self) -> None:
        """The end: an order that is still being followed leads nowhere."""
        if self._following is not None:
            self._following.cancel()
        for role in self.roles:
            role.close()

    def room_came_free(self) -> None:
        """A request was let go, by whichever role: the first to have its room are those that grow."""
        for role in self.roles:
            role.room_came_free()
        self.notify_gateways()

    def notify_gateways(self) -> None:
        """Tells a gateway that was rejected, if one of its requests would be accepted now."""
        if self.role is not None:
            self.role.notify_gateways()

    def knows(self, request_id: str) -> bool:
        """Whether a role holds something for a request."""
        return any(role.knows(request_id) for role in self.roles)

    def unchanged(self) -> dict[str, list[str]]:
        """Returns, for each gateway that has requests here, the ids of those that have not come forward for a while."""
        now = time.monotonic()
        found: dict[str, list[str]] = {}
        for role in self.roles:
            for gateway_id, request_ids in role.unchanged(now).items():
                found.setdefault(gateway_id, []).extend(request_ids)
        return found

    def release_gateway(self, gateway_id: str) -> None:
        """Releases everything that any role holds for a gateway that is dead."""
        for role in self.roles:
            role.release_gateway(gateway_id)

    def release_requests(self, request_ids: list[str]) -> None:
        """Releases requests that their gateways do not know any more."""
        for role in self.roles:
            role.release_requests(request_ids)


async def _within(timeout_s: float, done: Awaitable[None]) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            await done
    except TimeoutError:
        return False
    return True
