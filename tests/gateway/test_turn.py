"""Whose turn it is, and what happens to those who stop waiting for theirs."""

import asyncio

import pytest

from services.gateway.turn import Rank, Turn
from tests.harness import eventually

BEGUN, INTERACTIVE, BATCH = 0, 1, 2


class Queue:
    """Tasks that want a turn; `had` names those that got it, in order."""

    def __init__(self) -> None:
        self.turn = Turn()
        self.had: list[str] = []
        self.num_inside = 0

    async def join(self, name: str, rank: Rank) -> asyncio.Task[None]:
        """Returns once the task waits."""
        before = len(self.turn._waiting)
        task = asyncio.create_task(self._have(name, rank))
        await eventually(lambda: len(self.turn._waiting) == before + 1)
        return task

    async def _have(self, name: str, rank: Rank) -> None:
        async with self.turn.of(rank):
            self.num_inside += 1
            assert self.num_inside == 1
            self.had.append(name)
            await asyncio.sleep(0)
            self.num_inside -= 1


async def test_it_goes_by_rank_then_by_deadline_then_by_arrival() -> None:
    queue = Queue()
    async with queue.turn.of((INTERACTIVE, 5.0)):
        tasks = [
            await queue.join(name, rank)
            for name, rank in [
                ("batch, early", (BATCH, 1.0)),
                ("late", (INTERACTIVE, 9.0)),
                ("begun, late", (BEGUN, 99.0)),
                ("early", (INTERACTIVE, 3.0)),
                ("early, second", (INTERACTIVE, 3.0)),
                ("batch, earlier", (BATCH, 0.5)),
                ("begun, early", (BEGUN, 2.0)),
            ]
        ]
    await asyncio.gather(*tasks)
    assert queue.had == [
        "begun, early",
        "begun, late",
        "early",
        "early, second",
        "late",
        "batch, earlier",
        "batch, early",
    ]


async def test_whoever_has_it_is_told_of_those_before_him_only() -> None:
    queue = Queue()
    async with queue.turn.of((INTERACTIVE, 5.0)):
        assert not queue.turn.is_wanted_before((INTERACTIVE, 5.0))
        tasks = [await queue.join("later", (INTERACTIVE, 6.0)), await queue.join("as early", (INTERACTIVE, 5.0))]
        tasks.append(await queue.join("batch", (BATCH, 0.0)))
        assert not queue.turn.is_wanted_before((INTERACTIVE, 5.0))
        assert queue.turn.is_wanted_before((BATCH, 0.0))
        tasks.append(await queue.join("earlier", (INTERACTIVE, 4.0)))
        assert queue.turn.is_wanted_before((INTERACTIVE, 5.0))
        assert not queue.turn.is_wanted_before((BEGUN, 9.0))
    await asyncio.gather(*tasks)


async def test_whoever_waits_no_more_is_neither_served_nor_made_way_for() -> None:
    queue = Queue()
    async with queue.turn.of((INTERACTIVE, 5.0)):
        gone = [await queue.join("gone", (BEGUN, 0.0)), await queue.join("gone, too", (INTERACTIVE, 7.0))]
        others = [await queue.join("first", (INTERACTIVE, 6.0)), await queue.join("second", (INTERACTIVE, 8.0))]
        assert queue.turn.is_wanted_before((INTERACTIVE, 5.0))
        for task in gone:
            task.cancel()
        await asyncio.wait(gone)
        assert not queue.turn.is_wanted_before((INTERACTIVE, 5.0))
    await asyncio.gather(*others)
    assert queue.had == ["first", "second"]


@pytest.mark.parametrize("others", [0, 1])
async def test_a_turn_that_comes_with_the_cancellation_goes_on_to_the_next(others: int) -> None:
    queue = Queue()
    async with queue.turn.of((INTERACTIVE, 5.0)):
        first = await queue.join("first", (INTERACTIVE, 1.0))
        behind = [await queue.join("behind", (INTERACTIVE, 2.0)) for _ in range(others)]
    first.cancel()  # it has the turn by now, and has not run since
    await asyncio.wait([first])
    assert first.cancelled()
    await asyncio.gather(*behind)
    async with asyncio.timeout(10.0), queue.turn.of((BATCH, 9.0)):
        assert queue.had == ["behind"] * others


async def test_whoever_fails_in_his_turn_passes_it_on() -> None:
    queue = Queue()

    async def fail() -> None:
        async with queue.turn.of((INTERACTIVE, 5.0)):
            await queue.join("next", (BATCH, 1.0))
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        await fail()
    await eventually(lambda: queue.had)
    assert queue.had == ["next"]
