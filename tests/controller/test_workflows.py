"""What is done with one instance, step by step, with fake instances on a real bus and in a real registry."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from services.controller import workflows
from services.controller.policy.membership import Place
from shared.messages.control import Assign, Assigned, OrderRejection
from shared.messages.records import Role
from shared.messages.serving import AskReply
from tests.controller.fleet import Fleet, fleet
from tests.controller.world import member, serving
from tests.harness import eventually

PREFILL, DECODE = Place("chat", "prefill"), Place("chat", "decode")


async def test_a_spare_joins(nats_url: str, redis_url: str) -> None:
    """Order, way, canary, map."""
    async with fleet(nats_url, redis_url) as made:
        p1 = await made.add_member("p1", "prefill")
        s1 = await made.add_spare("s1")
        s1.stays_changing = True
        task, decision = made.begin("s1", DECODE, made.workflows.assign("s1", DECODE))
        await eventually(lambda: made.cluster.alive["s1"].state == "changing")
        assert made.workflows.coming == {"s1": DECODE}
        assert (decision.outcome, made.member("s1"), s1.canaries) == ("", None, [])
        assert made.lead is not None
        assert s1.orders == [
            Assign(term=made.lead.term, epoch=1, role="decode", group="chat", peers=[("kv-p1", p1.record.kv_port)])
        ]
        s1.arrive()
        await asyncio.wait([task])
        assert decision.outcome == "done"
        assert made.workflows.coming == {}
        assert made.member("s1") == member(s1.record)
        assert [one.instance_id for one in (await made.records.maps())[0].members] == ["p1", "s1"]


async def test_the_canary_is_a_request_through_the_newcomer_and_a_peer(nats_url: str, redis_url: str) -> None:
    async with fleet(nats_url, redis_url) as made:
        p1 = await made.add_member("p1", "prefill")
        s1 = await made.add_spare("s1")
        assert await made.assign("s1", DECODE) == "done"
        [first], [second] = p1.canaries, s1.canaries
        assert first.request_id == second.request_id
        assert first.lease is None
        assert second.lease is not None
        assert second.lease.num_tokens == second.num_tokens - 1
        assert (first.is_canary, second.is_canary) == (True, True)
        assert (first.epoch, second.epoch) == (1, 1)
        await eventually(lambda: first.request_id in p1.cancelled and first.request_id in s1.cancelled)


async def test_the_first_of_a_group_has_its_canary_alone(nats_url: str, redis_url: str) -> None:
    """And the first decode instance none, until a prefill instance comes."""
    async with fleet(nats_url, redis_url) as made:
        s1, s2 = await made.add_spare("s1"), await made.add_spare("s2")
        assert await made.assign("s1", DECODE) == "done"
        assert s1.canaries == []
        assert await made.assign("s2", PREFILL) == "done"
        assert (len(s1.canaries), len(s2.canaries)) == (1, 1)
        assert s2.orders[0].peers == []
        await made.maps.remove(["s1", "s2"])
        s3 = await made.add_spare("s3")
        assert await made.assign("s3", PREFILL) == "done"
        assert [one.max_tokens for one in s3.canaries] == [1]


@pytest.mark.parametrize("decode_fails", [False, True])
async def test_of_two_that_join_together_one_has_its_canary_with_the_other(
    nats_url: str, redis_url: str, decode_fails: bool
) -> None:
    async with fleet(nats_url, redis_url) as made:
        wanted: Role | None = "decode" if decode_fails else None
        s1, s2 = await made.add_spare("s1"), await made.add_spare("s2", fails_as=wanted)
        outcomes = await asyncio.gather(made.assign("s1", PREFILL), made.assign("s2", DECODE))
        assert s2.canaries != []
        assert len(s1.canaries) >= len(s2.canaries)
        assert outcomes.count("done") == (1 if decode_fails else 2)


async def test_a_second_peer_is_tried_the_least_busy_first(nats_url: str, redis_url: str) -> None:
    async with fleet(nats_url, redis_url) as made:
        busy = await made.add_member("p1", "prefill", slots_used=5)
        broken = await made.add_member("p2", "prefill", fails_as="prefill", slots_used=2)
        busiest = await made.add_member("p3", "prefill", slots_used=7)
        await made.add_spare("s1")
        assert await made.assign("s1", DECODE) == "done"
        assert [len(one.canaries) for one in (broken, busy, busiest)] == [1, 1, 0]


async def test_peers_of_other_weights_are_none(nats_url: str, redis_url: str) -> None:
    async with fleet(nats_url, redis_url) as made:
        other = await made.add(serving("p1", "prefill", fingerprint="other"))
        await made.maps.add("chat", other.record)
        s1 = await made.add_spare("s1")
        assert await made.assign("s1", DECODE) == "done"
        assert (other.canaries, s1.canaries) == ([], [])


async def test_a_canary_waits_for_room(nats_url: str, redis_url: str) -> None:
    """A group that lacks decode has prefill pools full of KV: just then a newcomer must not be sent away."""
    async with fleet(nats_url, redis_url) as made:
        p1 = await made.add_member("p1", "prefill", num_full=3)
        await made.add_spare("s1")
        assert await made.assign("s1", DECODE) == "done"
        assert len(p1.canaries) == 4


async def test_who_joins_gets_the_model_of_its_group(nats_url: str, redis_url: str) -> None:
    """Whoever sends it there."""
    async with fleet(nats_url, redis_url) as made:
        await made.maps.want_model("chat", "new")
        s1, s2 = await made.add_spare("s1"), await made.add_spare("s2")
        assert await made.assign("s1", PREFILL) == "done"
        assert await made.assign("s2", DECODE, model="newer") == "done"
        assert [one.orders[-1].model for one in (s1, s2)] == ["new", "newer"]


async def test_a_spare_whose_canary_fails_is_not_announced(nats_url: str, redis_url: str) -> None:
    async with fleet(nats_url, redis_url) as made:
        await made.add_member("p1", "prefill")
        await made.add_member("p2", "prefill")
        s1 = await made.add_spare("s1", fails_as="decode")
        assert await made.assign("s1", DECODE) == "failed: s1 fails the canary request: as the test wants it"
        assert made.member("s1") is None
        assert made.workflows.kept_out == {"s1"}
        assert len(s1.canaries) == 2
        s1.fails_as = None
        assert await made.run("s1", DECODE, made.workflows.admit("s1")) == "done"
        assert made.member("s1") is not None
        assert made.workflows.kept_out == set()


async def test_answers_that_differ_from_those_of_like_weights_are_a_failed_canary(
    nats_url: str, redis_url: str
) -> None:
    async with fleet(nats_url, redis_url) as made:
        await made.add_member("p1", "prefill")
        await made.add_spare("s1")
        await made.add_spare("s2", first_token=9)
        assert await made.assign("s1", DECODE) == "done"
        outcome = await made.assign("s2", PREFILL)
        assert outcome == (
            "failed: s2 and s1 answer the canary request with [9, 10, 11], "
            "and others with the same weights with [7, 8, 9]"
        )
        assert made.member("s2") is None


async def test_a_canary_that_nobody_answers_fails_in_time(nats_url: str, redis_url: str) -> None:
    async with fleet(nats_url, redis_url, canary_timeout_s=0.2) as made:
        p1 = await made.add_member("p1", "prefill")
        await made.add_spare("s1")

        p1.is_silent = True
        assert await made.assign("s1", DECODE) == ("failed: the canary request through p1 and s1 was not done in 0.2 s")


async def test_a_member_changes_its_role(nats_url: str, redis_url: str) -> None:
    """The map is announced without it before it hears of its order."""
    async with fleet(nats_url, redis_url) as made:
        await made.add_member("p1", "prefill")
        p2 = await made.add_member("p2", "prefill")
        was_member: list[bool] = []
        p2.before_order = lambda order: was_member.append(made.member("p2") is not None)
        assert await made.assign("p2", DECODE) == "done"
        assert was_member == [False]
        found = made.member("p2")
        assert found is not None
        assert (found.role, found.epoch) == ("decode", 2)


async def test_a_canary_that_fails_gives_the_old_role_back(nats_url: str, redis_url: str) -> None:
    async with fleet(nats_url, redis_url) as made:
        p1 = await made.add_member("p1", "prefill")
        p2 = await made.add_member("p2", "prefill", refuses_as="decode")
        assert await made.assign("p2", DECODE) == (
            "failed: p2 refuses the canary request: no_slot; it is prefill of chat again"
        )
        assert [(one.role, one.group, one.epoch) for one in p2.orders] == [
            ("decode", "chat", 2),
            ("prefill", "chat", 3),
        ]
        assert made.member("p2") == member(p2.record)
        assert (p2.record.role, p2.record.epoch) == ("prefill", 3)
        assert len(p1.canaries) == 1
        assert made.workflows.kept_out == set()


async def test_one_that_cannot_go_back_either_is_kept_out(nats_url: str, redis_url: str) -> None:
    async with fleet(nats_url, redis_url) as made:
        await made.add_member("d1", "decode")
        await made.add_member("p1", "prefill")
        p2 = await made.add_member("p2", "prefill", problems=["no KV there", "no KV here"])
        outcome = await made.assign("p2", DECODE)
        assert outcome == "failed: no KV there; and it could not be rolled back: no KV here"
        assert made.member("p2") is None
        assert made.workflows.kept_out == {"p2"}
        assert p2.record.state == "spare"


async def test_a_spare_that_cannot_follow_is_kept_out(nats_url: str, redis_url: str) -> None:
    async with fleet(nats_url, redis_url) as made:
        s1 = await made.add_spare("s1", problems=["no such model"])
        assert await made.assign("s1", DECODE, model="new") == "failed: no such model"
        assert (made.workflows.kept_out, s1.canaries, len(s1.orders)) == ({"s1"}, [], 1)


async def test_another_model_is_loaded_and_taken_back_where_it_does_not_serve(nats_url: str, redis_url: str) -> None:
    async with fleet(nats_url, redis_url) as made:
        p1 = await made.add(serving("p1", "prefill", model_path="old", fingerprint="old"))
        await made.maps.add("chat", p1.record)
        p2 = await made.add(serving("p2", "prefill", model_path="old", fingerprint="old"))
        await made.maps.add("chat", p2.record)
        assert await made.assign("p1", PREFILL, model="new", patience_s=60.0) == "done"
        [order] = p1.orders
        assert (order.model, order.patience_s, p1.record.model_path) == ("new", 60.0, "new")
        assert await made.assign("p1", PREFILL, model="new") == "done"
        assert p1.orders[-1].model is None
        p2.problems = ["it does not fit", None]
        outcome = await made.assign("p2", PREFILL, model="new")
        assert outcome == "failed: it does not fit; it is prefill of chat again"
        assert [one.model for one in p2.orders] == ["new", None]
        p2.fails_as = "prefill"
        outcome = await made.assign("p2", PREFILL, model="new")
        assert "could not be rolled back" in outcome
        assert [one.model for one in p2.orders[2:]] == ["new", "old"]
        assert made.member("p2") is None


async def test_one_that_dies_on_its_way_is_gone(nats_url: str, redis_url: str) -> None:
    async with fleet(nats_url, redis_url) as made:
        await made.add_member("p1", "prefill")
        await made.add_member("p2", "prefill", dies_changing=True)
        await made.add_spare("s1", dies_changing=True)
        outcomes = await asyncio.gather(made.assign("p2", DECODE), made.assign("s1", DECODE))
        assert outcomes == [
            "failed: p2 is gone; and it could not be rolled back: p2 is gone",
            "failed: s1 is gone",
        ]
        assert made.cluster.alive.keys() == {"p1"}
        assert [one.instance_id for one in made.cluster.maps["chat"].members] == ["p1"]


async def test_one_that_dies_in_its_canary_is_not_announced(nats_url: str, redis_url: str) -> None:
    async with fleet(nats_url, redis_url, canary_timeout_s=0.2) as made:
        await made.add_member("p1", "prefill")
        await made.add_spare("s1", dies_serving=True)
        outcome = await made.assign("s1", DECODE)
        assert outcome == "failed: the canary request through p1 and s1 was not done in 0.2 s"
        assert made.member("s1") is None


async def test_one_that_died_before_gets_no_order(nats_url: str, redis_url: str) -> None:
    async with fleet(nats_url, redis_url) as made:
        s1 = await made.add_spare("s1")
        s1.is_alive = False
        await eventually(lambda: not made.cluster.alive)
        assert await made.assign("s1", DECODE) == "failed: s1 is gone"
        assert s1.orders == []


REFUSALS: list[OrderRejection] = ["old_term", "old_epoch", "busy", "draining"]


@pytest.mark.parametrize("reason", REFUSALS)
async def test_a_refused_order_fails(nats_url: str, redis_url: str, reason: OrderRejection) -> None:
    """A spare stays one; a member is asked to be what it was."""
    async with fleet(nats_url, redis_url) as made:
        refusal = Assigned(accepted=False, reason=reason)
        await made.add_member("p1", "prefill")
        s1 = await made.add_spare("s1", answers=[refusal])
        p2 = await made.add_member("p2", "prefill", answers=[refusal])
        assert await made.assign("s1", DECODE) == f"failed: s1 does not take the order: {reason}"
        assert (s1.record.state, made.workflows.kept_out) == ("spare", {"s1"})
        outcome = await made.assign("p2", DECODE)
        assert outcome == f"failed: p2 does not take the order: {reason}; it is prefill of chat again"
        assert [one.role for one in p2.orders] == ["decode", "prefill"]
        assert made.member("p2") == member(p2.record)


async def test_an_order_that_nobody_answers_fails(
    nats_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workflows, "ANSWER_TIMEOUT_S", 0.1)
    async with fleet(nats_url, redis_url) as made:
        await made.add_spare("s1", answers=[None])
        outcome = await made.assign("s1", DECODE)
        assert outcome.startswith("failed: s1 does not answer: No answer came on pdserve.v1.instance.s1.assign")


async def test_an_answer_that_cannot_be_read_fails_the_workflow_alone(nats_url: str, redis_url: str) -> None:
    """As of another version: the controller lives."""
    async with fleet(nats_url, redis_url) as made:
        await made.add_spare("s1", answers=[AskReply(accepted=False, reason="no_slot")])
        assert (await made.assign("s1", DECODE)).startswith("failed: ")
        await made.add_spare("s2")
        assert await made.assign("s2", DECODE) == "done"


async def test_one_that_does_not_get_there_in_time(nats_url: str, redis_url: str) -> None:
    async with fleet(nats_url, redis_url, order_timeout_s=0.1, load_timeout_s=0.2) as made:
        s1, s2 = await made.add_spare("s1", stays_changing=True), await made.add_spare("s2", stays_changing=True)
        assert await made.assign("s1", DECODE) == "failed: s1 has not followed the order within 0.1 s"
        outcome = await made.assign("s2", DECODE, model="new", patience_s=0.3)
        assert outcome == "failed: s2 has not followed the order within 0.6 s"
        assert (s1.record.state, s2.record.state) == ("changing", "changing")
        assert made.cluster.maps["chat"].members == ()


async def test_a_release_makes_a_spare(nats_url: str, redis_url: str) -> None:
    async with fleet(nats_url, redis_url) as made:
        d1 = await made.add_member("d1", "decode")
        was_member: list[bool] = []
        d1.before_order = lambda order: was_member.append(made.member("d1") is not None)
        assert await made.run("d1", DECODE, made.workflows.release("d1", patience_s=9.0)) == "done"
        [order] = d1.orders
        assert (order.role, order.group, order.epoch, order.patience_s, order.peers) == (None, None, 2, 9.0, [])
        assert (d1.record.state, was_member, made.member("d1")) == ("spare", [False], None)
        assert made.workflows.kept_out == set()


async def test_a_release_that_is_refused_fails(nats_url: str, redis_url: str) -> None:
    async with fleet(nats_url, redis_url) as made:
        await made.add_member("d1", "decode", answers=[Assigned(accepted=False, reason="busy")])
        outcome = await made.run("d1", DECODE, made.workflows.release("d1"))
        assert outcome == "failed: d1 does not take the order: busy"


async def test_one_that_plays_its_role_already_is_admitted(nats_url: str, redis_url: str) -> None:
    async with fleet(nats_url, redis_url) as made:
        d1 = await made.add(serving("d1", "decode", epoch=5))
        p1 = await made.add(serving("p1", "prefill"))
        assert await made.run("d1", DECODE, made.workflows.admit("d1")) == "done"
        assert await made.run("p1", PREFILL, made.workflows.admit("p1")) == "done"
        assert (d1.orders, p1.orders) == ([], [])
        assert len(d1.canaries) == 1
        assert made.cluster.maps["chat"].members == (member(d1.record), member(p1.record))


Work = Callable[[Fleet], Awaitable[str]]
WORKS: dict[str, Work] = {
    "assign": lambda made: made.assign("d1", PREFILL),
    "release": lambda made: made.run("d1", DECODE, made.workflows.release("d1")),
    "admit": lambda made: made.run("d1", DECODE, made.workflows.admit("d1")),
}


@pytest.mark.parametrize("work", WORKS)
async def test_who_leads_no_more_gives_no_orders(nats_url: str, redis_url: str, work: str) -> None:
    async with fleet(nats_url, redis_url) as made:
        d1 = await made.add_member("d1", "decode")
        assert made.lead is not None
        await made.records.resign(made.lead)
        known = dict(made.cluster.maps)
        assert await WORKS[work](made) == "failed: this controller leads no more"
        assert (d1.orders, made.cluster.maps, await made.records.maps()) == ([], known, list(known.values()))
        assert made.workflows.kept_out == set()


async def test_a_lead_that_ends_in_the_middle_leaves_the_rest_to_the_next_leader(nats_url: str, redis_url: str) -> None:
    async with fleet(nats_url, redis_url) as made:
        await made.add_member("p1", "prefill")
        s1 = await made.add_spare("s1", stays_changing=True)
        task, decision = made.begin("s1", DECODE, made.workflows.assign("s1", DECODE))
        await eventually(lambda: s1.orders)
        made.lead = None
        s1.arrive()
        await asyncio.wait([task])
        assert decision.outcome == "failed: this controller leads no more"
        assert (made.member("s1"), made.workflows.kept_out, len(s1.orders)) == (None, set(), 1)


async def test_a_group_that_is_no_more_fails_the_workflow_alone(nats_url: str, redis_url: str) -> None:
    """The plan may have scaled it in while its first instance was on its way. The controller lives."""
    async with fleet(nats_url, redis_url) as made:
        s1 = await made.add_spare("s1", stays_changing=True)
        task, decision = made.begin("s1", DECODE, made.workflows.assign("s1", DECODE))
        await eventually(lambda: s1.orders)
        await made.maps.forget("chat")
        s1.arrive()
        await asyncio.wait([task])
        assert decision.outcome == "failed: group chat is no more"
        assert made.workflows.coming == {}
        assert made.workflows.kept_out == set()


async def test_what_is_abandoned_ends(nats_url: str, redis_url: str) -> None:
    async with fleet(nats_url, redis_url) as made:
        s1 = await made.add_spare("s1", stays_changing=True)
        task, decision = made.begin("s1", DECODE, made.workflows.assign("s1", DECODE))
        await eventually(lambda: s1.orders)
        made.workflows.abandon()
        await asyncio.wait([task])
        assert task.cancelled()
        assert made.workflows.coming == {}
        assert "this controller ends" in decision.outcome


async def test_many_at_once_change_the_same_map(nats_url: str, redis_url: str) -> None:
    async with fleet(nats_url, redis_url) as made:
        await made.add_member("d0", "decode")
        for number in range(4):
            await made.add_member(f"p{number}", "prefill")
        outcomes = await asyncio.gather(*(made.assign(f"p{number}", DECODE) for number in range(1, 4)))
        assert outcomes == ["done"] * 3
        [written] = await made.records.maps()
        assert {one.instance_id: (one.role, one.epoch) for one in written.members} == {
            "d0": ("decode", 1),
            "p0": ("prefill", 1),
            **{f"p{number}": ("decode", 2) for number in range(1, 4)},
        }
