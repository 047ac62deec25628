"""NATS users with exactly the subjects that each role needs, as a configuration of nats-server.

    python -m pdserve.nats_accounts FOLDER --server HOST:PORT

writes `FOLDER/server/nats.conf` and, for each user, `FOLDER/<user>/url`, a URL with its password. Files that exist keep
their passwords; delete them for new ones. `pdserve up` does the same in memory for its own server.
"""

import argparse
import json
import os
import re
import secrets
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from shared.addresses import credentials
from shared.bus import subjects
from shared.bus.connection import inbox_prefix
from shared.errors import SettingsInvalid

PASSWORD_BYTES = 24
MAX_PAYLOAD = "8MB"
DEFAULT_CLIENT = "client"
USER_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
ANY = "*"
CONFIG = "nats.conf"
URL = "url"


@dataclass(frozen=True, slots=True)
class Permissions:
    """Where a user may publish and subscribe, its own reply inbox aside."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...] = ()


def _inbox_of(user: str) -> str:
    return f"{inbox_prefix(user)}.>"


def _verbs_of_instances(*verbs: str) -> tuple[str, ...]:
    return tuple(subjects.instance(ANY, verb) for verb in verbs)


def _verbs_of_gateways(*verbs: str) -> tuple[str, ...]:
    return tuple(subjects.gateway(ANY, verb) for verb in verbs)


CLIENT = Permissions(publish=(subjects.GENERATE, subjects.CANCEL))
"""A client of the request API. It reads nothing but its own inbox."""

SERVICES: dict[str, Permissions] = {
    # A gateway answers every client, for as long as a request lasts.
    "gateway": Permissions(
        publish=(
            *_verbs_of_instances("prefill", "decode", "start", "cancel", "ping"),
            *_verbs_of_gateways("ping"),
            f"{subjects.INBOX_PREFIX}>",
        ),
        subscribe=(subjects.GENERATE, subjects.CANCEL, subjects.CHANGED, subjects.gateway(ANY, ">")),
    ),
    "instance": Permissions(
        publish=(
            *_verbs_of_gateways("prefilled", "tokens", "moved", "failed", "slot_freed", "ping"),
            subjects.CHANGED,
            _inbox_of("gateway"),
            _inbox_of("controller"),
        ),
        subscribe=(subjects.instance(ANY, ">"),),
    ),
    # Its canary requests are those of a gateway; its health check asks for the status.
    "controller": Permissions(
        publish=(
            *_verbs_of_instances("assign", "prefill", "decode", "start", "cancel", "ping"),
            subjects.CHANGED,
            subjects.PROVISION,
            subjects.STATUS,
            _inbox_of("operator"),
            _inbox_of("controller"),
            _inbox_of("instance"),
        ),
        subscribe=(subjects.CHANGED, subjects.STATUS, subjects.admin(ANY), subjects.gateway(ANY, ">")),
    ),
    # `pdserve up` as the process that starts and ends instances.
    "launcher": Permissions(publish=(_inbox_of("controller"),), subscribe=(subjects.PROVISION,)),
    # Operators may send requests, too.
    "operator": Permissions(publish=(subjects.admin(ANY), subjects.STATUS, *CLIENT.publish)),
}


@dataclass(frozen=True, slots=True, repr=False)
class Accounts:
    """The users of a NATS server with their passwords."""

    passwords: dict[str, str]

    def url(self, server: str, user: str) -> str:
        """The URL with which `user` connects to `server`, a URL without user."""
        scheme, _, rest = server.partition("://")
        return f"{scheme}://{user}:{quote(self.passwords[user], safe='')}@{rest}"

    def config(self) -> str:
        """The configuration file of nats-server."""
        users = "\n".join(_user(name, password) for name, password in self.passwords.items())
        return f"max_payload: {MAX_PAYLOAD}\nauthorization {{\n  users = [\n{users}\n  ]\n}}\n"


@dataclass(frozen=True, slots=True, repr=False)
class NatsUrls:
    """With which URL each user connects; `clients` are those of the request API, by name."""

    _server: str
    _accounts: Accounts | None = None
    clients: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def given(cls, url: str) -> "NatsUrls":
        """A server that was not started here: everybody uses the one URL."""
        return cls(url)

    @classmethod
    def of_accounts(cls, accounts: Accounts, server: str) -> "NatsUrls":
        clients = {name: accounts.url(server, name) for name in accounts.passwords if name not in SERVICES}
        return cls(server, accounts, clients)

    def of(self, user: str) -> str:
        """The URL of a service or of operators."""
        return self._server if self._accounts is None else self._accounts.url(self._server, user)


OPEN_CONFIG = f"max_payload: {MAX_PAYLOAD}\n"
"""A server that lets everybody publish and subscribe everywhere."""


def new_accounts(clients: Iterable[str] = (DEFAULT_CLIENT,), known: dict[str, str] | None = None) -> Accounts:
    """Users for every role and for these clients of the request API, with random passwords unless they are known.

    Raises:
        SettingsInvalid: a client's name cannot be used.
    """
    names = [name.strip() for name in clients if name.strip()]
    for name in names:
        if not USER_NAME.fullmatch(name) or name in SERVICES:
            raise SettingsInvalid(
                f"{name!r} cannot be the name of a NATS user: use letters, digits, - and _, and none of "
                f"{', '.join(SERVICES)}."
            )
    passwords = {name: secrets.token_urlsafe(PASSWORD_BYTES) for name in (*SERVICES, *names)}
    return Accounts(passwords | {name: word for name, word in (known or {}).items() if name in passwords})


def permissions_of(user: str) -> Permissions:
    """What `user` may do, its inbox included."""
    found = SERVICES.get(user, CLIENT)
    return Permissions(found.publish, (*found.subscribe, _inbox_of(user)))


def write_private(path: Path, text: str) -> None:
    """Writes a file that only its owner may read, also while it is being written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)


def write_folder(folder: Path, server: str, clients: Iterable[str]) -> Accounts:
    """Writes the server's configuration and every user's URL; existing files keep their passwords."""
    accounts = new_accounts(clients, _known_passwords(folder))
    write_private(folder / "server" / CONFIG, accounts.config())
    for user in accounts.passwords:
        write_private(folder / user / URL, accounts.url(server, user) + "\n")
    return accounts


def _known_passwords(folder: Path) -> dict[str, str]:
    found = {}
    for path in folder.glob(f"*/{URL}"):
        try:
            known = credentials(path.read_text().strip())
        except ValueError:
            continue
        if known.password and known.user == path.parent.name:
            found[known.user] = known.password
    return found


def _user(name: str, password: str) -> str:
    may = permissions_of(name)
    permissions = f"publish: {_list(may.publish)}, subscribe: {_list(may.subscribe)}"
    return f"    {{user: {_quoted(name)}, password: {_quoted(password)}, permissions: {{{permissions}}}}}"


def _quoted(text: str) -> str:
    """A string of nats-server's configuration, which knows JSON's escapes for quotes and backslashes."""
    return json.dumps(text, ensure_ascii=False)


def _list(names: tuple[str, ...]) -> str:
    return f"{{allow: [{', '.join(map(_quoted, names))}]}}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pdserve.nats_accounts", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--server", default="127.0.0.1:4222", metavar="HOST:PORT", help="where users reach the server")
    parser.add_argument(
        "--client", action="append", metavar="NAME", help=f"a client of the request API (default {DEFAULT_CLIENT})"
    )
    arguments = parser.parse_args()
    try:
        accounts = write_folder(arguments.folder, f"nats://{arguments.server}", arguments.client or [DEFAULT_CLIENT])
    except (SettingsInvalid, OSError) as error:
        sys.exit(f"nats_accounts: {error}")
    print(f"wrote {arguments.folder}/server/{CONFIG} and the URLs of {', '.join(accounts.passwords)}")


if __name__ == "__main__":
    main()
