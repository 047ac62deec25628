"""What an instance accepts: at once, by what it has free. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    """What admission looks at in a request, its blocks aside.

    Args:
        is_known: whether the instance has a request of this id.
        expires_in_s: seconds until its deadline.
        is_prompt: whether its prompt would be computed here.
    """

    epoch: int
    fingerprint: str
    is_known: bool
    expires_in_s: float
    is_prompt: bool


@dataclass(frozen=True, slots=True)
class InstanceFacts:
    """What admission looks at in an instance, its blocks aside; `tokens_free` as in `Capacity`."""

    epoch: int
    fingerprint: str
    draining: bool
    slots_free: int
    tokens_free: int


def tokens_free(max_uncomputed_tokens: int, num_decode_rows: int, num_uncomputed_tokens: int) -> int:
    """Returns how many prompt tokens still fit into the next engine step.

    Args:
        max_uncomputed_tokens: the token budget of a step, or more where prompts are to queue here.
        num_decode_rows: tokens of it that decodes take.
        num_uncomputed_tokens: prompt tokens of accepted requests that will be left after the step under way.
    """
    return max(0, max_uncomputed_tokens - num_decode_rows - num_uncomputed_tokens)


def can_start_next(num_prompt_tokens: int, num_tokens_free: int, num_uncomputed_tokens: int) -> bool:
    """Returns whether a prompt may be accepted: it begins in the next step, and delays no prompt that shares the step.

    It may if the next step has no other prompt, or if it fits into that as a whole. Prompts that share a step get their
    first tokens at its end, so the beginning of a long prompt would delay those before it, and gain little itself. In
    simulations of bursts (`bench.schedule`) it cost up to a fifth of all first tokens in time.

    Args:
        num_prompt_tokens: how many of its tokens are to be computed.
        num_tokens_free: as returned by `tokens_free`.
        num_uncomputed_tokens: as for `tokens_free`.
    """
    return num_tokens_free > 0 and (num_uncomputed_tokens == 0 or num_prompt_tokens <= num_tokens_free)


def rejection(request: RequestFacts, instance: InstanceFacts) -> RejectionReason | None:
    """Returns why the instance rejects the request, whatever its blocks; None if it does not.

    The first half of the admission policy. It costs next to nothing, so that a full instance can be asked often.
    """
    if instance.draining:
        return "draining"
    if request.epoch != instance.epoch:
        return "wrong_epoch"
    if request.fingerprint != instance.fingerprint:
        return "wrong_model"
    if request.is_known:
        return "duplicate"
    if request.expires_in_s <= 0:
        return "expired"
    if instance.slots_free < 1:
        return "no_slot"
    return "busy" if request.is_prompt and instance.tokens_free < 1 else None


def block_rejection(needs: BlockNeeds, supply: BlockSupply) -> RejectionReason | None:
    """Returns why there are no blocks for the request, or None if there are. The second half of the policy."""
    if needs.alone > supply.total:
        return "too_long"
    return None if has_room(needs, supply) else "no_blocks"


def has_room(needs: BlockNeeds, supply: BlockSupply) -> bool:
    """Returns whether a request may have blocks of those that are free."""
    return min_free_blocks(needs, supply) <= supply.free


def min_free_blocks(needs: BlockNeeds, supply: BlockSupply) -> int:
    """Returns how many blocks must be free for the request to be accepted.

    It is accepted if all that are held, and it, fit in even at their longest: then nobody ever waits for blocks.
    Requests that end early, as most do, would leave much of the pool idle so; therefore it also is if every request
    that is held can still grow once. If they all go on, the pool becomes short, and the youngest is preempted
    (`preemption.py`). While one waits for blocks, all blocks are for those that are held.
    """
    at_worst = needs.now + needs.more + supply.more
    return at_worst if supply.is_short else min(at_worst, needs.now + supply.next_step)


def costs_nothing(
    younger: BlockNeeds, oldest: BlockNeeds, supply: BlockSupply, releases: Sequence[int], step_blocks: int
) -> bool:
    """Returns whether accepting a request does not delay an older one that was rejected for lack of blocks.

    It does not in three cases: it takes no block; or the older one still has its blocks after it; or the older one has
    to wait for one certain request, the largest, and has its blocks as soon as that is released, with or without it.
    In the third case everything else together would not suffice, so that the order of releases does not matter.

    Args:
        younger, oldest: what the two need.
        supply: what there is before the younger one is accepted.
        releases: for each accepted request, the blocks that become free when it is released.
        step_blocks: by how many blocks requests grow at a time.
    """
    if younger.now <= 0 and younger.more <= 0:
        return True
    after = replace(
        supply,
        free=supply.free - younger.now,
        more=supply.more + younger.more,
        next_step=supply.next_step + min(younger.more, step_blocks),
    )
    num_missing = min_free_blocks(oldest, after) - after.free
    if num_missing <= 0:
        return True
    largest = max(releases, default=0)
    num_missing_before = min_free_blocks(oldest, supply) - supply.free
    return sum(releases) - largest < num_missing_before and num_missing <= largest
