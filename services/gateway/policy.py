"""Which instance to ask next. Pure."""

import random
from collections.abc import Iterable, Mapping

from shared.registry.records import InstanceRecord


def order(
    candidates: Iterable[InstanceRecord], num_open: Mapping[str, int], tie: random.Random
) -> list[InstanceRecord]:
    """Candidates in the order in which to ask them: fewest open streams first, ties broken at random.

    Args:
        num_open: this gateway's open streams, by instance id.
        tie: several gateways that see the same should not ask the same instance first.
    """
    return sorted(candidates, key=lambda one: (num_open.get(one.id, 0), tie.random()))


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
