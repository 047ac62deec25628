"""The NATS accounts on a real server: what each may do, and above all what a client of the request API may not."""

import json
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from pdserve import nats_accounts
from pdserve.nats_accounts import SERVICES, Accounts, new_accounts, write_folder
from pdserve.servers import Servers
from shared.addresses import credentials
from shared.bus import connection, subjects
from shared.bus.connection import Incoming
from shared.errors import BusUnavailable, NoResponders, SettingsInvalid
from shared.messages.serving import Ping, Pong
from tests.bus.raw_client import RawClient, pub
from tests.harness import eventually

CLIENTS = ("alice", "bob")
FORBIDDEN = (
    *(subjects.instance("i", verb) for verb in ("prefill", "decode", "start", "cancel", "ping", "assign", "gone.g")),
    *(
        subjects.gateway("g", verb)
        for verb in ("prefilled", "tokens", "moved", "failed", "slot_freed", "ping", "gone.r.0")
    ),
    *(subjects.admin(verb) for verb in ("flip", "drain", "control", "upgrade", "pause", "resume", "abort")),
    subjects.STATUS,
    subjects.CHANGED,
    subjects.PROVISION,
    "_INBOX.alice.x",
    "_INBOX.bob.x",
    "_INBOX.gateway.x",
    "_INBOX.operator.x",
    "_INBOX.x",
    "pdserve.v1.anything",
    "anything",
    "$SYS.REQ.SERVER.PING",
)
EAVESDROPPED = (
    ">",
    "*.>",
    "_INBOX.>",
    "_INBOX.*.>",
    "_INBOX.*.*",
    "_INBOX.bob.>",
    "_INBOX.gateway.>",
    "_INBOX.operator.>",
    "pdserve.>",
    "pdserve.v1.>",
    subjects.GENERATE,
    subjects.CANCEL,
    subjects.CHANGED,
    subjects.STATUS,
    subjects.admin("*"),
    subjects.instance("*", ">"),
    subjects.gateway("*", ">"),
    subjects.gateway("g", "tokens"),
    "$SYS.>",
)


class Guarded:
    """A server with accounts."""

    def __init__(self, accounts: Accounts, server: str) -> None:
        self.accounts = accounts
        self.server = server

    def url(self, user: str) -> str:
        return self.accounts.url(self.server, user)

    def raw(self, user: str) -> RawClient:
        return RawClient(self.server, user, self.accounts.passwords[user])


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    accounts = new_accounts(CLIENTS)
    servers = Servers(tmp_path_factory.mktemp("guarded"))
    try:
        yield Guarded(accounts, servers.start_nats(accounts=accounts))
    finally:
        servers.stop()


@pytest.mark.parametrize("subject", FORBIDDEN)
def test_a_client_may_not_publish_what_services_and_operators_do(guarded: Guarded, subject: str) -> None:
    with guarded.raw("alice") as alice:
        said = alice.send(pub(subject.encode(), b"{}"))
        assert b"-ERR 'Permissions Violation for Publish to \"" + subject.encode() in said


@pytest.mark.parametrize("subject", [subjects.GENERATE, subjects.CANCEL])
def test_a_client_may_send_requests_and_cancel_them(guarded: Guarded, subject: str) -> None:
    with guarded.raw("alice") as alice:
        assert alice.send(pub(subject.encode(), b"{}", b"_INBOX.alice.1")) in (
            b"",
            b"HMSG _INBOX.alice.1 1 16 16\r\nNATS/1.0 503\r\n\r\n\r\n",
        )


def test_a_client_that_subscribes_to_everything_sees_nothing_of_others(guarded: Guarded) -> None:
    """Neither requests, nor answers, nor tokens, keys and orders: whatever the server says to a subscription."""
    with (
        guarded.raw("alice") as alice,
        guarded.raw("bob") as bob,
        guarded.raw("gateway") as gateway,
        guarded.raw("instance") as instance,
        guarded.raw("controller") as controller,
        guarded.raw("operator") as operator,
    ):
        for number, subject in enumerate(EAVESDROPPED):
            for queue in ("", "gateways"):
                alice.send(f"SUB {subject} {queue} {number}{1 if queue else 0}\r\n".encode())
        bob.send(b"SUB _INBOX.bob.1 1\r\n")
        gateway.send(f"SUB {subjects.GENERATE} gateways 1\r\n".encode())
        heard = dict.fromkeys((alice, bob, gateway, instance, controller, operator), b"")
        for sender, subject in (
            (bob, subjects.GENERATE),
            (bob, subjects.CANCEL),
            (gateway, subjects.instance("i", "start")),
            (gateway, "_INBOX.bob.1"),
            (gateway, "_INBOX.x"),
            (instance, subjects.gateway("g", "tokens")),
            (instance, "_INBOX.gateway.1"),
            (instance, subjects.CHANGED),
            (controller, subjects.instance("i", "assign")),
            (controller, "_INBOX.operator.1"),
            (operator, subjects.admin("flip")),
            (operator, subjects.STATUS),
        ):
            said = sender.send(pub(subject.encode(), b"secret", b"_INBOX.bob.1"))
            assert b"-ERR" not in said
            heard[sender] += said
            for one in heard:
                heard[one] += one.send(b"")
        assert heard[alice] == b""
        assert b"secret" in heard[bob], "bob has his answer"
        assert b"secret" in heard[gateway], "and the gateway the request, which no queue of alice takes away"


def test_a_client_hears_its_own_inbox(guarded: Guarded) -> None:
    with guarded.raw("alice") as alice, guarded.raw("gateway") as gateway:
        assert b"-ERR" not in alice.send(b"SUB _INBOX.alice.1.> 1\r\n")
        gateway.send(pub(b"_INBOX.alice.1.2", b"answer"))
        assert b"answer" in alice.send(b"")


@pytest.mark.parametrize("user", ["", "nobody"])
def test_without_a_known_user_nobody_connects(guarded: Guarded, user: str) -> None:
    with RawClient(guarded.server, user, "x") as raw:
        assert b"Authorization Violation" in raw.said


async def test_a_wrong_password_is_named_and_not_shown(guarded: Guarded) -> None:
    url = guarded.url("alice").replace(guarded.accounts.passwords["alice"], "wrong-secret")
    with pytest.raises(BusUnavailable, match="with a user and password") as caught:
        async with connection.connect(url, name="x", timeout_s=0.5):
            pass
    assert "wrong-secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("sender", "subject", "receiver", "subscription"),
    [
        ("gateway", subjects.instance("i", "ping"), "instance", subjects.instance("i", ">")),
        ("instance", subjects.gateway("g", "ping"), "gateway", subjects.gateway("g", ">")),
        ("gateway", subjects.gateway("g", "ping"), "gateway", subjects.gateway("g", ">")),
        ("instance", subjects.gateway("c", "ping"), "controller", subjects.gateway("c", ">")),
        ("controller", subjects.instance("i", "assign"), "instance", subjects.instance("i", ">")),
        ("controller", subjects.instance("i", "prefill"), "instance", subjects.instance("i", ">")),
        ("controller", subjects.PROVISION, "launcher", subjects.PROVISION),
        ("controller", subjects.STATUS, "controller", subjects.STATUS),
        ("operator", subjects.STATUS, "controller", subjects.STATUS),
        ("operator", subjects.admin("flip"), "controller", subjects.admin("*")),
        ("operator", subjects.GENERATE, "gateway", subjects.GENERATE),
        ("alice", subjects.GENERATE, "gateway", subjects.GENERATE),
        ("bob", subjects.CANCEL, "gateway", subjects.CANCEL),
    ],
)
async def test_every_question_of_the_protocol_is_asked_and_answered(
    guarded: Guarded, sender: str, subject: str, receiver: str, subscription: str
) -> None:
    async def answer(incoming: Incoming) -> None:
        await incoming.respond(Pong(unknown=incoming.parse(Ping).request_ids))

    async with (
        connection.connect(guarded.url(sender), name="a", timeout_s=5.0) as asking,
        connection.connect(guarded.url(receiver), name="b", timeout_s=5.0) as answering,
    ):
        with pytest.raises(NoResponders):
            await asking.request(subject, Ping(sender_id="x"), Pong, timeout_s=5.0)
        end = await answering.subscribe(subscription, answer)
        reply = await asking.request(subject, Ping(sender_id="x", request_ids=["r"]), Pong, timeout_s=5.0)
        assert reply.unknown == ["r"]
        await end()


@pytest.mark.parametrize(
    ("sender", "subject", "report"),
    [
        ("gateway", "_INBOX.alice.gone", subjects.gateway("g", subjects.gone("r.0"))),
        ("instance", subjects.gateway("gone", "tokens"), subjects.instance("i", subjects.gone("gone"))),
    ],
)
async def test_a_sender_learns_that_nobody_is_subscribed(
    guarded: Guarded, sender: str, subject: str, report: str
) -> None:
    reports: list[str] = []

    async def on_report(incoming: Incoming) -> None:
        if incoming.is_no_responders:
            reports.append(incoming.subject)

    async with connection.connect(guarded.url(sender), name="a", timeout_s=5.0) as bus:
        await bus.subscribe(report, on_report)
        await bus.publish(subject, Ping(sender_id="x"), no_responders_to=report)
        await eventually(lambda: reports == [report])


@pytest.mark.parametrize("user", ["gateway", "instance", "launcher", "controller"])
def test_a_service_may_not_do_what_operators_do(guarded: Guarded, user: str) -> None:
    with guarded.raw(user) as raw:
        assert b"Permissions Violation" in raw.send(pub(subjects.admin("upgrade").encode(), b"{}"))


def test_files_are_private_and_keep_their_passwords(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pdserve.nats_accounts", str(tmp_path), "--server", "nats:4222", "--client", "eve"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    urls = {path.parent.name: path.read_text().strip() for path in tmp_path.glob("*/url")}
    assert urls.keys() == {*SERVICES, "eve"}
    config = (tmp_path / "server" / "nats.conf").read_text()
    for user, url in urls.items():
        address = credentials(url)
        assert (address.url, address.user) == ("nats://nats:4222", user)
        assert address.password
        assert f'{{user: "{user}", password: "{address.password}"' in config
        assert address.password not in said.stdout + said.stderr
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = write_folder(tmp_path, "nats://nats:4222", ["eve", "frank"])
    assert {user: again.url("nats://nats:4222", user) for user in urls} == urls


@pytest.mark.parametrize("name", ["gateway", "a.b", "a b", "*", 'a"', "x" * 65])
def test_a_name_that_cannot_be_a_user_is_rejected(name: str) -> None:
    with pytest.raises(SettingsInvalid, match="cannot be the name of a NATS user"):
        new_accounts([name])


def test_nothing_shows_passwords_by_chance() -> None:
    accounts = new_accounts()
    for password in accounts.passwords.values():
        assert password not in repr(accounts)
        assert password not in repr(nats_accounts.NatsUrls.of_accounts(accounts, "nats://x:1"))
    assert json.dumps(sorted(accounts.passwords)) == json.dumps(sorted([*SERVICES, "client"]))


@pytest.mark.parametrize("password", ["p/w#1", "a@b:c?d", 'quote" and \\', "%41", "$x", "é"])
async def test_a_password_of_any_characters_logs_in(servers: Servers, password: str) -> None:
    accounts = Accounts({"gateway": password})
    url = accounts.url(servers.start_nats(accounts=accounts), "gateway")
    async with connection.connect(url, name="x", timeout_s=5.0) as bus:
        assert bus.connected


async def test_a_url_with_a_password_that_cannot_be_parsed_is_not_shown(servers: Servers) -> None:
    server = servers.start_nats()
    with pytest.raises(BusUnavailable, match="percent-encoded") as caught:
        async with connection.connect(server.replace("//", "//u:p/secret#1@"), name="x", timeout_s=5.0):
            pass
    assert "secret" not in str(caught.value)
    assert "p/" not in str(caught.value)


def test_a_server_whose_port_is_taken_is_tried_again(servers: Servers) -> None:
    """`pdserve up` must not end because of it."""
    accounts = new_accounts()
    server = servers.start_nats(accounts=accounts)
    servers.processes["nats"].kill()
    servers.processes["nats"].wait()
    with socket.create_server(("127.0.0.1", urlsplit(server).port or 0)):
        for _ in range(2):
            [said] = servers.restart_dead()
            assert "tried again" in said
    assert servers.restart_dead() == ["nats died: started again"]
    assert servers.restart_dead() == []
    with RawClient(server, "client", accounts.passwords["client"]) as client:
        assert b"-ERR" not in client.said
