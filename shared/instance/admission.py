"""What an instance accepts: at once, by what it has free. Pure."""

from dataclasses import dataclass

from shared.messages.serving import RejectionReason


@dataclass(frozen=True, slots=True)
class BlockNeeds:
    """The blocks that a request needs.

    Args:
        alone: at worst, with all its tokens generated here, and nothing shared.
        now: how many fewer would be free once it is accepted.
        more: how many it may come to need beyond these.
    """

    alone: int
    now: int
    more: int = 0


@dataclass(frozen=True, slots=True)
class BlockSupply:
    """The blocks that an instance has.

    Args:
        free: those that can be taken now; cached ones are among them.
        more: how many all requests that are held may come to need beyond what they have.
        next_step: how many they need if each of them grows once.
        is_short: whether one of them waits for room already.
    """

    total: int
    free: int
    more: int = 0
    next_step: int = 0
    is_short: bool = False


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """What admission looks at in a request."""

    epoch: int
    fingerprint: str
    is_held: bool
    deadline: float


@dataclass(frozen=True, slots=True)
class InstanceFacts:
    """What admission looks at in an instance."""

    epoch: int
    fingerprint: str
    draining: bool
    slots_free: int
    now: float


def refusal(request: RequestFacts, instance: InstanceFacts) -> RejectionReason | None:
    """The first half of the admission policy: why the instance refuses the request, whatever its room; None if not so.

    It costs next to nothing, so that a full instance can be asked often.
    """
    if instance.draining:
        return "draining"
    if request.epoch != instance.epoch:
        return "wrong_epoch"
    if request.fingerprint != instance.fingerprint:
        return "wrong_model"
    if request.is_held:
        return "duplicate"
    if request.deadline <= instance.now:
        return "expired"
    return "no_slot" if instance.slots_free < 1 else None


def room_refusal(needs: BlockNeeds, supply: BlockSupply) -> RejectionReason | None:
    """The second half: why there is no room for it, or None where the instance accepts."""
    if needs.alone > supply.total:
        return "too_long"
    return None if has_room(needs, supply) else "no_blocks"


def has_room(needs: BlockNeeds, supply: BlockSupply) -> bool:
    """Whether a request may have blocks of those that are free.

    It may while all that are held, and it, fit in even at their longest: then nobody ever waits for room. Requests that
    end early, as most do, would leave much of the pool idle so; therefore it also may if every request that is held can
    still grow once. If they all go on, the pool becomes short, and the youngest is given up (`preemption.py`). While
    one waits for room, all room is for those that are held.
    """
    fits_at_worst = needs.now + needs.more + supply.more <= supply.free
    fits_for_now = not supply.is_short and needs.now + supply.next_step <= supply.free
    return fits_at_worst or fits_for_now
