"""Open answers of gateways in a real Valkey: written in batches, claimed once, and kept through failures."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
import redis

from pdserve.servers import Servers
from shared.errors import RegistryUnavailable
from shared.registry import keys, open_answers, registry
from shared.registry.open_answers import MAX_OPEN_ANSWERS, OpenAnswer, OpenAnswers
from shared.registry.registry import Registry
from tests.harness import eventually


def answer(number: int) -> OpenAnswer:
    return OpenAnswer(inbox=f"_INBOX.{number}", id=f"request-{number}")


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Registry]:
    async with registry.connect(url, ttl_s=5.0, timeout_s=5.0) as records:
        yield records


@asynccontextmanager
async def running(answers: OpenAnswers) -> AsyncIterator[None]:
    """It writes meanwhile."""
    task = asyncio.create_task(answers.run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_what_a_dead_gateway_owes_is_claimed_by_one_other(redis_url: str) -> None:
    async with connected(redis_url) as records:
        dead, heir, other = (OpenAnswers(records, name) for name in ("g1", "g2", "g3"))
        for number in range(5):
            dead.add(f"key-{number}", answer(number))
        dead.remove("key-3")
        dead.remove("nobody")
        await dead.flush()
        heir.add("key-0", answer(7))
        await heir.flush()
        assert await other.orphans() == ["g1", "g2"]
        assert await heir.orphans() == ["g1"], "a gateway is no orphan to itself"
        claims = await asyncio.gather(*(one.claim("g1") for one in (heir, other) for _ in range(5)))
        [claimed] = [one for one in claims if one]
        assert sorted(claimed, key=lambda one: one.id) == [answer(number) for number in (0, 1, 2, 4)]
        assert await other.orphans() == ["g2"]
        assert await other.claim("g2") == [answer(7)]
        assert await other.claim("nobody") == []


async def test_changes_are_written_in_batches_while_it_runs(redis_url: str) -> None:
    async with connected(redis_url) as records:
        answers = OpenAnswers(records, "g1")
        with redis.Redis.from_url(redis_url, decode_responses=True) as client:
            async with running(answers):
                for number in range(1000):
                    answers.add(str(number), answer(number))
                await eventually(lambda: client.hlen(keys.open_answers("g1")) == 1000)
                num_commands = int(client.info("commandstats")["cmdstat_hset"]["calls"])
                assert num_commands <= 2, "a thousand answers do not take a thousand commands"
                for number in range(999):
                    answers.remove(str(number))
                await eventually(lambda: client.hkeys(keys.open_answers("g1")) == ["999"])
                assert 10_000 < client.pttl(keys.open_answers("g1")) <= 50_000, "it outlives the gateway's record"
                answers.remove("999")
                await eventually(lambda: not client.exists(keys.open_answers("g1")))


async def test_an_answer_that_ends_at_once_is_never_written(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected(redis_url) as records:
        answers = OpenAnswers(records, "g1")
        for number in range(100):
            answers.add(str(number), answer(number))
            answers.remove(str(number))
        monkeypatch.setattr(records, "run", None)  # any command would fail
        await answers.flush()
        assert len(answers) == 0


async def test_an_answer_that_ends_while_it_is_written_is_removed(redis_url: str) -> None:
    async with connected(redis_url) as records:
        answers = OpenAnswers(records, "g1")
        answers.add("a", answer(1))
        flushing = asyncio.create_task(answers.flush())
        await asyncio.sleep(0)
        answers.remove("a")
        await flushing
        await answers.flush()
        assert await OpenAnswers(records, "g2").claim("g1") == []


async def test_it_is_renewed_while_the_gateway_lives(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_answers, "RENEW_EVERY_S", 0.02)
    async with connected(redis_url) as records:
        answers = OpenAnswers(records, "g1")
        async with running(answers):
            answers.add("a", answer(1))
            with redis.Redis.from_url(redis_url) as client:
                both = (keys.open_answers("g1"), keys.GATEWAYS_WITH_OPEN)
                await eventually(lambda: client.exists(*both) == 2)
                for key in both:
                    client.pexpire(key, 1000)
                await eventually(lambda: min(client.pttl(key) for key in both) > 10_000)


@pytest.mark.parametrize("how", ["lost", "half lost"])
async def test_what_redis_has_lost_is_written_again(redis_url: str, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(open_answers, "RENEW_EVERY_S", 0.02)
    async with connected(redis_url) as records:
        answers, other = OpenAnswers(records, "g1"), OpenAnswers(records, "g2")
        async with running(answers):
            for number in range(3):
                answers.add(str(number), answer(number))
            with redis.Redis.from_url(redis_url) as client:
                await eventually(lambda: client.hlen(keys.open_answers("g1")) == 3)
                if how == "lost":
                    client.flushall()
                else:
                    client.hdel(keys.open_answers("g1"), "1")
                await eventually(lambda: client.hlen(keys.open_answers("g1")) == 3)
        assert await other.orphans() == ["g1"]
        assert len(await other.claim("g1")) == 3


async def test_a_gateway_that_was_taken_for_dead_hears_what_was_claimed(redis_url: str) -> None:
    """It does not owe these answers any more, and still owes those that it has added since."""
    async with connected(redis_url) as records:
        alive, other = OpenAnswers(records, "g1"), OpenAnswers(records, "g2")
        told: list[set[str]] = []
        alive.on_claimed(lambda claimed: told.append(set(claimed)))
        for number in range(3):
            alive.add(str(number), answer(number))
        await alive.flush()
        assert len(await other.claim("g1")) == 3
        alive.add("3", answer(3))
        await alive.flush()
        assert told == [{"0", "1", "2"}]
        assert len(alive) == 1
        for _ in range(3):
            await alive.flush()
        assert told == [{"0", "1", "2"}], "it is told once"
        assert await other.orphans() == ["g1"]
        assert await other.claim("g1") == [answer(3)]
        alive.renew_soon()
        await alive.flush()
        assert told[1:] == [{"3"}]
        assert await records.run(lambda pipe: pipe.pttl(keys.claimed_answers("g1"))) > [0]


async def test_what_was_claimed_while_redis_was_out_of_reach_is_heard_afterwards(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its next flush writes everything again: nobody may get an error for that a second time."""
    async with connected(redis_url) as records, connected(redis_url) as others_records:
        alive, other = OpenAnswers(records, "g1"), OpenAnswers(others_records, "g2")
        told: list[set[str]] = []
        alive.on_claimed(lambda claimed: told.append(set(claimed)))
        alive.add("0", answer(0))
        await alive.flush()

        async def away(fill: object) -> None:
            raise RegistryUnavailable("away")

        with monkeypatch.context() as patched:
            patched.setattr(records, "run", away)
            alive.add("1", answer(1))
            with pytest.raises(RegistryUnavailable):
                await alive.flush()
        assert await other.claim("g1") == [answer(0)]
        await alive.flush()
        assert told == [{"0"}]
        await alive.flush()
        assert await other.claim("g1") == [answer(1)]


async def test_everything_is_written_once_redis_is_back(
    servers: Servers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(open_answers, "RETRY_S", 0.02)
    async with connected(servers.start_redis()) as records:
        answers, other = OpenAnswers(records, "g1"), OpenAnswers(records, "g2")
        for number in range(3):
            answers.add(str(number), answer(number))
        await answers.flush()
        servers.processes["redis"].kill()
        servers.processes["redis"].wait()
        answers.remove("0")
        with pytest.raises(RegistryUnavailable):
            await answers.flush()
        async with running(answers):
            answers.add("3", answer(3))
            answers.remove("1")
            await eventually(lambda: "open answers will be written to Redis later" in caplog.text)
            servers.start_redis()

            async def is_written() -> bool:
                try:
                    return await other.orphans() == ["g1"]
                except RegistryUnavailable:
                    return False

            await eventually(is_written)
        claimed = await other.claim("g1")
        assert sorted(one.id for one in claimed) == ["request-2", "request-3"]


async def test_a_gateway_that_ends_in_order_leaves_nothing(redis_url: str) -> None:
    async with connected(redis_url) as records:
        answers, other = OpenAnswers(records, "g1"), OpenAnswers(records, "g2")
        answers.add("a", answer(1))
        await answers.flush()
        await answers.close()
        assert await other.orphans() == []
        assert await other.claim("g1") == []


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"{}",
        b"\xff\xfe",
        b'{"inbox": "", "id": "a"}',
        b'{"inbox": "a.>", "id": "a"}',
        b'{"inbox": "a b", "id": "a"}',
        b'{"inbox": "a\\r\\nPUB x 1", "id": "a"}',
        b'{"inbox": "' + b"a" * 5000 + b'", "id": "a"}',
        b'{"inbox": "a", "id": 5}',
        b'{"inbox": "a", "id": "' + b"a" * 513 + b'"}',
    ],
)
async def test_an_answer_that_cannot_be_used_is_skipped(redis_url: str, broken: bytes) -> None:
    async with connected(redis_url) as records:
        answers = OpenAnswers(records, "g1")
        answers.add("a", answer(1))
        await answers.flush()
        with redis.Redis.from_url(redis_url) as client:
            client.hset(keys.open_answers("g1"), "b", broken)
        assert await OpenAnswers(records, "g2").claim("g1") == [answer(1)]


async def test_a_name_that_is_no_id_is_skipped(redis_url: str) -> None:
    """It would become a part of a subject."""
    async with connected(redis_url) as records:
        with redis.Redis.from_url(redis_url) as client:
            client.sadd(keys.GATEWAYS_WITH_OPEN, "g1", "a b", "*", "", "g\r\n", b"\xff", "g" * 5000)
            client.pexpire(keys.GATEWAYS_WITH_OPEN, 5000)
        assert await OpenAnswers(records, "g2").orphans() == ["g1"]


async def test_memory_is_bounded(redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    async with connected(redis_url) as records:
        answers = OpenAnswers(records, "g1")
        for number in range(MAX_OPEN_ANSWERS + 10):
            answers.add(str(number), answer(number))
        assert len(answers) == MAX_OPEN_ANSWERS
        assert caplog.text.count("further ones are not written") == 1
