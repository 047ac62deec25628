"""The hand-off over real sockets: bytes arrive in place and verified, and every way in which it can fail ends it."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from shared.errors import TransferFailed
from shared.kv import wire
from shared.kv.fetcher import KVFetcher, check_path
from shared.kv.holder import KVHolder, Lease
from shared.kv.layout import KVLayout, LayerLayout
from shared.kv.parcel import Parcel
from shared.messages.serving import KVLease
from tests.harness import eventually

LAYOUT = KVLayout(dtype="float32", block_size=16, layers=(LayerLayout(num_kv_heads=2, key_dim=8, value_dim=8),) * 3)
OTHER = LAYOUT.model_copy(update={"block_size": 32})


def pieces(*sizes: int) -> list[memoryview]:
    """Views of one memory each, filled with bytes that differ."""
    return [memoryview(bytearray((bytes(range(251)) * (size // 251 + 1))[:size])) for size in sizes]


class Held:
    """A lease in a holder, and how it was let go."""

    def __init__(
        self, holder: KVHolder, views: list[memoryview], lifetime_s: float = 60.0, name: str = "lease"
    ) -> None:
        self.let_go: list[bool] = []
        self.views = views
        expires_at = time.monotonic() + lifetime_s
        self.lease = Lease(name, 40, sum(map(len, views)), self.export, expires_at, self.let_go.append)
        holder.hold(self.lease)
        self.ticket = KVLease(
            lease_id=name,
            instance_id="prefill-1",
            host=holder.host,
            port=holder.port,
            num_tokens=40,
            num_bytes=self.lease.num_bytes,
            expires_in_s=lifetime_s,
        )

    def export(self, skip_blocks: int) -> Parcel:
        if not skip_blocks:
            return Parcel(self.views)
        return Parcel([memoryview(b"".join(self.views))[skip_blocks * LAYOUT.block_bytes :]])


@asynccontextmanager
async def holder_and_fetcher(stall_timeout_s: float = 5.0) -> AsyncIterator[tuple[KVHolder, KVFetcher]]:
    holder = KVHolder(LAYOUT, "127.0.0.1", 0, stall_timeout_s)
    fetcher = KVFetcher(LAYOUT, stall_timeout_s)
    async with holder.serving():
        yield holder, fetcher
        fetcher.close()


async def test_bytes_arrive_in_place_whatever_the_pieces_on_either_side() -> None:
    async with holder_and_fetcher() as (holder, fetcher):
        held = Held(holder, pieces(9_000_000, 1, 700))
        into = pieces(100, 9_000_601)
        for view in into:
            view[:] = bytes(len(view))
        await fetcher.fetch(held.ticket, into, 10.0)
        assert b"".join(into) == b"".join(held.views)
        await eventually(lambda: held.let_go == [True])
        assert holder.num_leases == 0


async def test_a_connection_serves_one_fetch_after_another_and_several_at_once() -> None:
    async with holder_and_fetcher() as (holder, fetcher):
        for round_number in range(3):
            several = [Held(holder, pieces(50_000), name=f"{round_number}-{number}") for number in range(10)]
            targets = [pieces(50_000) for _ in several]
            await asyncio.gather(
                *(fetcher.fetch(one.ticket, into, 10.0) for one, into in zip(several, targets, strict=True))
            )
        await eventually(lambda: holder.num_leases == 0)


async def test_a_lease_that_ended_is_refused() -> None:
    async with holder_and_fetcher() as (holder, fetcher):
        held = Held(holder, pieces(1000))
        holder.release("lease")
        assert held.let_go == [False]
        with pytest.raises(TransferFailed, match="no such lease"):
            await fetcher.fetch(held.ticket, pieces(1000), 5.0)


async def test_a_lease_ends_by_itself() -> None:
    async with holder_and_fetcher() as (holder, _):
        held = Held(holder, pieces(1000), lifetime_s=0.01)
        await eventually(lambda: held.let_go == [False])
        assert holder.num_leases == 0


async def test_another_layout_is_refused_and_the_kv_kept() -> None:
    async with holder_and_fetcher() as (holder, fetcher):
        held = Held(holder, pieces(1000))
        stranger = KVFetcher(OTHER, 5.0)
        with pytest.raises(TransferFailed, match="layouts differ"):
            await stranger.fetch(held.ticket, pieces(1000), 5.0)
        await fetcher.fetch(held.ticket, pieces(1000), 5.0)
        await eventually(lambda: held.let_go == [True])


async def test_a_wrong_size_is_no_copy() -> None:
    async with holder_and_fetcher() as (holder, fetcher):
        held = Held(holder, pieces(1000))
        with pytest.raises(TransferFailed, match="1000 bytes where 900"):
            await fetcher.fetch(held.ticket, pieces(900), 5.0)
        assert held.let_go == []


async def test_blocks_that_are_here_are_not_sent() -> None:
    size = LAYOUT.block_bytes
    async with holder_and_fetcher() as (holder, fetcher):
        for skip_blocks in range(4):
            held = Held(holder, pieces(size + 5, 2 * size - 5))
            into = pieces(3 * size - skip_blocks * size) if skip_blocks < 3 else []
            for view in into:
                view[:] = bytes(len(view))
            await fetcher.fetch(held.ticket, into, 5.0, skip_blocks=skip_blocks)
            assert b"".join(into) == b"".join(held.views)[skip_blocks * size :]
            await eventually(lambda held=held: held.let_go == [True])  # type: ignore[misc]


async def test_more_blocks_than_there_are_cannot_be_skipped() -> None:
    async with holder_and_fetcher() as (holder, fetcher):
        held = Held(holder, pieces(2 * LAYOUT.block_bytes))
        with pytest.raises(TransferFailed, match="no 3 blocks"):
            await fetcher.fetch(held.ticket, [], 5.0, skip_blocks=3)
        assert held.let_go == []


async def test_bytes_that_change_on_the_way_are_noticed_and_the_kv_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    async with holder_and_fetcher() as (holder, fetcher):
        held = Held(holder, pieces(1000))
        monkeypatch.setattr(wire, "checksum", lambda views, right=wire.checksum: right(views) + str(id(views)))
        with pytest.raises(TransferFailed, match="checksum"):
            await fetcher.fetch(held.ticket, pieces(1000), 5.0)
        monkeypatch.undo()
        await eventually(lambda: not held.lease.on_wire)
        assert held.let_go == []
        await fetcher.fetch(held.ticket, pieces(1000), 5.0)


async def test_a_release_during_the_transfer_waits_for_its_end() -> None:
    """The blocks of a cancelled request are not reused while their bytes are on the wire."""
    async with holder_and_fetcher(stall_timeout_s=1.0) as (holder, _):
        held = Held(holder, pieces(64 << 20))
        connection = await connect(holder)
        await wire.send_frame(connection, wire.FetchRequest(lease_id="lease", layout=LAYOUT), 1.0)
        await wire.receive_frame(connection, wire.KVHeader, 5.0)
        holder.release("lease")
        assert held.let_go == []
        connection.close()
        await eventually(lambda: held.let_go == [False])


async def test_a_fetcher_that_stops_reading_does_not_keep_the_lease_on_the_wire() -> None:
    async with holder_and_fetcher(stall_timeout_s=0.5) as (holder, fetcher):
        held = Held(holder, pieces(64 << 20))
        connection = await connect(holder)
        await wire.send_frame(connection, wire.FetchRequest(lease_id="lease", layout=LAYOUT), 1.0)
        await eventually(lambda: held.lease.on_wire)
        await eventually(lambda: not held.lease.on_wire)
        assert held.let_go == []
        connection.close()
        await fetcher.fetch(held.ticket, pieces(64 << 20), 20.0)


async def test_a_holder_that_is_silent_or_gone_is_noticed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ticket = KVLease(
            lease_id="x",
            instance_id="p",
            host="127.0.0.1",
            port=silent.getsockname()[1],
            num_tokens=1,
            num_bytes=10,
            expires_in_s=0,
        )
        with pytest.raises(TransferFailed, match="silent for"):
            await KVFetcher(LAYOUT, 0.2).fetch(ticket, pieces(10), 5.0)
        with pytest.raises(TransferFailed, match="took over"):
            await KVFetcher(LAYOUT, 5.0).fetch(ticket, pieces(10), 0.1)
    with pytest.raises(TransferFailed, match="no connection"):
        await KVFetcher(LAYOUT, 0.2).fetch(ticket, pieces(10), 5.0)


async def test_a_holder_survives_strangers() -> None:
    async with holder_and_fetcher() as (holder, fetcher):
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"\x00\x00\x00\x02{}", b"\xff\xff\xff\xff", b"\x00\x00"):
            connection = await connect(holder)
            await asyncio.get_running_loop().sock_sendall(connection, words)
            connection.close()
        held = Held(holder, pieces(1000))
        await fetcher.fetch(held.ticket, pieces(1000), 5.0)


async def test_a_path_is_checked_without_a_lease() -> None:
    async with holder_and_fetcher() as (holder, fetcher):
        held = Held(holder, pieces(1000))
        await check_path(holder.host, holder.port, 5.0)
        assert held.let_go == []
        await fetcher.fetch(held.ticket, pieces(1000), 5.0)
        await eventually(lambda: held.let_go == [True])


async def test_a_path_to_nobody_or_to_a_stranger_is_none() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(TransferFailed, match="silent for"):
            await check_path("127.0.0.1", port, 0.2)
    with pytest.raises(TransferFailed, match=f"no connection to the KV of 127.0.0.1:{port}"):
        await check_path("127.0.0.1", port, 5.0)
    for words, said in (
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "over the limit"),
        (b"\x00\x00\x00\x02[]", "no KVHeader"),
    ):
        async with stranger(words) as port:
            with pytest.raises(TransferFailed, match=said):
                await check_path("127.0.0.1", port, 5.0)
    async with stranger(b"") as port:
        with pytest.raises(TransferFailed, match=r"closed the connection|broke"):
            await check_path("127.0.0.1", port, 5.0)


@asynccontextmanager
async def stranger(words: bytes) -> AsyncIterator[int]:
    """A server that answers with these words, and hangs up."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1 << 16)
        writer.write(words)
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


async def connect(holder: KVHolder) -> socket.socket:
    connection = socket.socket()
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, (holder.host, holder.port))
    return connection
