"""Which gateway is told next, and that small requests cannot starve a large one; pure."""

from hypothesis import given, settings
from hypothesis import strategies as st

from shared.engine.prefix_cache import PrefixCache
from shared.instance.admission import BlockNeeds
from shared.instance.rejections import (
    GATEWAY_EXPIRES_S,
    MAX_GATEWAYS,
    OLDEST_EXPIRES_S,
    OLDEST_RETURNS_WITHIN_S,
    RejectedRequest,
    Rejections,
)
from shared.instance.reservations import Reservation, Reservations, Room
from shared.messages.serving import RejectionReason


def rejected(
    name: str, gateway_id: str = "g", *, arrived_at: float = 0.0, blocks: int = 0, tokens: int = 0, at: float = 0.0
) -> RejectedRequest:
    return RejectedRequest(name, gateway_id, arrived_at, BlockNeeds(alone=blocks, now=blocks), tokens, at)


def test_gateways_are_told_in_turns_and_once_for_each_rejection() -> None:
    rejections = Rejections()
    for gateway_id in "bacb":
        rejections.add(rejected("r", gateway_id), "busy")
    assert [rejections.next_gateway(lambda request: True, 0.0) for _ in range(4)] == ["b", "a", "c", None]


def test_a_gateway_whose_request_would_be_rejected_again_is_passed_over() -> None:
    rejections = Rejections()
    rejections.add(rejected("large", "a", tokens=500), "busy")
    rejections.add(rejected("small", "b", tokens=5), "busy")
    assert rejections.next_gateway(lambda request: request.num_uncomputed_tokens < 100, 0.0) == "b"
    assert rejections.next_gateway(lambda request: request.num_uncomputed_tokens < 100, 0.0) is None
    rejections.add(rejected("small", "a", tokens=5), "busy")
    assert rejections.next_gateway(lambda request: request.num_uncomputed_tokens < 100, 0.0) == "a"


def test_the_oldest_request_without_blocks_is_remembered_over_all_gateways() -> None:
    rejections = Rejections()
    rejections.add(rejected("busy", "a", arrived_at=0.0), "busy")
    assert rejections.oldest(0.0) is None
    for name, gateway_id, arrived_at in (("middle", "a", 2.0), ("old", "b", 1.0), ("young", "a", 3.0)):
        rejections.add(rejected(name, gateway_id, arrived_at=arrived_at, blocks=9), "no_blocks")
    oldest = rejections.oldest(0.0)
    assert oldest is not None
    assert oldest.request_id == "old"
    assert rejections.older_than("old", 1.0, 0.0) is None
    assert rejections.older_than("older", 0.5, 0.0) is None
    assert rejections.older_than("young", 3.0, 0.0) == oldest
    assert rejections.next_gateway(lambda request: True, 0.0) == "b", "its gateway comes first"
    rejections.remove_request("old")
    assert rejections.oldest(0.0) is None


def test_a_request_that_does_not_ask_again_is_forgotten() -> None:
    rejections = Rejections()
    rejections.add(rejected("old", blocks=9), "no_blocks")
    assert rejections.oldest(OLDEST_EXPIRES_S) is not None
    rejections.add(rejected("old", blocks=9, at=OLDEST_EXPIRES_S), "no_blocks")
    assert rejections.oldest(2 * OLDEST_EXPIRES_S) is not None
    assert rejections.oldest(2 * OLDEST_EXPIRES_S + 0.01) is None


def test_a_request_that_could_be_accepted_is_not_waited_for_long() -> None:
    rejections = Rejections()
    rejections.add(rejected("old", blocks=9), "no_blocks")
    assert rejections.next_gateway(lambda request: True, 1.0) == "g"
    assert rejections.oldest(1.0 + OLDEST_RETURNS_WITHIN_S) is not None
    assert rejections.oldest(1.01 + OLDEST_RETURNS_WITHIN_S) is None


def test_another_attempt_is_the_same_request() -> None:
    """An attempt that failed elsewhere is followed by one with another id."""
    rejections = Rejections()
    rejections.add(rejected("large.0", arrived_at=1.0, blocks=9), "no_blocks")
    assert rejections.older_than("large.1", 1.0, 0.0) is None, "it does not wait for itself"
    assert rejections.older_than("small.0", 2.0, 0.0) is not None
    rejections.add(rejected("large.1", arrived_at=1.0, blocks=8, at=1.0), "no_blocks")
    oldest = rejections.oldest(OLDEST_EXPIRES_S + 0.5)
    assert oldest is not None
    assert oldest.request_id == "large.1"


def test_a_cancel_of_any_attempt_ends_the_memory() -> None:
    for cancelled in ("large.0", "large.1", "large.12"):
        rejections = Rejections()
        rejections.add(rejected("large.1", arrived_at=1.0, blocks=9), "no_blocks")
        rejections.remove_request("larger.1")
        assert rejections.older_than("small.0", 2.0, 0.0) is not None
        rejections.remove_request(cancelled)
        assert rejections.older_than("small.0", 2.0, 0.0) is None


def test_a_gateway_that_was_told_of_a_smaller_request_is_told_of_the_oldest_as_well() -> None:
    """Otherwise the oldest request, which may have gone elsewhere, would keep others out for longer."""
    rejections = Rejections()
    rejections.add(rejected("large.0", arrived_at=1.0, blocks=9), "no_blocks")
    rejections.add(rejected("small.0", arrived_at=2.0, tokens=5), "busy")
    assert rejections.next_gateway(lambda request: request.needs.now == 0, 0.0) == "g"
    assert rejections.next_gateway(lambda request: request.needs.now == 0, 0.0) is None
    assert rejections.next_gateway(lambda request: True, 1.0) == "g"
    assert rejections.next_gateway(lambda request: True, 1.0) is None
    assert rejections.oldest(1.01 + OLDEST_RETURNS_WITHIN_S) is None
    rejections.add(rejected("large.0", arrived_at=1.0, blocks=9, at=2.0), "no_blocks")
    assert rejections.next_gateway(lambda request: True, 2.0) == "g", "it has asked again"


def test_nothing_stays_for_ever() -> None:
    rejections = Rejections()
    for number in range(MAX_GATEWAYS + 10):
        rejections.add(rejected("r", f"g{number}", blocks=1), "no_blocks")
    assert len(rejections) == MAX_GATEWAYS
    rejections.remove_gateway(f"g{MAX_GATEWAYS}")
    assert len(rejections) == MAX_GATEWAYS - 1
    rejections.expire(GATEWAY_EXPIRES_S + 1.0)
    assert len(rejections) == 0


NUM_BLOCKS = 40
LARGE = "large"


class Instance:
    """An instance's blocks, and requests of two gateways that ask for them."""

    def __init__(self) -> None:
        self.reservations = Reservations(PrefixCache(NUM_BLOCKS, 4))
        self.rejections = Rejections()
        self.accepted: dict[str, Reservation] = {}

    def ask(self, name: str, gateway_id: str, arrived_at: float, num_blocks: int) -> RejectionReason | None:
        room = Room(self.reservations.cache.match([hash(name) % 2**32]), num_blocks, num_blocks)
        needs = self.reservations.needs(room)
        older = self.rejections.older_than(name, arrived_at, 0.0)
        reason = self.reservations.rejection(needs, older.needs if older else None)
        if reason is None:
            self.rejections.remove_request(name)
            self.accepted[name] = self.reservations.reserve(name, arrived_at, room)
        else:
            self.rejections.add(RejectedRequest(name, gateway_id, arrived_at, needs, 0, 0.0), reason)
        return reason

    def release(self, number: int) -> None:
        name = list(self.accepted)[number % len(self.accepted)]
        self.reservations.release(self.accepted.pop(name), [])


@settings(max_examples=200, deadline=None)
@given(
    num_large_blocks=st.integers(2, NUM_BLOCKS),
    before=st.lists(st.integers(1, 20), max_size=20),
    stream=st.lists(st.tuples(st.integers(1, 8), st.integers(0, 99)), min_size=25, max_size=25),
)
def test_a_large_request_is_accepted_once_what_was_there_before_it_is_released(
    num_large_blocks: int, before: list[int], stream: list[tuple[int, int]]
) -> None:
    """However many small requests of the other gateway ask: each release of one that was there brings it nearer.

    What is accepted meanwhile must not make it wait for a release more, so that it is accepted at the latest when all
    that was accepted before it has been released.
    """
    instance = Instance()
    for number, num_blocks in enumerate(before):
        if instance.ask(f"before{number}", "a", float(number), num_blocks) is not None:
            instance.rejections.remove_request(f"before{number}")  # it goes elsewhere
    older = set(instance.accepted)
    is_accepted = instance.ask(LARGE, "b", 1000.0, num_large_blocks) is None
    for number, (num_blocks, which) in enumerate(stream):
        if is_accepted:
            return
        for attempt in range(3):
            instance.ask(f"small{number}.{attempt}", "a", 2000.0 + number, num_blocks)
        left = [name for name in instance.accepted if name in older]
        if not left:
            break
        name = left[which % len(left)]
        instance.reservations.release(instance.accepted.pop(name), [])
        is_accepted = instance.ask(LARGE, "b", 1000.0, num_large_blocks) is None
    assert is_accepted, "all that was there before it has been released"


def test_without_memory_small_requests_would_starve_it() -> None:
    """The policy is needed: two gateways, and a release of one small request makes place for another only."""
    instance = Instance()
    for number in range(NUM_BLOCKS // 2):
        assert instance.ask(f"small{number}", "a", float(number), 2) is None
    assert instance.ask(LARGE, "b", 100.0, NUM_BLOCKS // 2) == "no_blocks"
    num_overtaking = 0
    for number in range(NUM_BLOCKS):
        instance.release(0)
        num_overtaking += instance.ask(f"later{number}", "a", 200.0 + number, 2) is None
        if instance.ask(LARGE, "b", 100.0, NUM_BLOCKS // 2) is None:
            break
    assert LARGE in instance.accepted
    assert num_overtaking == 0
