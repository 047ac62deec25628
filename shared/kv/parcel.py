"""KV on its way between a pool and a socket."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Parcel:
    """The bytes of KV, one block after another, for a socket to send or to fill.

    Where they are copies, `settle` makes them: before they are sent, or into the pool once they have come.

    Args:
        views: the bytes in order, writable.
        move: does the copying and returns when it is done; None where `views` are the KV itself.
    """

    views: Sequence[memoryview]
    move: Callable[[], None] | None = None

    async def settle(self) -> None:
        """Return once all bytes are where they belong. Cancelled, it waits for that, too: until then KV is in use."""
        if self.move is None:
            return
        moving = asyncio.ensure_future(asyncio.to_thread(self.move))
        try:
            await asyncio.shield(moving)
        except asyncio.CancelledError:
            await asyncio.wait([moving])
            raise
