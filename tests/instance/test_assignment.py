"""From one assignment to the next: what an instance does with orders, over roles that end when they are told to."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from shared.errors import ModelRefused
from shared.instance.assignment import DAY_S, Assignment
from shared.kv.holder import KVHolder
from shared.kv.layout import KVLayout
from shared.messages.control import Assign, Assigned
from shared.messages.records import Role as RoleName
from shared.settings import InstanceSettings
from tests.harness import eventually, free_port

AT_ONCE_S = 1e-6
FOREVER_S = 1000.0
TEST_S = 20.0
"""A test that hangs ends then."""


class Role:
    """Plays nothing, and holds a request if it is told to: one that is computed, then waits to be fetched."""

    def __init__(self, verb: RoleName) -> None:
        self.verb = verb
        self.can_move = verb == "decode"
        self.slots_used = 0
        self.moves = True
        self.did: list[str] = []
        self._computed = asyncio.Event()
        self._idle = asyncio.Event()
        self.compute()
        self.let_go()

    def hold(self) -> None:
        self.slots_used = 1
        self._computed.clear()
        self._idle.clear()

    def compute(self) -> None:
        self._computed.set()

    def let_go(self) -> None:
        self.slots_used = 0
        self._computed.set()
        self._idle.set()

    async def until_computed(self) -> None:
        await self._computed.wait()

    async def until_idle(self) -> None:
        await self._idle.wait()

    async def move_all(self) -> None:
        self.did.append("moved")
        if self.can_move and self.moves:
            self.compute()

    def fail_computing(self, why: str) -> None:
        self.did.append("failed what it computed")
        if not self._computed.is_set():
            self.let_go()

    def fail_all(self, why: str, *, counts: bool) -> None:
        self.did.append(f"failed all, {counts=}")
        self.let_go()

    def close(self) -> None:
        self.did.append("closed")

    def room_came_free(self) -> None:
        self.did.append("has room")

    def notify_gateways(self) -> None:
        self.did.append("told gateways")


class Post:
    """An assignment, and what it asks of the process around it."""

    def __init__(self, tasks: asyncio.TaskGroup, **wishes: object) -> None:
        patient = {"move_after_s": FOREVER_S, "drain_timeout_s": FOREVER_S, "stall_timeout_s": FOREVER_S}
        settings = InstanceSettings.model_validate({**patient, "lease_s": FOREVER_S, **wishes})
        self.made: list[Role] = []
        self.may_make = asyncio.Event()
        self.may_make.set()
        self.makes = False
        self.announced: list[str] = []
        self.models: list[str] = []
        self.model_refused: str | None = None
        self.assignment = Assignment(settings, tasks, self._make_role, self._change_body, self._announce)  # type: ignore[arg-type]

    async def _make_role(self, name: RoleName) -> Role:
        self.makes = True
        await self.may_make.wait()
        self.made.append(Role(name))
        return self.made[-1]

    async def _change_body(self, model_path: str) -> None:
        assert not any(role.slots_used for role in self.made), "nothing is held meanwhile"
        await asyncio.sleep(0)
        if self.model_refused is not None:
            raise ModelRefused(self.model_refused)
        self.models.append(model_path)

    async def _announce(self) -> None:
        self.announced.append(self.assignment.state)
        await asyncio.sleep(0)

    def order(self, epoch: int, role: RoleName | None, *, term: int = 1, **wishes: Any) -> Assigned:
        group = "one" if role else None
        return self.assignment.order(Assign(term=term, epoch=epoch, role=role, group=group, **wishes))

    async def becomes(self, role: RoleName, **wishes: Any) -> Role:
        """Follows an order to its end."""
        assert self.order(self.assignment.epoch + 1, role, **wishes).accepted
        await eventually(lambda: self.assignment.state == "ready")
        return self.made[-1]


@asynccontextmanager
async def post(**wishes: object) -> AsyncIterator[Post]:
    async with asyncio.timeout(TEST_S), asyncio.TaskGroup() as tasks:
        made = Post(tasks, **wishes)
        yield made
        for role in made.made:
            role.let_go()
        made.assignment.close()


async def turns() -> None:
    """Other tasks go as far as they can, and timers of `AT_ONCE_S` ring."""
    for _ in range(100):
        await asyncio.sleep(0)


async def test_an_order_is_followed_and_announced() -> None:
    async with post() as one:
        assert (one.assignment.state, one.assignment.role) == ("spare", None)
        assert one.order(1, "prefill") == Assigned(accepted=True)
        assert one.assignment.state == "changing"
        await eventually(lambda: one.assignment.state == "ready")
        assert (one.assignment.role, one.assignment.group, one.assignment.epoch) == (one.made[0], "one", 1)
        await eventually(lambda: one.announced == ["changing", "ready"])


async def test_old_terms_and_epochs_are_refused_and_the_same_epoch_is_accepted_again() -> None:
    async with post() as one:
        await one.becomes("prefill", term=3)
        assert one.order(2, "decode", term=2) == Assigned(accepted=False, reason="old_term")
        assert one.order(0, "decode", term=3) == Assigned(accepted=False, reason="old_epoch")
        assert one.order(1, "prefill", term=3) == Assigned(accepted=True)
        assert one.order(1, "decode", term=3) == Assigned(accepted=False, reason="old_epoch"), "another order"
        assert (one.assignment.state, one.assignment.role) == ("ready", one.made[0])
        assert one.order(2, "decode", term=3).accepted
        await eventually(lambda: one.assignment.state == "ready")
        assert [role.verb for role in one.made] == ["prefill", "decode"], "the same order is followed once"


async def test_who_has_heard_of_a_newer_leader_no_more_obeys_the_older_one() -> None:
    """Whatever became of the newer leader's order."""
    async with post() as one:
        role = await one.becomes("prefill", term=3)
        role.hold()
        assert one.order(2, "decode", term=3).accepted
        assert one.order(3, None, term=4) == Assigned(accepted=False, reason="busy")
        role.let_go()
        await eventually(lambda: one.assignment.state == "ready")
        assert one.order(3, None, term=3) == Assigned(accepted=False, reason="old_term")
        assert one.assignment.term == 4


async def test_a_term_of_the_far_future_is_none() -> None:
    """It would shut out every leader to come."""
    async with post() as one:
        far = int(1000 * (time.time() + 2 * DAY_S))
        assert one.order(1, "prefill", term=far) == Assigned(accepted=False, reason="old_term")
        await one.becomes("prefill", term=int(1000 * time.time()))


async def test_one_order_at_a_time() -> None:
    async with post() as one:
        role = await one.becomes("prefill")
        role.hold()
        assert one.order(2, "decode").accepted
        await turns()
        assert one.order(3, "prefill") == Assigned(accepted=False, reason="busy")
        assert one.order(2, "decode") == Assigned(accepted=True)
        role.let_go()
        await eventually(lambda: one.assignment.state == "ready")
        assert one.order(3, "prefill").accepted


async def test_without_a_role_it_is_a_spare() -> None:
    async with post() as one:
        role = await one.becomes("decode")
        assert one.order(2, None).accepted
        await eventually(lambda: one.assignment.state == "spare")
        assert (one.assignment.role, one.assignment.group, one.assignment.problem) == (None, None, None)
        await eventually(lambda: one.assignment.left == [] and role.did == ["closed"])
        await eventually(lambda: one.announced[-1] == "spare")


async def test_what_waits_to_be_fetched_stays_behind() -> None:
    async with post() as one:
        old = await one.becomes("prefill")
        old.hold()
        assert one.order(2, "decode").accepted
        await turns()
        assert (one.assignment.state, one.assignment.role, one.assignment.roles) == ("changing", None, [old])
        old.compute()
        await eventually(lambda: one.assignment.state == "ready")
        new = one.made[-1]
        assert (one.assignment.role, one.assignment.left, one.assignment.roles) == (new, [old], [old, new])
        assert old.did == []
        old.let_go()
        await eventually(lambda: one.assignment.left == [])
        assert old.did == ["closed"]


@pytest.mark.parametrize(
    ("role", "patience_s", "settings", "did"),
    [
        ("decode", FOREVER_S, {"move_after_s": AT_ONCE_S, "drain_timeout_s": AT_ONCE_S}, []),
        ("decode", 0.0, {}, ["moved"]),
        ("decode", None, {"move_after_s": AT_ONCE_S}, ["moved"]),
        ("decode", None, {"drain_timeout_s": AT_ONCE_S}, []),
        ("prefill", None, {"drain_timeout_s": AT_ONCE_S}, ["moved"]),
        ("prefill", None, {"move_after_s": AT_ONCE_S}, []),
        ("prefill", 0.0, {}, ["moved"]),
    ],
)
async def test_patience(role: RoleName, patience_s: float | None, settings: dict[str, object], did: list[str]) -> None:
    """Requests end by themselves for as long as the order says, or else the settings; then they move."""
    async with post(**settings) as one:
        old = await one.becomes(role)
        old.hold()
        assert one.order(2, "prefill", patience_s=patience_s).accepted
        await turns()
        assert old.did == did
        old.let_go()
        await eventually(lambda: one.assignment.state == "ready")


async def test_what_neither_ends_nor_moves_is_given_up() -> None:
    async with post(stall_timeout_s=AT_ONCE_S) as one:
        old = await one.becomes("decode")
        old.hold()
        old.moves = False
        await one.becomes("prefill", patience_s=0.0)
        await eventually(lambda: old.did == ["moved", "failed what it computed", "closed"])


async def test_another_model_comes_when_nothing_is_held() -> None:
    async with post() as one:
        old = await one.becomes("decode")
        old.hold()
        assert one.order(2, "decode", model="other", patience_s=0.0).accepted
        await turns()
        assert (old.did, one.assignment.left, one.models) == (["moved"], [old], []), "its KV waits to be fetched"
        old.let_go()
        await eventually(lambda: one.assignment.state == "ready")
        assert one.models == ["other"]


async def test_who_loads_another_model_gives_up_what_nobody_fetches() -> None:
    async with post(lease_s=AT_ONCE_S) as one:
        old = await one.becomes("decode")
        old.hold()
        await one.becomes("decode", model="other", patience_s=0.0)
        assert one.models == ["other"]
        assert old.did[:2] == ["moved", "failed all, counts=False"]


async def test_a_model_that_is_refused_leaves_a_spare_that_says_why() -> None:
    async with post() as one:
        await one.becomes("decode")
        one.model_refused = "no such folder"
        assert one.order(2, "decode", model="other").accepted
        await eventually(lambda: one.assignment.state == "spare")
        assert (one.assignment.role, one.assignment.group) == (None, None)
        assert (one.assignment.problem, one.assignment.epoch) == ("no such folder", 2)
        await one.becomes("decode")
        assert one.assignment.problem is None


async def test_peers_of_which_none_can_be_reached_leave_a_spare_that_says_why() -> None:
    nobody = ("127.0.0.1", free_port())
    holder = KVHolder(KVLayout(dtype="float32", block_size=16, layers=()), "127.0.0.1", 0, 5.0)
    async with holder.serving(), post(stall_timeout_s=5.0) as one:
        there = (holder.host, holder.port)
        await one.becomes("decode", peers=[nobody, there])
        assert one.order(2, "decode", peers=[nobody]).accepted
        await eventually(lambda: one.assignment.state == "spare")
        assert one.assignment.problem is not None
        assert f"127.0.0.1:{nobody[1]}" in one.assignment.problem
        await one.becomes("decode", peers=[there])


async def test_who_is_ending_takes_no_order() -> None:
    async with post() as one:
        role = await one.becomes("decode")
        await one.assignment.drain()
        assert one.order(2, "prefill") == Assigned(accepted=False, reason="draining")
        assert (one.assignment.state, role.did) == ("draining", [])
        assert one.announced[-1] == "draining"


async def test_the_end_waits_then_moves_then_gives_up() -> None:
    async with post(drain_timeout_s=AT_ONCE_S, stall_timeout_s=AT_ONCE_S) as one:
        left = await one.becomes("decode")
        left.hold()
        left.compute()
        role = await one.becomes("decode")
        role.hold()
        await one.assignment.drain()
        assert role.did == ["moved", "failed all, counts=False"]
        await eventually(lambda: left.did == ["moved", "failed all, counts=False", "closed"])


async def test_at_the_end_what_moved_may_be_fetched() -> None:
    async with post(drain_timeout_s=AT_ONCE_S) as one:
        role = await one.becomes("decode")
        role.hold()
        draining = asyncio.create_task(one.assignment.drain())
        await eventually(lambda: role.did == ["moved"])
        await turns()
        assert not draining.done()
        role.let_go()
        await draining
        assert role.did == ["moved"]


async def test_who_ends_in_the_middle_of_a_change_stays_what_it_is() -> None:
    """It would take requests again otherwise."""
    async with post() as one:
        one.may_make.clear()
        assert one.order(1, "decode").accepted
        await eventually(lambda: one.makes)
        await one.assignment.drain()
        one.may_make.set()
        await eventually(lambda: bool(one.made))
        await turns()
        assert (one.assignment.state, one.assignment.role) == ("draining", None)
        assert one.made[0].did == ["closed"]


async def test_an_order_that_is_followed_for_ever_does_not_keep_the_process() -> None:
    async with post() as one:
        role = await one.becomes("prefill")
        one.may_make.clear()
        one.makes = False
        role.hold()
        assert one.order(2, "decode").accepted
        await turns()
        role.compute()
        await eventually(lambda: one.makes)
        one.assignment.close()
        assert role.did == ["closed"]
    assert one.made == [role]


async def test_the_end_waits_for_what_roles_before_have_left_behind() -> None:
    async with post() as one:
        left = await one.becomes("prefill")
        left.hold()
        left.compute()
        await one.becomes("decode")
        draining = asyncio.create_task(one.assignment.drain())
        await turns()
        assert not draining.done()
        left.let_go()
        await draining


async def test_room_is_for_whoever_grows_and_told_by_the_role_of_now() -> None:
    async with post() as one:
        old = await one.becomes("decode")
        one.assignment.room_came_free()
        assert old.did == ["has room", "told gateways"]
        old.hold()
        old.compute()
        new = await one.becomes("prefill")
        one.assignment.room_came_free()
        assert old.did == ["has room", "told gateways", "has room"]
        assert new.did == ["has room", "told gateways"]
