"""Which instance to ask next. Pure."""

import random
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from shared.messages.records import InstanceRecord

PREFIX_WEIGHT = 2.0
"""By how many open streams an instance that has the whole prompt may be ahead and still be asked first."""

_NOTHING: Mapping[str, float] = MappingProxyType({})


def order(
    candidates: Iterable[InstanceRecord],
    num_open: Mapping[str, int],
    tie: random.Random,
    matched: Mapping[str, float] = _NOTHING,
) -> list[InstanceRecord]:
    """Candidates in the order in which to ask them: fewest open streams first, less what they need not compute again;
    ties broken at random.

    Args:
        num_open: this gateway's open streams, by instance id.
        tie: several gateways that see the same should not ask the same instance first.
        matched: the share (0 .. 1) of the prompt that an instance has in its cache, by instance id.
    """

    def cost(one: InstanceRecord) -> float:
        return num_open.get(one.id, 0) - PREFIX_WEIGHT * matched.get(one.id, 0.0)

    return sorted(candidates, key=lambda one: (cost(one), tie.random()))


def can_decode(fingerprint: str | None, num_tokens: int, instance: InstanceRecord) -> bool:
    """Whether `instance` can go on with KV made under `fingerprint` (same weights, dtype and layout) to `num_tokens`
    tokens.
    """
    return instance.fingerprint == fingerprint and num_tokens <= instance.max_model_len


def can_prefill(
    fingerprint: str | None, num_tokens: int, decoders: Iterable[InstanceRecord], instance: InstanceRecord
) -> bool:
    """Whether `instance` can begin a request of `num_tokens` tokens at its end that some of `decoders` can go on with.

    A request that has begun keeps its `fingerprint`; one that has not has None.
    """
    return (
        fingerprint in (None, instance.fingerprint)
        and num_tokens <= instance.max_model_len
        and any(can_decode(instance.fingerprint, num_tokens, one) for one in decoders)
    )
