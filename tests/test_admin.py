"""What an operator's command does while controllers change."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from pdserve import admin
from pdserve.admin import ask_admin
from shared import __version__
from shared.bus import connection, subjects
from shared.bus.connection import Incoming
from shared.errors import BusUnavailable
from shared.messages.control import AdminAnswer, AdminRequest, Status

REQUEST = AdminRequest(control="off")


@asynccontextmanager
async def controllers(nats_url: str, *leaders: str | None, answer: AdminAnswer | None = None) -> AsyncIterator[None]:
    """They say so of who leads, one after another, the last for good; nobody answers wishes without an `answer`."""
    left = list(leaders)

    async def status(incoming: Incoming) -> None:
        leader = left.pop(0) if len(left) > 1 else left[0]
        fields = {"version": __version__, "controller": "c", "groups": [], "instances": [], "gateways": []}
        await incoming.respond(Status.model_validate({**fields, "leader": leader}))

    async def wish(incoming: Incoming) -> None:
        if answer is not None:
            await incoming.respond(answer)

    async with connection.connect(nats_url, name="c", timeout_s=5.0) as bus:
        await bus.subscribe(subjects.STATUS, status)
        await bus.subscribe(subjects.admin("*"), wish)
        yield


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(admin, "LOOK_AGAIN_S", 0.02)


async def test_the_leader_answers(nats_url: str) -> None:
    granted = AdminAnswer(ok=True, message="it is off")
    async with controllers(nats_url, "one", answer=granted):
        assert await ask_admin(nats_url, "control", REQUEST) == granted


async def test_a_leader_that_is_gone_with_the_wish_is_no_reason_to_wait_for_ever(nats_url: str) -> None:
    async with controllers(nats_url, "one", "one", None, "two"):
        with pytest.raises(
            BusUnavailable, match="another controller leads by now: see `pdserve status`, and ask again"
        ):
            await ask_admin(nats_url, "control", REQUEST)


async def test_where_nobody_comes_to_lead_it_says_so(nats_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "TAKEOVER_S", 0.1)
    async with controllers(nats_url, None):
        with pytest.raises(BusUnavailable, match="no controller leads"):
            await ask_admin(nats_url, "control", REQUEST)
