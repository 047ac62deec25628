"""Who holds which blocks, who waits for more, and who goes."""

from shared.engine.prefix_cache import PrefixCache
from shared.instance.admission import BlockNeeds, BlockSupply
from shared.instance.reservations import Reservation, Reservations, Room

SIZE = 4


def reservations(num_blocks: int = 10, step_blocks: int = 2) -> Reservations:
    return Reservations(PrefixCache(num_blocks, SIZE), step_blocks)


def reserve(held: Reservations, name: str, arrived_at: float, now: int, at_most: int) -> Reservation:
    """Blocks for a request that has no token in common with others."""
    match = held.cache.match([ord(name)] * 9)
    return held.reserve(name, arrived_at, Room(match, now, at_most))


def test_needs_and_supply() -> None:
    held = reservations()
    a = reserve(held, "a", 1.0, 2, 8)
    reserve(held, "b", 2.0, 2, 3)
    assert held.supply() == BlockSupply(total=10, free=6, more=7, next_step=3, is_short=False)
    a.wanted_blocks = 4
    assert held.supply().is_short
    a.is_ending = True
    assert held.supply() == BlockSupply(total=10, free=6, more=1, next_step=1, is_short=False)
    held.cache.fill(a.allocation, [ord("a")] * 9)
    room = Room(held.cache.match([ord("a")] * 9), 4, 7)
    assert held.needs(room) == BlockNeeds(alone=7, now=2, more=3)


def test_the_oldest_grows_first_and_nobody_overtakes_it() -> None:
    held = reservations(num_blocks=10)
    young, old, middle = (reserve(held, name, at, 2, 10) for name, at in (("y", 3.0), ("o", 1.0), ("m", 2.0)))
    young.wanted_blocks, middle.wanted_blocks, old.wanted_blocks = 3, 5, 4
    assert held.grow() == [old]
    assert (len(old.allocation.blocks), held.cache.num_free) == (4, 2)
    assert held.grow() == []
    assert held.victim() == "y"
    young.is_ending = True
    assert held.victim() is None
    held.release(young, [])
    assert held.grow() == [middle]
    assert held.victim() is None


def test_who_needs_no_more_blocks_goes_on_at_once() -> None:
    held = reservations(num_blocks=2)
    only = reserve(held, "a", 1.0, 2, 2)
    only.wanted_blocks = 2
    assert only.waits
    assert held.grow() == [only]
    assert not only.waits


def test_who_is_ending_grows_no_more() -> None:
    held = reservations()
    only = reserve(held, "a", 1.0, 2, 4)
    only.wanted_blocks = 4
    only.is_ending = True
    assert held.grow() == []
    held.release(only, [])
    assert held.cache.num_free == 10
