"""KV through host memory, as from a GPU, and as it is on a CPU: the same bytes."""

import asyncio
import threading

import pytest
import torch

from shared.engine.pool import KVPool
from shared.engine.staging import InPlace, Staged, Staging, staging_of
from shared.kv.layout import KVLayout, LayerLayout
from shared.kv.parcel import Parcel

LAYOUT = KVLayout(
    dtype="bfloat16",
    block_size=4,
    layers=(
        LayerLayout(num_kv_heads=2, key_dim=8, value_dim=6),
        LayerLayout(num_kv_heads=1, key_dim=4, value_dim=4),
    ),
)
BLOCKS = [5, 6, 2, 0, 1]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def pool_of(fill: float, device: str = "cpu") -> KVPool:
    pool = KVPool(LAYOUT, 8, device)
    pool.data.fill_(fill)
    return pool


def random_pool(device: str) -> KVPool:
    pool = KVPool(LAYOUT, 8, device)
    pool.data.copy_(torch.randn(pool.data.shape))
    return pool


@pytest.mark.parametrize("device", DEVICES)
async def test_what_is_exported_is_received(device: str) -> None:
    here, there = random_pool(device), pool_of(0.0, device)
    num_bytes = len(BLOCKS) * LAYOUT.block_bytes
    sent = Staged(here).export(BLOCKS, num_bytes)
    await sent.settle()
    received = Staged(there).receive([7, 3, 2, 4, 0], num_bytes)
    copy(sent, received)
    assert there.data.abs().max() == 0, "not before it settles"
    await received.settle()
    assert torch.equal(there.data[[7, 3, 2, 4, 0]], here.data[BLOCKS])
    assert there.data[[1, 5, 6]].abs().max() == 0


async def test_both_ways_are_the_same_bytes() -> None:
    pool = random_pool("cpu")
    num_bytes = 3 * LAYOUT.block_bytes + 10
    staged, in_place = Staged(pool).export(BLOCKS, num_bytes), InPlace(pool).export(BLOCKS, num_bytes)
    await staged.settle()
    await in_place.settle()
    assert sum(map(len, staged.views)) == num_bytes
    assert b"".join(staged.views) == b"".join(in_place.views)


@pytest.mark.parametrize("kind", [InPlace, Staged])
async def test_between_kinds(kind: type[Staging]) -> None:
    """A GPU may hand over to a CPU, and the other way round."""
    here, there = random_pool("cpu"), pool_of(0.0)
    other = InPlace if kind is Staged else Staged
    num_bytes = len(BLOCKS) * LAYOUT.block_bytes
    sent, received = kind(here).export(BLOCKS, num_bytes), other(there).receive(BLOCKS, num_bytes)
    await sent.settle()
    copy(sent, received)
    await received.settle()
    assert torch.equal(there.data[BLOCKS], here.data[BLOCKS])


async def test_nothing_at_all() -> None:
    for staging in (InPlace(pool_of(0.0)), Staged(pool_of(0.0))):
        parcel = staging.receive([], 0)
        await parcel.settle()
        assert sum(map(len, parcel.views)) == 0


async def test_who_is_cancelled_waits_until_the_blocks_are_free() -> None:
    began, may_end = threading.Event(), threading.Event()
    ended: list[bool] = []

    def move() -> None:
        began.set()
        assert may_end.wait(10)
        ended.append(True)

    settling = asyncio.create_task(Parcel([], move).settle())
    assert await asyncio.to_thread(began.wait, 10)
    settling.cancel()
    for _ in range(10):
        await asyncio.sleep(0)
    assert not settling.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await settling
    assert ended


def test_more_bytes_than_blocks_are_a_bug() -> None:
    with pytest.raises(AssertionError):
        Staged(pool_of(0.0)).export([1], LAYOUT.block_bytes + 1)


def test_a_pool_on_the_cpu_is_not_copied() -> None:
    assert isinstance(staging_of(pool_of(0.0)), InPlace)


def copy(sent: Parcel, received: Parcel) -> None:
    """What the network does."""
    data = b"".join(sent.views)
    for view in received.views:
        view[:] = data[: len(view)]
        data = data[len(view) :]
    assert not data
