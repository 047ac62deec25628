"""What an instance accepts: at once, by what it has free. Pure."""

from dataclasses import dataclass

from shared.bus.messages import RefusalReason


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """What admission looks at in a request."""

    epoch: int
    fingerprint: str
    num_blocks: int
    is_held: bool
    deadline: float


@dataclass(frozen=True, slots=True)
class InstanceFacts:
    """What admission looks at in an instance."""

    epoch: int
    fingerprint: str
    draining: bool
    slots_free: int
    blocks_free: int
    now: float


def refusal(request: RequestFacts, instance: InstanceFacts) -> RefusalReason | None:
    """The admission policy: why the instance refuses the request, or None where it accepts."""
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
    if instance.slots_free < 1:
        return "no_slot"
    if request.num_blocks > instance.blocks_free:
        return "no_blocks"
    return None
