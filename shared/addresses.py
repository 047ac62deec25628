"""Addresses of servers: how others reach one of this machine, and what of a URL may be shown."""

import ipaddress
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

ELSEWHERE = ("192.0.2.1", 9)
"""An address that no network has (RFC 5737), behind the default route."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """A URL taken apart: `url` has no user and password any more; they are decoded, and None where it had none."""

    url: str
    user: str | None = None
    password: str | None = None

    def __repr__(self) -> str:
        return f"Credentials({self.url!r}, {self.user!r})"


def shown(url: str) -> str:
    """Returns a URL as it may be shown: without user, password and query, even if it cannot be parsed."""
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", url)
    start = scheme[0] if scheme else ""
    return start + url.removeprefix(start).rpartition("@")[2].partition("?")[0]


def resolved(url: str) -> str:
    """Returns the URL that a file contains, for one like `file:///run/secrets/nats-url`; any other URL itself.

    Raises:
        ValueError: the file cannot be read.
    """
    if not url.startswith("file://"):
        return url
    path = Path(unquote(url.removeprefix("file://")))
    try:
        return path.read_text().strip()
    except (OSError, ValueError) as error:
        raise ValueError(f"the URL cannot be read from {path} ({type(error).__name__})") from error


def credentials(url: str) -> Credentials:
    """Takes user and password out of a URL and decodes their percent-encoding.

    Raises:
        ValueError: the URL cannot be parsed. The text does not quote it, since it may contain a password.
    """
    try:
        parts = urlsplit(url if "://" in url else f"//{url}")
        parts.port  # noqa: B018 - raises where the port is no number
    except ValueError:
        parts = SplitResult("", "", "", "", "")
    if not parts.hostname or "@" in f"{parts.path}{parts.query}{parts.fragment}":
        raise ValueError(
            "the URL cannot be parsed: write nats://user:password@host:port, with special characters of user and "
            "password percent-encoded (/ as %2F, # as %23, @ as %40)"
        )
    if "@" not in parts.netloc:
        return Credentials(url)
    user = None if parts.username is None else unquote(parts.username)
    password = None if parts.password is None else unquote(parts.password)
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    return Credentials(bare if "://" in url else bare.removeprefix("//"), user, password)


def advertised(host: str) -> str:
    """Returns where others reach a server that listens on `host`: there, or for 0.0.0.0 at this machine's address.

    That is its address towards the default route, or where there is none, its name.
    """
    if not _is_wildcard(host):
        return host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(ELSEWHERE)  # sends nothing: it only looks up the route
        except OSError:
            return socket.gethostname()
        address: str = probe.getsockname()[0]
        return address


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False  # a name
