"""Whose turn it is: a lock that goes to the lowest rank first, and within a rank to whoever came first."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from heapq import heappop, heappush
from itertools import count

Rank = tuple[int, float]


class Turn:
    """One at a time has it."""

    def __init__(self) -> None:
        self._taken = False
        self._waiting: list[tuple[Rank, int, asyncio.Future[None]]] = []
        self._numbers = count()

    def is_wanted_before(self, rank: Rank) -> bool:
        """Whether somebody of a lower rank waits."""
        self._drop_done()
        return bool(self._waiting) and self._waiting[0][0] < rank

    @asynccontextmanager
    async def of(self, rank: Rank) -> AsyncIterator[None]:
        """Waits for the turn, and has it while the block lasts."""
        await self._take(rank)
        try:
            yield
        finally:
            self._pass_on()

    async def _take(self, rank: Rank) -> None:
        if not self._taken:
            self._taken = True
            return
        given: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heappush(self._waiting, (rank, next(self._numbers), given))
        try:
            await given
        except asyncio.CancelledError:
            if given.done() and not given.cancelled():
                self._pass_on()  # the turn came together with the cancellation
            raise

    def _pass_on(self) -> None:
        self._drop_done()
        if self._waiting:
            _, _, given = heappop(self._waiting)
            given.set_result(None)
        else:
            self._taken = False

    def _drop_done(self) -> None:
        while self._waiting and self._waiting[0][2].done():
            heappop(self._waiting)
