"""The prefill side of the hand-off: KV held under leases, and the TCP server that lets decode instances fetch it.

A lease has one owner (the request), one end, and is let go exactly once: when its KV was fetched and acknowledged, when
the request is cancelled, or when its time is over. Never while its bytes are on the wire: a fetch that has begun ends
first.
"""

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from shared.addresses import advertised
from shared.errors import SettingsInvalid, TransferFailed
from shared.kv import wire
from shared.kv.layout import KVLayout
from shared.kv.parcel import Parcel

SWEEP_S = 0.25
ACCEPT_AGAIN_S = 0.1

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Lease:
    """KV that waits: how to get at it, and what to call, with whether it was fetched, when it need wait no more.

    `export` gives its bytes but for those of so many first blocks. `expires_at` is in seconds of `time.monotonic()`.
    """

    lease_id: str
    num_tokens: int
    num_bytes: int
    export: Callable[[int], Parcel]
    expires_at: float
    let_go: Callable[[bool], None]
    on_wire: bool = False
    ended: bool = False


class KVHolder:
    """Holds leases and serves them. Others reach it at its `host` and `port`. Used from the event loop only."""

    def __init__(
        self, layout: KVLayout, host: str, port: int, stall_timeout_s: float, advertise_host: str | None = None
    ) -> None:
        self._layout = layout
        self._stall_timeout_s = stall_timeout_s
        self._leases: dict[str, Lease] = {}
        self._serving: set[asyncio.Task[None]] = set()
        self._server = _listen(host, port)
        self.host = advertise_host or advertised(host)
        self.port: int = self._server.getsockname()[1]

    def hold(self, lease: Lease) -> None:
        """Keeps a lease's KV until it is let go."""
        self._leases[lease.lease_id] = lease

    def release(self, lease_id: str, *, fetched: bool = False) -> None:
        """Ends a lease, if it has not ended. One that is on the wire is let go when its transfer is over."""
        lease = self._leases.pop(lease_id, None)
        if lease is None:
            return
        lease.ended = True
        if not lease.on_wire:
            lease.let_go(fetched)

    @property
    def num_leases(self) -> int:
        return len(self._leases)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator["KVHolder"]:
        """Serves fetches and ends leases whose time is over, until the block ends. A fault in this ends the block."""
        async with asyncio.TaskGroup() as tasks:
            working = [tasks.create_task(self._accept(tasks)), tasks.create_task(self._sweep())]
            try:
                yield self
            finally:
                self._server.close()
                for task in (*working, *self._serving):
                    task.cancel()

    async def _accept(self, tasks: asyncio.TaskGroup) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._server)
            except OSError as error:
                log.error("no connection for KV can be accepted: %s", error)
                await asyncio.sleep(ACCEPT_AGAIN_S)
                continue
            wire.set_up(connection)
            serving = tasks.create_task(self._serve(connection))
            self._serving.add(serving)
            serving.add_done_callback(self._serving.discard)

    async def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                while True:
                    await wire.until_readable(connection)
                    request = await wire.receive_frame(connection, wire.FetchRequest, self._stall_timeout_s)
                    await self._serve_fetch(connection, request)
            except TransferFailed as error:
                log.debug("a KV connection ended: %s", error)

    async def _serve_fetch(self, connection: socket.socket, request: wire.FetchRequest) -> None:
        lease = self._leases.get(request.lease_id)
        refused = self._refusal(lease, request)
        if lease is None or refused:
            await wire.send_frame(connection, wire.KVHeader(refused=refused), self._stall_timeout_s)
            return
        lease.on_wire = True
        done = False
        try:
            done = await self._send(connection, lease, request.skip_blocks)
        finally:
            lease.on_wire = False
            if lease.ended:
                lease.let_go(done)
        if done:
            self.release(lease.lease_id, fetched=True)

    def _refusal(self, lease: Lease | None, request: wire.FetchRequest) -> str | None:
        if lease is None:
            return "no such lease: it has ended, or its KV was fetched"
        if request.layout != self._layout:
            return "the KV layouts differ: both instances need the same model, dtype and block size"
        if lease.on_wire:
            return "another fetch of this lease is under way"
        if request.skip_blocks * self._layout.block_bytes > lease.num_bytes:
            return f"the lease has no {request.skip_blocks} blocks to skip"
        return None

    async def _send(self, connection: socket.socket, lease: Lease, skip_blocks: int) -> bool:
        """Header, bytes, acknowledgement; whether the fetcher has a verified copy."""
        parcel = lease.export(skip_blocks)
        await parcel.settle()
        views = parcel.views
        header = wire.KVHeader(
            num_tokens=lease.num_tokens,
            num_bytes=sum(map(len, views)),
            checksum=await asyncio.to_thread(wire.checksum, views),
        )
        await wire.send_frame(connection, header, self._stall_timeout_s)
        await wire.send_views(connection, views, self._stall_timeout_s)
        return (await wire.receive_frame(connection, wire.FetchDone, self._stall_timeout_s)).ok

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            now = time.monotonic()
            for lease in [one for one in self._leases.values() if one.expires_at <= now]:
                log.warning("lease %s ended: nobody fetched its KV in time", lease.lease_id)
                self.release(lease.lease_id)


def _listen(host: str, port: int) -> socket.socket:
    try:
        server = socket.create_server((host, port), backlog=128)
    except OSError as error:
        raise SettingsInvalid(
            f"{host}:{port} cannot be used for KV ({error.strerror}): set PDSERVE_KV_HOST and PDSERVE_KV_PORT"
        ) from error
    server.setblocking(False)
    return server
