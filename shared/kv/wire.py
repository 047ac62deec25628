"""The KV protocol on TCP, version 1: length-prefixed JSON frames around one run of raw bytes.

    fetcher                                  holder
      FetchRequest (lease, layout)     ->
                                       <-    KVHeader (length, checksum, or why not)
                                       <-    num_bytes raw bytes: the blocks asked for, one after another
      FetchDone (ok)                   ->    frees the KV

One connection carries any number of fetches, one after another. Every frame is a big-endian u32 length and JSON.
"""

import asyncio
import socket
import struct
from collections.abc import Sequence
from typing import Annotated, Literal, TypeVar

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.errors import TransferFailed
from shared.kv.layout import KVLayout

MAX_FRAME_BYTES = 1 << 20
CHUNK_BYTES = 4 << 20
"""How many bytes pass before the deadline of a stalled peer starts anew, and before other work gets its turn."""

AnyFrame = TypeVar("AnyFrame", bound=BaseModel)


class Frame(BaseModel):
    model_config = ConfigDict(frozen=True)

    v: Literal[1] = 1


class FetchRequest(Frame):
    """`layout` is the fetcher's: the holder refuses where it is not its own. The fetcher has the first `skip_blocks`
    blocks already; none may be left.
    """

    lease_id: str
    layout: KVLayout
    skip_blocks: Annotated[int, Field(ge=0)] = 0


class KVHeader(Frame):
    """What follows: `num_bytes` bytes, with that xxh3-64, of KV that has `num_tokens` tokens in all; or nothing, and
    the reason in `refused`.
    """

    refused: str | None = None
    num_tokens: int = 0
    num_bytes: int = 0
    checksum: str = ""


class FetchDone(Frame):
    """Whether the bytes arrived and matched the checksum."""

    ok: bool


def checksum(views: Sequence[memoryview]) -> str:
    """xxh3-64 in hex over the views, one after another."""
    digest = xxhash.xxh3_64()
    for view in views:
        digest.update(view)
    return digest.hexdigest()


async def send_frame(sock: socket.socket, frame: Frame, stall_timeout_s: float) -> None:
    data = frame.model_dump_json().encode()
    await _send(sock, memoryview(struct.pack(">I", len(data)) + data), stall_timeout_s)


def set_up(sock: socket.socket) -> None:
    """Makes a socket fit for this protocol: frames go out at once, and a host that vanished is noticed in the end."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


async def until_readable(sock: socket.socket) -> None:
    """Waits for the first byte of the next frame for as long as the peer is there, and leaves it where it is."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(sock, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(sock)


async def receive_frame(sock: socket.socket, kind: type[AnyFrame], timeout_s: float) -> AnyFrame:
    """The next frame.

    Raises:
        TransferFailed: the peer is gone, silent for `timeout_s`, or speaks something else.
    """
    head = bytearray(4)
    await _receive(sock, memoryview(head), timeout_s)
    [length] = struct.unpack(">I", head)
    if length > MAX_FRAME_BYTES:
        raise TransferFailed(f"a frame of {length} bytes is over the limit of {MAX_FRAME_BYTES}")
    data = bytearray(length)
    await _receive(sock, memoryview(data), timeout_s)
    try:
        return kind.model_validate_json(bytes(data))
    except ValidationError as error:
        raise TransferFailed(f"the peer sent no {kind.__name__}: {error.errors()[0]['msg']}") from error


async def send_views(sock: socket.socket, views: Sequence[memoryview], stall_timeout_s: float) -> None:
    """Sends the views' bytes as they lie in memory, without a copy of ours."""
    for chunk in _chunks(views):
        await _send(sock, chunk, stall_timeout_s)


async def receive_views(sock: socket.socket, views: Sequence[memoryview], stall_timeout_s: float) -> None:
    """Fills the views from the connection, in place."""
    for chunk in _chunks(views):
        await _receive(sock, chunk, stall_timeout_s)


def _chunks(views: Sequence[memoryview]) -> list[memoryview]:
    return [view[start : start + CHUNK_BYTES] for view in views for start in range(0, len(view), CHUNK_BYTES)]


async def _send(sock: socket.socket, data: memoryview, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await asyncio.get_running_loop().sock_sendall(sock, data)
    except TimeoutError as error:
        raise TransferFailed(f"the peer took nothing for {timeout_s} s") from error
    except OSError as error:
        raise TransferFailed(f"the connection broke: {error}") from error


async def _receive(sock: socket.socket, into: memoryview, timeout_s: float) -> None:
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout_s):
            while into:
                received = await loop.sock_recv_into(sock, into)
                if received == 0:
                    raise TransferFailed("the peer closed the connection")
                into = into[received:]
    except TimeoutError as error:
        raise TransferFailed(f"the peer was silent for {timeout_s} s") from error
    except OSError as error:
        raise TransferFailed(f"the connection broke: {error}") from error
