"""Answers to clients of the NATS API that are not finished yet, so that they get an error if their gateway dies.

A gateway writes down where it owes an answer; when it dies, another one claims what it owed, and tells the clients:

    gateway A   add, remove    ->  pdserve:v1:gateway:A:open   (batched: a request costs no round trip)
    gateway B   claim("A")     <-  all of it, once: no other gateway gets it, too
    gateway B   claim("A")     ->  pdserve:v1:gateway:A:claimed   (should A be alive after all, it reads this)
    gateway B   error          ->  inbox of each client        (not here: this module only reads and writes Redis)

The key outlives the gateway's record by far, so that a claim finds it however late the death is noticed.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, TypeAdapter
from redis.asyncio.client import Pipeline

from shared.errors import RegistryUnavailable
from shared.registry import keys, scripts
from shared.registry.registry import Registry
from shared.registry.values import Unusable, is_identifier

TTL_FACTOR = 10
"""How many times as long as a record open answers live without renewal."""
FLUSH_EVERY_S = 0.02
RENEW_EVERY_S = 1.0
RETRY_S = 0.5
CLAIMED_TTL_MS = 900_000
"""How long a gateway that was taken for dead can find out which of its answers others have ended."""
MAX_OPEN_ANSWERS = 100_000
"""Further answers are not written down: their clients wait for their own deadline if the gateway dies."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OpenAnswer:
    """One answer that a gateway owes.

    Attributes:
        inbox: the subject on which the client listens.
        id: the request's id, as the client knows it.
    """

    inbox: Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\s*>]+$")]
    id: Annotated[str, Field(max_length=512)]


_ADAPTER: TypeAdapter[OpenAnswer] = TypeAdapter(OpenAnswer)


class OpenAnswers:
    """The open answers of one gateway, and the claims on those of others.

    `add` and `remove` only note what has changed; `run` writes it within 20 ms. A request that ends sooner than that is
    never written. While Redis is away everything stays in memory, and is written when Redis is back or has lost it.
    """

    def __init__(self, registry: Registry, gateway_id: str) -> None:
        self._registry = registry
        self._id = gateway_id
        self._key = keys.open_answers(gateway_id)
        self._claimed_key = keys.claimed_answers(gateway_id)
        self._ttl_ms = TTL_FACTOR * registry.ttl_ms
        self._open: dict[str, OpenAnswer] = {}
        self._unwritten: set[str] = set()
        """Request keys that were added or removed since the last flush."""
        self._written: set[str] = set()
        """Request keys that Redis has."""
        self._rewrite = False
        """Whether everything has to be written again: it is not known what Redis has."""
        self._handled: set[str] = set()
        """Request keys of which Redis says that they were claimed, and which are removed there with the next flush."""
        self._on_claimed: Callable[[Collection[str]], None] | None = None
        self._renewed_at = 0.0
        self._changed = asyncio.Event()
        self._unusable = Unusable()
        self._is_full = False
        self._is_away = False

    def __len__(self) -> int:
        return len(self._open)

    def add(self, key: str, answer: OpenAnswer) -> None:
        """Notes that an answer is owed. `key` names the request within this gateway."""
        if len(self._open) >= MAX_OPEN_ANSWERS and key not in self._open:
            if not self._is_full:
                log.warning("more than %d answers are open: further ones are not written to Redis", MAX_OPEN_ANSWERS)
            self._is_full = True
            return
        self._open[key] = answer
        self._note(key)

    def remove(self, key: str) -> None:
        """Notes that an answer has ended. Unknown keys are no error."""
        if self._open.pop(key, None) is not None:
            self._is_full = self._is_full and len(self._open) > MAX_OPEN_ANSWERS // 2
            self._note(key)

    def on_claimed(self, callback: Callable[[Collection[str]], None]) -> None:
        """Calls `callback` with the keys of answers that another gateway has ended, because it took this one for dead.

        They are removed here before.
        """
        self._on_claimed = callback

    def renew_soon(self) -> None:
        """Lets `run` find out at once what was claimed, as after a time without a connection."""
        self._renewed_at = float("-inf")
        self._changed.set()

    async def run(self) -> None:
        """Writes changes and renews what is written; runs forever."""
        while True:
            try:
                async with asyncio.timeout(RENEW_EVERY_S):
                    await self._changed.wait()
                await asyncio.sleep(FLUSH_EVERY_S)  # what else changes meanwhile is written with it
            except TimeoutError:
                pass
            await self._flush_or_wait()

    async def flush(self) -> None:
        """Writes what has changed since the last flush, and renews the rest if that is due.

        Raises:
            RegistryUnavailable: the next flush writes everything.
        """
        self._changed.clear()
        is_due = bool(self._written) and time.monotonic() - self._renewed_at >= RENEW_EVERY_S
        if not (self._unwritten or self._rewrite or self._handled or is_due):
            return
        unwritten, rewrite = self._unwritten, self._rewrite
        changed = dict(self._open) if rewrite else {key: self._open[key] for key in unwritten if key in self._open}
        removed = [] if rewrite else [key for key in unwritten if key not in self._open]
        self._unwritten = set()
        self._written = changed.keys() | (set() if rewrite else self._written.difference(removed))
        num_expected = len(self._written)
        self._rewrite = True  # unless the following succeeds
        num_written, claimed = await self._write(changed, removed, rewrite=rewrite)
        # It differs if Redis has lost it, or if another gateway has claimed it because it took this one for dead.
        self._rewrite = num_written != num_expected
        self._renewed_at = time.monotonic()
        self._handle_claimed(claimed - self._handled)
        self._handled = claimed

    async def close(self) -> None:
        """Removes everything, for a gateway that ends and has ended all its answers."""
        self._open.clear()
        await self._write({}, [], rewrite=True)
        await self._registry.run(lambda pipe: pipe.srem(keys.GATEWAYS_WITH_OPEN, self._id))

    async def orphans(self) -> list[str]:
        """Returns the other gateways that owe answers, alive or not."""
        [found] = await self._registry.run(lambda pipe: pipe.smembers(keys.GATEWAYS_WITH_OPEN))
        return sorted({one for one in found if is_identifier(one)} - {self._id})

    async def claim(self, gateway_id: str) -> list[OpenAnswer]:
        """Takes over what a dead gateway owes: the caller must end these answers, as nobody else gets them.

        Those that cannot be read are skipped.
        """
        names = (keys.open_answers(gateway_id), keys.GATEWAYS_WITH_OPEN, keys.claimed_answers(gateway_id))
        [found] = await self._registry.run(
            lambda pipe: pipe.eval(scripts.CLAIM, len(names), *names, gateway_id, CLAIMED_TTL_MS)
        )
        texts = found[1::2]
        parsed = [
            self._unusable.parsed(f"an open answer of {gateway_id}", _ADAPTER.validate_json, one) for one in texts
        ]
        return [one for one in parsed if one is not None]

    async def _flush_or_wait(self) -> None:
        try:
            await self.flush()
        except RegistryUnavailable as error:
            if not self._is_away:
                log.warning("open answers will be written to Redis later: %s", error)
            self._is_away = True
            await asyncio.sleep(RETRY_S)
            return
        self._is_away = False

    def _handle_claimed(self, claimed: Collection[str]) -> None:
        """Removes answers that another gateway has ended, and tells their owner."""
        if not claimed:
            return
        for key in claimed:
            self.remove(key)
        log.warning("another gateway took this one for dead and ended %d of its answers on NATS", len(claimed))
        if self._on_claimed is not None:
            self._on_claimed(claimed)

    def _note(self, key: str) -> None:
        # Added and removed within one flush, and nothing of it in Redis: there is nothing to write.
        if key not in self._open and key not in self._written and not self._rewrite:
            self._unwritten.discard(key)
            return
        self._unwritten.add(key)
        self._changed.set()

    async def _write(
        self, changed: dict[str, OpenAnswer], removed: list[str], *, rewrite: bool
    ) -> tuple[int, set[str]]:
        """Writes to Redis in one round trip. Returns how many answers it has then, and the keys of claimed ones."""

        def fill(pipe: Pipeline) -> None:
            if rewrite:
                pipe.delete(self._key)
            if removed:
                pipe.hdel(self._key, *removed)
            if changed:
                pipe.hset(self._key, mapping={key: _ADAPTER.dump_json(one) for key, one in changed.items()})
                pipe.sadd(keys.GATEWAYS_WITH_OPEN, self._id)
            pipe.pexpire(self._key, self._ttl_ms)
            pipe.pexpire(keys.GATEWAYS_WITH_OPEN, self._ttl_ms)
            if self._handled:
                pipe.srem(self._claimed_key, *self._handled)
            pipe.hlen(self._key)
            pipe.smembers(self._claimed_key)

        *_, num_written, claimed = await self._registry.run(fill)
        return int(num_written), set(claimed)
