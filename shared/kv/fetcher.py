"""The decode side of the hand-off: fetch a lease's KV into blocks of our own pool, over connections that are kept."""

import asyncio
import socket
from collections.abc import Sequence

from shared.errors import TransferFailed
from shared.kv import wire
from shared.kv.layout import KVLayout
from shared.messages.serving import KVLease

MAX_IDLE_PER_PEER = 8


class KVFetcher:
    """Fetches KV. Keeps idle connections by peer; a connection on which anything went wrong is closed."""

    def __init__(self, layout: KVLayout, stall_timeout_s: float) -> None:
        self._layout = layout
        self._stall_timeout_s = stall_timeout_s
        self._idle: dict[tuple[str, int], list[socket.socket]] = {}

    async def fetch(
        self, lease: KVLease, views: Sequence[memoryview], timeout_s: float, *, skip_blocks: int = 0
    ) -> None:
        """Fills `views` with the KV under `lease`, verifies its checksum and acknowledges it.

        Args:
            skip_blocks: how many of its first blocks are here already; where all are, it is only acknowledged.

        Raises:
            TransferFailed: refused, broken off, too late, or not what the header says; nothing in `views` may be used.
        """
        peer = (lease.host, lease.port)
        try:
            async with asyncio.timeout(timeout_s):
                connection = await self._connection(peer)
                try:
                    await self._fetch(connection, lease, views, skip_blocks)
                except BaseException:
                    connection.close()
                    raise
        except TimeoutError as error:
            raise TransferFailed(f"fetching from {lease.host}:{lease.port} took over {timeout_s} s") from error
        self._keep(peer, connection)

    def close(self) -> None:
        for connections in self._idle.values():
            for connection in connections:
                connection.close()
        self._idle.clear()

    async def _fetch(
        self, connection: socket.socket, lease: KVLease, views: Sequence[memoryview], skip_blocks: int
    ) -> None:
        request = wire.FetchRequest(lease_id=lease.lease_id, layout=self._layout, skip_blocks=skip_blocks)
        await wire.send_frame(connection, request, self._stall_timeout_s)
        header = await wire.receive_frame(connection, wire.KVHeader, self._stall_timeout_s)
        if header.refused is not None:
            raise TransferFailed(f"{lease.instance_id} refused: {header.refused}")
        expected = sum(len(view) for view in views)
        if header.num_bytes != expected or header.num_tokens != lease.num_tokens:
            raise TransferFailed(f"{lease.instance_id} sends {header.num_bytes} bytes where {expected} are due")
        await wire.receive_views(connection, views, self._stall_timeout_s)
        ok = await asyncio.to_thread(wire.checksum, views) == header.checksum
        await wire.send_frame(connection, wire.FetchDone(ok=ok), self._stall_timeout_s)
        if not ok:
            raise TransferFailed(f"the KV from {lease.instance_id} does not match its checksum")

    async def _connection(self, peer: tuple[str, int]) -> socket.socket:
        idle = self._idle.get(peer, [])
        while idle:
            connection = idle.pop()
            if _is_open(connection):
                return connection
            connection.close()
        return await _connect(peer, self._stall_timeout_s)

    def _keep(self, peer: tuple[str, int], connection: socket.socket) -> None:
        """Keeps a connection for the next fetch, and lets go of those whose peers have gone meanwhile."""
        self._idle.setdefault(peer, []).append(connection)
        for other, connections in list(self._idle.items()):
            kept = [one for one in connections if _is_open(one)][-MAX_IDLE_PER_PEER:]
            for one in connections:
                if one not in kept:
                    one.close()
            self._idle[other] = kept
            if not kept:
                del self._idle[other]


async def check_path(host: str, port: int, timeout_s: float) -> None:
    """Returns whether a holder answers there in our protocol, asked for a lease that nobody has.

    Raises:
        TransferFailed: nobody does.
    """
    nobody = KVLayout(dtype="float32", block_size=1, layers=())
    with await _connect((host, port), timeout_s) as connection:
        await wire.send_frame(connection, wire.FetchRequest(lease_id="", layout=nobody), timeout_s)
        await wire.receive_frame(connection, wire.KVHeader, timeout_s)


async def _connect(peer: tuple[str, int], timeout_s: float) -> socket.socket:
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout_s):
            [(family, kind, proto, _, address), *_] = await loop.getaddrinfo(*peer, type=socket.SOCK_STREAM)
            connection = socket.socket(family, kind, proto)
            try:
                wire.set_up(connection)
                await loop.sock_connect(connection, address)
            except BaseException:
                connection.close()
                raise
    except (OSError, TimeoutError) as error:
        raise TransferFailed(f"no connection to the KV of {peer[0]}:{peer[1]}: {error!r}") from error
    return connection


def _is_open(connection: socket.socket) -> bool:
    """Returns whether an idle connection is open: an idle peer sends nothing, so a readable one has been closed."""
    try:
        connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False
