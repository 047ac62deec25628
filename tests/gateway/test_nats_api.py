"""The NATS API over a scripted core: exactly one terminal message for every request, whatever happens to it."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from nats.aio.subscription import Subscription

from pdserve.servers import Servers
from services.gateway import nats_api
from services.gateway.api import ApiContext
from services.gateway.nats_api import LARGE_REQUEST_BYTES, NatsApi
from services.gateway.openai.schemas import CompletionRequest, parse_request
from shared import throttled_log
from shared.bus import client_answers, connection, reply_inbox, subjects
from shared.bus.connection import Bus, Incoming
from shared.bus.reply_inbox import ReplyInbox
from shared.dead_gateways import end_orphans
from shared.errors import InternalError, InvalidRequest, Overloaded
from shared.messages.generate_api import ApiMessage, GenerateDone, GenerateRequest
from shared.registry import registry
from shared.registry.open_answers import OpenAnswer, OpenAnswers
from shared.registry.registry import Registry
from shared.telemetry.gateway_metrics import GatewayMetrics
from shared.text.tokenizer import Tokenizer
from tests.gateway.openai.conftest import DEMO, MODEL, ids_of
from tests.gateway.openai.fake_core import Call, FakeCore, Step
from tests.harness import eventually, free_port
from tests.system.client import Json, NatsClient, nats_client, next_message


def endless(call: Call) -> list[Step]:
    return [10, asyncio.Event(), 11]


@dataclass
class Served:
    """The API on a real bus, and a client of it."""

    api: NatsApi
    bus: Bus
    client: NatsClient
    core: FakeCore
    metrics: GatewayMetrics
    open_answers: OpenAnswers
    tokenizer: Tokenizer

    async def end_of(self, request: Json | bytes) -> Json:
        """The terminal message of a request; nothing follows it."""
        return (await self.client.answer(request))[-1]

    async def cancel(self, **fields: str) -> None:
        await self.client.connection.publish("pdserve.v1.cancel", json.dumps(fields).encode())

    async def is_served(self) -> None:
        """The next request is served as always."""
        self.core.script = lambda call: [10, 11, 12]
        assert (await self.end_of({"prompt": "Hi"}))["type"] == "done"


@asynccontextmanager
async def api_over(core: FakeCore, nats_url: str, records: Registry) -> AsyncIterator[Served]:
    tokenizer, metrics, open_answers = Tokenizer(DEMO), GatewayMetrics(), OpenAnswers(records, "g")
    context = ApiContext(core=core, tokenizer=tokenizer, served_model_name=MODEL, metrics=metrics)
    async with connection.connect(nats_url, name="g", timeout_s=5.0) as bus, nats_client(nats_url) as client:
        api = NatsApi(context, bus, "g", open_answers)

        async def hear(incoming: Incoming) -> None:
            api.on_no_responders(subjects.verb_and_key(incoming.subject)[1])

        await bus.subscribe(subjects.gateway("g", ">"), hear)
        await api.subscribe()
        yield Served(api, bus, client, core, metrics, open_answers, tokenizer)
        await api.drain(5.0)


@pytest.fixture
async def records(redis_url: str) -> AsyncIterator[Registry]:
    async with registry.connect(redis_url, ttl_s=60.0, timeout_s=5.0) as found:
        yield found


@pytest.fixture
async def one(nats_url: str, records: Registry) -> AsyncIterator[Served]:
    async with api_over(FakeCore(), nats_url, records) as served:
        yield served


def error_of(message: Json) -> Json:
    assert message["type"] == "error", message
    error: Json = message["error"]  # type: ignore[assignment]
    return error


async def end_in(answer: Subscription) -> Json:
    """The terminal message in an inbox; nothing follows it."""
    while (message := await next_message(answer))["type"] == "chunk":
        pass
    await answer._conn.flush()
    assert answer.pending_msgs == 0, "something follows the terminal message"
    return message


async def test_a_request_names_its_scenario_and_its_priority(one: Served) -> None:
    for fields in ({}, {"scenario": "chat-2_B"}, {"priority": "batch", "scenario": None}):
        assert (await one.end_of({"prompt": "Hi", **fields}))["type"] == "done"
    told = [(call.request.scenario, call.request.is_batch) for call in one.core.calls]
    assert told == [(None, False), ("chat-2_B", False), (None, True)]


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("scenario", "a b", "but it is 'a b'"),
        ("scenario", "", "at least 1 character"),
        ("scenario", "x" * 65, "at most 64 characters"),
        ("priority", "urgent", "'interactive' or 'batch', but it is 'urgent'"),
        ("stop", "", "1 to 1024 characters"),
        ("stop", ["a", ""], "1 to 1024 characters"),
        ("stop", ["a"] * 17, "16 strings"),
        ("stop", 5, "a string or a list of strings"),
        ("logit_bias", {"x": 1}, "'x'"),
        ("logit_bias", {"-1": 1}, "'-1'"),
        ("max_tokens", "many", "integer"),
        ("temperature", 3, "less than or equal to 2"),
        ("max_token", 1, "max_token"),
        ("timeout_s", 0, "over 0"),
        ("id", "a.b", "id"),
    ],
)
async def test_an_error_names_the_field(one: Served, field: str, value: object, says: str) -> None:
    error = error_of(await one.end_of({"prompt": "Hi", field: value}))
    assert (error["code"], error["param"]) == ("invalid_request", field)
    assert says in str(error["message"])
    assert "``" not in str(error["message"])
    assert one.core.calls == []


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b'{"prompt": "\xff"}',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "prompt_token_ids": [1]}',
        b'{"max_tokens": 2}',
        b'{"v": 2, "prompt": "x"}',
        b'{"messages": {}}',
        b'{"prompt_token_ids": [[[[]]]]}',
        b"[" * 100_000,
        b'{"prompt": ' + b"9" * 100_000 + b"}",
    ],
)
async def test_whatever_is_sent_has_one_terminal_message(one: Served, request_bytes: bytes) -> None:
    [message] = await one.client.answer(request_bytes)
    assert error_of(message)["code"] == "invalid_request"
    await one.is_served()


async def test_an_error_is_bounded_however_much_it_quotes(one: Served) -> None:
    one.core.script = lambda call: [10, Overloaded("x" * 2**21, param="y" * 2**21)]
    error = error_of(await one.end_of({"prompt": "Hi"}))
    assert error["code"] == "overloaded"
    assert len(str(error)) < 5000
    role = "r" * (one.bus.max_payload - 200)
    assert error_of(await one.end_of({"messages": [{"role": role, "content": "x"}], "x" * 50: 1}))
    await one.is_served()


async def test_a_fault_of_the_core_ends_its_request_only(one: Served) -> None:
    one.core.script = lambda call: [10, ValueError("a fault")]
    assert error_of(await one.end_of({"prompt": "Hi"}))["code"] == "internal_error"
    await one.is_served()


async def test_many_tokens_at_once_come_in_several_chunks(one: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """With their log probabilities they are larger than the largest message of a NATS server by default."""
    monkeypatch.setattr(Bus, "max_payload", 2**20)
    one.core.script = lambda call: [10 + number % 100 for number in range(3000)]
    messages = await one.client.answer({"prompt": "Hi", "max_tokens": 3000, "logprobs": 20})
    assert messages[-1]["type"] == "done"
    assert messages[-1]["usage"]["completion_tokens"] == 3000  # type: ignore[index]
    assert sum(len(json.dumps(message)) for message in messages) > one.bus.max_payload
    assert [len(message["token_ids"]) for message in messages[:-1]] == [256] * 11 + [184]  # type: ignore[arg-type]


async def test_a_chunk_that_does_not_fit_ends_its_request_with_an_error(
    one: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bus, "max_payload", 6000)
    one.core.script = lambda call: [10] * 100
    [message] = await one.client.answer({"prompt": "Hi", "max_tokens": 100, "logprobs": 20})
    assert error_of(message)["code"] == "internal_error"
    assert message["index"] == 0
    assert "6000" in str(error_of(message)["message"])
    await eventually(lambda: one.core.calls[0].is_closed)
    await one.is_served()


async def test_cancelled_before_it_starts(one: Served) -> None:
    """Request and cancel are read together, so that the cancel comes before the request's task runs."""
    one.core.script = endless
    answers = []
    for number in range(50):
        inbox = one.client.connection.new_inbox()
        answers.append(await one.client.connection.subscribe(inbox))
        name = f"brief-{number}"
        request = json.dumps({"id": name, "prompt": "x"}).encode()
        await one.client.connection.publish("pdserve.v1.generate", request, reply=inbox)
        await one.cancel(id=name, inbox=inbox)
        await one.cancel(id=name, inbox=inbox)
    await one.client.connection.flush()
    for number, answer in enumerate(answers):
        # A cancel that was even earlier found nothing, as that of an unknown id.
        await one.cancel(id=f"brief-{number}", inbox=answer.subject)
        assert error_of(await end_in(answer))["code"] == "cancelled"
    assert all(call.is_closed for call in one.core.calls)
    await one.is_served()


async def test_a_request_and_its_cancel_in_one_turn_of_the_event_loop(one: Served) -> None:
    """The handlers run one after the other, and the request's task has not begun."""
    answer = await one.client.connection.subscribe("_INBOX.one-turn")
    request, cancel = await incoming_pair(
        one, {"id": "mine", "prompt": "x"}, {"id": "mine", "inbox": "_INBOX.one-turn"}
    )
    await one.api._on_generate(request)
    await one.api._on_cancel(cancel)
    assert error_of(await end_in(answer))["code"] == "cancelled"
    assert one.core.calls == []
    assert "mine" not in {found.id for found in one.api._answers if not found.is_finished}


async def incoming_pair(one: Served, request: Json, cancel: Json) -> tuple[Incoming, Incoming]:
    """Two messages as the API receives them, the first with the inbox that the second names."""
    found: list[Incoming] = []

    async def keep(incoming: Incoming) -> None:
        found.append(incoming)

    stop = await one.bus.subscribe("pair", keep)
    for fields, reply in ((request, str(cancel["inbox"])), (cancel, "")):
        await one.client.connection.publish("pair", json.dumps(fields).encode(), reply=reply)
    await eventually(lambda: len(found) == 2)
    await stop()
    return found[0], found[1]


async def test_a_client_cannot_cancel_anothers_request(one: Served) -> None:
    one.core.script = endless
    answer = await one.client.send({"id": "mine", "prompt": "x"})
    assert (await next_message(answer))["type"] == "chunk"
    for fields in ({"id": "mine"}, {"id": "mine", "inbox": "_INBOX.eve"}, {"id": "mine", "inbox": ""}):
        await one.cancel(**fields)
    await one.cancel(id="nobody's", inbox=answer.subject)
    await one.client.connection.publish("pdserve.v1.cancel", b'{"inbox": 5}')
    await one.is_served()
    assert answer.pending_msgs == 0
    assert not one.core.calls[0].is_closed
    await one.cancel(id="mine", inbox=answer.subject)
    assert error_of(await end_in(answer))["code"] == "cancelled"


async def test_a_generated_id_needs_no_inbox(one: Served) -> None:
    one.core.script = endless
    answer = await one.client.send({"prompt": "x"})
    first = await next_message(answer)
    await one.cancel(id=str(first["id"]))
    assert error_of(await end_in(answer))["code"] == "cancelled"
    assert one.core.calls[0].is_closed


@pytest.mark.parametrize(
    "inbox",
    [
        "",
        "_INBOX." + "a" * 4020,
        "pdserve.v1.generate",
        "pdserve.v1.cancel",
        "pdserve.v1.gateway.g.tokens",
        "$SYS.REQ.SERVER.PING",
        "$JS.API.INFO",
    ],
)
async def test_a_request_whose_answer_has_nowhere_to_go_is_skipped(one: Served, inbox: str) -> None:
    heard = await one.client.connection.subscribe(inbox) if inbox and not inbox.startswith("$") else None
    await one.client.connection.publish("pdserve.v1.generate", b'{"prompt": "x"}', reply=inbox)
    await one.client.connection.flush()
    await one.is_served()
    assert len(one.core.calls) == 1
    if heard is not None and inbox != "pdserve.v1.generate":
        assert heard.pending_msgs == 0


async def test_a_client_that_goes_away_ends_its_request(one: Served) -> None:
    proceed = asyncio.Event()
    one.core.script = lambda call: [10, proceed, 11, asyncio.Event(), 12]
    answer = await one.client.send({"prompt": "x"})
    assert (await next_message(answer))["type"] == "chunk"
    await answer.unsubscribe()
    await one.client.connection.flush()
    proceed.set()
    await eventually(lambda: one.core.calls[0].is_closed)
    await eventually(lambda: count(one, "cancelled") == 1)


async def test_a_client_that_never_listened_ends_its_request(one: Served) -> None:
    one.core.script = endless
    await one.client.connection.publish("pdserve.v1.generate", b'{"prompt": "x"}', reply="_INBOX.of-nobody")
    await eventually(lambda: one.core.calls and one.core.calls[0].is_closed)


def count(one: Served, code: str) -> float:
    counted: float = one.metrics.requests.labels("nats", code)._value.get()
    return counted


async def test_draining_ends_open_requests_with_an_error(one: Served) -> None:
    slow = asyncio.Event()
    one.core.script = lambda call: [10, slow, 11] if call.request.is_batch else endless(call)
    answers = [await one.client.send({"prompt": "x", "priority": name}) for name in ("interactive", "batch")]
    for answer in answers:
        assert (await next_message(answer))["type"] == "chunk"
    draining = asyncio.create_task(one.api.drain(1.0))
    slow.set()
    assert error_of(await end_in(answers[0]))["code"] == "no_instance"
    assert (await end_in(answers[1]))["type"] == "done"
    await draining
    late = await one.client.send({"prompt": "x"})
    message = await late.next_msg(timeout=10)
    assert (message.headers or {})["Status"] == "503"


async def test_a_request_that_arrives_while_draining_begins_is_answered(one: Served) -> None:
    answer = await one.client.connection.subscribe("_INBOX.late")
    request, _ = await incoming_pair(one, {"prompt": "x"}, {"inbox": "_INBOX.late"})
    await one.api.drain(0.1)
    await one.api._on_generate(request)
    assert error_of(await end_in(answer))["code"] == "no_instance"


async def test_a_stop_string_ends_the_request_before_its_last_chunk_arrives(one: Served) -> None:
    text = "import os\nimport sys\n"
    one.core.script = lambda call: [*ids_of(one.tokenizer, text), asyncio.Event(), 10]
    messages = await one.client.answer({"prompt": "x", "stop": "sys", "max_tokens": 100})
    assert messages[-1]["finish_reason"] == "stop"
    assert "".join(str(message["text"]) for message in messages[:-1]) == "import os\nimport "
    assert one.core.calls[0].is_finished


async def test_tokens_that_end_without_a_reason_do_not_leave_a_client_waiting(
    one: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats_api, "GRACE_S", 0.1)
    one.core.script = lambda call: [10, 11, asyncio.Event()]
    error = error_of(await one.end_of({"prompt": "x", "timeout_s": 0.2, "max_tokens": 9}))
    assert error["code"] == "deadline_exceeded"
    assert one.core.calls[0].is_closed


async def test_a_request_arrives_before_its_prompt_is_tokenised(one: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, delay_s = one.tokenizer.encode, 0.3

    async def slowly(text: str, *, max_tokens: int) -> list[int]:
        await asyncio.sleep(delay_s)
        return await encode(text, max_tokens=max_tokens)

    monkeypatch.setattr(one.tokenizer, "encode", slowly)
    await one.end_of({"prompt": "Hi", "timeout_s": 5.0})
    assert one.metrics.ttft.labels("nats")._sum.get() >= delay_s
    request = one.core.calls[0].request
    assert request.deadline == request.arrived_at + 5.0


async def test_open_answers_are_written_down_until_they_end(one: Served, records: Registry) -> None:
    one.core.script = endless
    answer = await one.client.send({"id": "mine", "prompt": "x"})
    await next_message(answer)
    assert len(one.open_answers) == 1
    await one.cancel(id="mine", inbox=answer.subject)
    await end_in(answer)
    await eventually(lambda: len(one.open_answers) == 0)
    await one.client.answer(b"{")
    assert len(one.open_answers) == 0


async def test_the_clients_of_a_dead_gateway_get_an_error(one: Served, records: Registry) -> None:
    """What stands in Redis may be anything: nothing is published to a subject of the services."""
    inbox = one.client.connection.new_inbox()
    long_inbox = "_INBOX." + "a" * 3000
    heard = [await one.client.connection.subscribe(name) for name in (inbox, long_inbox)]
    forged = [await one.client.connection.subscribe(name) for name in ("pdserve.v1.instance.i.cancel", "$x.y")]
    dead = OpenAnswers(records, "dead")
    names = [inbox, long_inbox, "pdserve.v1.instance.i.cancel", "$x.y", "_INBOX..a", "_INBOX.b."]
    for number, name in enumerate(names):
        dead.add(str(number), OpenAnswer(inbox=name, id=f"id-{number}"))
    await dead.flush()
    await end_orphans(one.bus, one.open_answers, "dead")
    for number, answer in enumerate(heard):
        message = await end_in(answer)
        assert (message["id"], message["index"]) == (f"id-{number}", -1)
        assert error_of(message)["code"] == InternalError.code
    await end_orphans(one.bus, one.open_answers, "dead")
    await one.is_served()
    assert all(answer.pending_msgs == 0 for answer in (*heard, *forged))


async def test_a_client_may_be_taken_for_gone_after_its_answer_is_forgotten(
    servers: Servers, records: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sending the last message again outlasts its keeping; that ends nothing else."""
    monkeypatch.setattr(client_answers, "LINGER_S", 2.0)
    monkeypatch.setattr(reply_inbox, "CLIENT_RETURNS_S", 1.0)
    monkeypatch.setattr(reply_inbox, "SEND_AGAIN_S", 3.0)
    port = free_port()
    async with api_over(FakeCore(), servers.start_nats(port), records) as one:
        answer = await one.client.send(b"{")
        await next_message(answer)
        await answer.unsubscribe()
        await one.client.connection.flush()
        servers.processes["nats"].kill()
        servers.processes["nats"].wait()
        await eventually(lambda: not one.bus.connected)
        servers.start_nats(port)
        await eventually(lambda: one.bus.connected)
        [kept] = one.api._answers
        await eventually(lambda: kept.inbox._is_resending)
        await eventually(lambda: not len(one.api._answers))
        await eventually(lambda: one.client.connection.is_connected)
        await one.is_served()


async def test_too_many_open_requests_are_told_so(one: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nats_api, "MAX_OPEN_ANSWERS", 2)
    for _ in range(5):
        await one.is_served()  # finished ones do not count
    one.core.script = endless
    open_ones = [await one.client.send({"prompt": "x"}) for _ in range(2)]
    firsts = [await next_message(answer) for answer in open_ones]
    for request, name in (({"prompt": "x", "id": "mine"}, "mine"), (b"x" * (LARGE_REQUEST_BYTES + 1), None)):
        [message] = await one.client.answer(request)  # type: ignore[arg-type]
        assert error_of(message)["code"] == Overloaded.code
        assert error_of(message)["retry_after_s"] == 1.0
        assert name is None or message["id"] == name
    assert count(one, "overloaded") == 2
    assert len(one.core.calls) == 7
    for answer, first in zip(open_ones, firsts, strict=True):
        await one.cancel(id=str(first["id"]))
        await end_in(answer)
    await one.is_served()


async def test_few_finished_answers_are_kept(one: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_answers, "MAX_FINISHED_ANSWERS", 3)
    one.core.script = endless
    still_open = await one.client.send({"id": "open", "prompt": "x"})
    await next_message(still_open)
    for _ in range(10):
        await one.is_served()
    await eventually(lambda: len(one.api._answers) == 4)
    await one.cancel(id="open", inbox=still_open.subject)
    assert error_of(await end_in(still_open))["code"] == "cancelled"


async def test_what_anybody_can_cause_does_not_fill_the_log(
    one: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(throttled_log, "INTERVAL_S", 1e6)
    publish = one.client.connection.publish
    for _ in range(50):
        await publish("pdserve.v1.cancel", b"{")
        await publish("pdserve.v1.generate", b'{"prompt": "x"}')
        await publish("pdserve.v1.generate", b'{"prompt": "x"}', reply="_INBOX." + "a" * 4030)
    await one.is_served()
    await eventually(lambda: "malformed cancel" in caplog.text)
    assert sum("skipping" in record.getMessage() for record in caplog.records) == 2
    monkeypatch.setattr(throttled_log, "INTERVAL_S", 0.0)
    await publish("pdserve.v1.cancel", b"{")
    await eventually(lambda: "49 times since" in caplog.text)


async def test_nothing_follows_once_another_gateway_has_ended_the_answer(one: Served, records: Registry) -> None:
    """Its client has had a terminal message."""
    proceed = asyncio.Event()
    one.core.script = lambda call: [10, proceed, 11, 12]
    answer = await one.client.send({"id": "mine", "prompt": "x"})
    assert (await next_message(answer))["type"] == "chunk"
    await one.open_answers.flush()
    assert len(await OpenAnswers(records, "other").claim("g")) == 1
    one.open_answers.renew_soon()
    await one.open_answers.flush()
    await eventually(lambda: one.core.calls[0].is_closed)
    proceed.set()
    await one.cancel(id="mine", inbox=answer.subject)
    one.api._bus_reconnected()
    await asyncio.sleep(reply_inbox.SEND_AGAIN_S + 2 * reply_inbox.REPORTED_AFTER_S)
    await one.is_served()
    await one.client.connection.flush()
    assert answer.pending_msgs == 0
    assert count(one, "internal_error") == 1


@pytest.mark.parametrize("how", ["cancel", "drain"])
async def test_nothing_follows_done(one: Served, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """The cancel comes while the last message is being sent."""
    sent, proceed = asyncio.Event(), asyncio.Event()
    send = ReplyInbox.send

    async def slowly(inbox: ReplyInbox, message: ApiMessage) -> None:
        await send(inbox, message)
        if isinstance(message, GenerateDone):
            sent.set()
            await proceed.wait()

    monkeypatch.setattr(ReplyInbox, "send", slowly)
    answer = await one.client.send({"id": "mine", "prompt": "x"})
    await sent.wait()
    if how == "cancel":
        await one.cancel(id="mine", inbox=answer.subject)
        await one.client.connection.flush()
        await one.bus.flush()
    else:
        await one.api.drain(0.05)
    [kept] = one.api._answers
    assert kept.ended_by is None
    proceed.set()
    await eventually(lambda: kept.is_finished)
    assert (await end_in(answer))["type"] == "done"


async def test_clients_may_choose_the_same_id(one: Served) -> None:
    one.core.script = endless
    request: Json = {"id": "same", "prompt": "x"}
    answers = [await one.client.send(request) for _ in range(2)]
    for answer in answers:
        assert (await next_message(answer))["type"] == "chunk"
    again = json.dumps(request).encode()
    await one.client.connection.publish("pdserve.v1.generate", again, reply=answers[0].subject)
    error = error_of(await next_message(answers[0]))
    assert (error["code"], error["param"]) == ("invalid_request", "id")
    await one.cancel(id="same", inbox=answers[0].subject)
    assert error_of(await end_in(answers[0]))["code"] == "cancelled"
    assert [call.is_closed for call in one.core.calls].count(True) == 1  # the two may have arrived in either order
    await one.cancel(id="same", inbox=answers[1].subject)
    assert error_of(await end_in(answers[1]))["code"] == "cancelled"


class SlowToParse:
    """Parsing a request waits for `proceed`, and `threads` are those that have parsed one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.threads: list[threading.Thread] = []
        self.proceed = threading.Event()
        parse = Incoming.parse

        def slowly(incoming: Incoming, kind: type[ApiMessage]) -> ApiMessage:
            if kind is GenerateRequest:
                self.threads.append(threading.current_thread())
                if threading.current_thread() is not threading.main_thread():
                    self.proceed.wait()
            return parse(incoming, kind)

        monkeypatch.setattr(Incoming, "parse", slowly)


LARGE: Json = {"id": "large", "messages": [{"role": "user", "content": "x" * LARGE_REQUEST_BYTES}]}


async def test_a_large_request_is_parsed_beside_others(one: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    parsing = SlowToParse(monkeypatch)
    one.core.context = 2**20
    answer = await one.client.send(LARGE)
    await eventually(lambda: parsing.threads)
    await one.is_served()
    parsing.proceed.set()
    assert (await end_in(answer))["type"] == "done"
    is_main = [thread is threading.main_thread() for thread in parsing.threads]
    assert is_main == [False, True]


async def test_a_large_request_is_cancelled_while_it_is_parsed(one: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    parsing = SlowToParse(monkeypatch)
    answer = await one.client.send(LARGE)
    await eventually(lambda: parsing.threads)
    await one.cancel(id="large", inbox="_INBOX.eve")
    await one.cancel(id="other", inbox=answer.subject)
    await one.cancel(id="large", inbox=answer.subject)
    await eventually(lambda: [found.early_cancels for found in one.api._answers] == [["other", "large"]])
    parsing.proceed.set()
    message = await end_in(answer)
    assert (message["id"], error_of(message)["code"]) == ("large", "cancelled")
    assert one.core.calls == []
    assert len(one.open_answers) == 0


async def test_a_large_request_that_is_wrong(one: Served) -> None:
    [message] = await one.client.answer({**LARGE, "max_token": 1})
    assert error_of(message)["param"] == "max_token"
    assert one.core.calls == []


async def test_tokenising_counts_against_the_deadline(one: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    async def endlessly(text: str, *, max_tokens: int) -> list[int]:
        await asyncio.Event().wait()
        return []

    monkeypatch.setattr(nats_api, "GRACE_S", 0.1)
    monkeypatch.setattr(one.tokenizer, "encode", endlessly)
    assert error_of(await one.end_of({"prompt": "x", "timeout_s": 0.1}))["code"] == "deadline_exceeded"
    assert one.core.calls == []


async def test_limits_are_those_of_the_http_api(one: Served) -> None:
    most: Json = {
        "prompt": "x",
        "stop": ["s" * 1024] * 16,
        "stop_token_ids": list(range(1024)),
        "logit_bias": {str(number): 1 for number in range(1024)},
    }
    assert (await one.end_of(most))["type"] == "done"
    over: Json = {
        "stop": ["s"] * 17,
        "stop_token_ids": list(range(1025)),
        "logit_bias": {str(number): 1 for number in range(1025)},
    }
    for field, value in over.items():
        error = error_of(await one.end_of({**most, field: value}))
        assert error["param"] == field
        with pytest.raises(InvalidRequest) as over_http:
            parse_request(CompletionRequest, json.dumps({"model": MODEL, **most, field: value}).encode(), {})
        assert error["message"] == over_http.value.message
    messages = [{"role": "user", "content": "a"}] * 10_001
    error = error_of(await one.end_of({"messages": messages}))
    assert (error["param"], "10000 messages at most" in str(error["message"])) == ("messages", True)
