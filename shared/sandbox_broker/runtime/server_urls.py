"""Parser of AMQP_URL and DATABASE_URL. Both may name several servers.

AMQP_URL is a comma-separated list of complete URLs. DATABASE_URL has PostgreSQL's form: one URL with a
comma-separated list of hosts. No error text contains a part of the value, because an unescaped password may be
anywhere in it.
"""

import os
import re
from collections.abc import Collection, Iterator
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

AMQP_PORTS = {"amqp": 5672, "amqps": 5671}
POSTGRES_PORT = 5432
POSTGRES_SCHEMES = frozenset({"postgresql", "postgres"})

AMQP_EXAMPLE = "amqp://user:password@host:5672/"
POSTGRES_EXAMPLE = "postgresql://user:password@host:5432/database"

_AMQP_OPTIONS = frozenset(
    {"auth", "cafile", "capath", "certfile", "heartbeat", "keyfile", "name", "no_verify_ssl", "timeout"}
)
_POSTGRES_OPTIONS = frozenset(
    {
        "application_name",
        "gsslib",
        "krbsrvname",
        "options",
        "passfile",
        "password",
        "ssl_max_protocol_version",
        "ssl_min_protocol_version",
        "sslcert",
        "sslcrl",
        "sslkey",
        "sslmode",
        "sslnegotiation",
        "sslpassword",
        "sslrootcert",
        "target_session_attrs",
        "user",
    }
)
_SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")

_ESCAPE = (
    "percent-encode special characters in the user name, password and options "
    "(@ is %40, / is %2F, ? is %3F, # is %23)"
)
_NEXT_AMQP_URL = re.compile(r"\s*(?:,\s*)+(?=amqps?://)")


class HostPort(NamedTuple):
    """Address of a server. The host of a Unix socket is the path of its directory."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def split_amqp_urls(value: str) -> list[str]:
    """Return the URLs of an AMQP_URL. A comma inside a URL separates only if another URL follows it."""
    return _NEXT_AMQP_URL.split(value)


def check_amqp_options(url: str) -> None:
    """Raise ValueError for an option that the client does not support, or a value that it cannot use."""
    for name, value in _options(url):
        if name not in _AMQP_OPTIONS:
            raise ValueError(_unknown_option(name))
        if name in ("cafile", "certfile", "keyfile"):
            _check_file(name, value)
        elif name == "auth" and value.lower() not in ("plain", "amqplain", "external"):
            raise ValueError("auth must be plain, amqplain or external")
        elif name in ("heartbeat", "timeout") and not value.isdecimal():
            raise ValueError(f"{name} must be a number of seconds")


def check_database_options(url: str) -> None:
    """Raise ValueError for an option that the client does not support, or a value that it cannot use."""
    for name, value in _options(url):
        if name not in _POSTGRES_OPTIONS:
            raise ValueError(f"{_unknown_option(name)}, or set a server setting by options=-c%20name%3Dvalue")
        if name == "sslmode" and value not in _SSL_MODES:
            raise ValueError(f"sslmode must be {', '.join(_SSL_MODES[:-1])} or {_SSL_MODES[-1]}")
        if name == "target_session_attrs" and value not in ("any", "primary", "read-write"):
            raise ValueError(
                "target_session_attrs must be read-write or primary, because the broker needs the primary"
            )
        if name in ("sslcert", "sslkey", "sslrootcert", "sslcrl"):
            _check_file(name, value)


def split_database_url(url: str) -> list[str]:
    """Return a URL for each host of a DATABASE_URL, in its order. Raises ValueError if the URL is invalid."""
    scheme, user, hosts, rest = split_url(url, POSTGRES_SCHEMES, POSTGRES_EXAMPLE)
    for host in hosts.split(","):
        parse_host(host, POSTGRES_PORT, POSTGRES_EXAMPLE)
    return [f"{scheme}://{user}{host}{rest}" for host in hosts.split(",")]


def amqp_host(url: str) -> HostPort:
    """Return the server of a URL with one host. Raises ValueError if the URL is invalid."""
    scheme, _, hosts, _ = split_url(url, AMQP_PORTS, AMQP_EXAMPLE)
    if "," in hosts:
        raise ValueError("has several hosts in one URL; separate several complete URLs by commas")
    return parse_host(hosts, AMQP_PORTS[scheme], AMQP_EXAMPLE)


def database_host(url: str) -> HostPort:
    """Return the server of a URL with one host. Raises ValueError if the URL is invalid."""
    _, _, host, _ = split_url(url, POSTGRES_SCHEMES, POSTGRES_EXAMPLE)
    return parse_host(host, POSTGRES_PORT, POSTGRES_EXAMPLE)


def format_amqp_servers(value: str) -> str:
    """Return the servers of an AMQP_URL, without the credentials."""
    return ", ".join(str(amqp_host(url)) for url in split_amqp_urls(value))


def format_database(url: str) -> str:
    """Return the servers and the database name of a DATABASE_URL, without the credentials."""
    urls = split_database_url(url)
    return ",".join(str(database_host(one)) for one in urls) + urlsplit(urls[0]).path


def passwords(value: str) -> Iterator[str]:
    """Yield the passwords of an AMQP_URL, a DATABASE_URL or another URL, those in its options included. A password
    that equals its user name, as on a developer's machine, is left out."""
    for url in split_amqp_urls(value):
        authority, rest = _split_authority(url.partition("://")[2])
        name, _, password = authority.rpartition("@")[0].partition(":")
        if password and password != name:
            yield unquote(password)
        query = rest.partition("?")[2].partition("#")[0]
        yield from (text for name, text in parse_qsl(query) if "password" in name)


def split_url(url: str, schemes: Collection[str], example: str) -> tuple[str, str, str, str]:
    """Return the scheme, the user with "@", the host list, and the rest of a URL.

    Raises ValueError, also if a password seems to be unescaped: it would end the authority too early, and its rest
    would become a host name, a port or an option.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in schemes:
        raise ValueError(f"must be a URL like {example}")
    authority, rest = _split_authority(rest)
    user, at, hosts = authority.rpartition("@")
    # The parsers of the libraries show the user and the password in errors about other characters.
    has_odd_characters = re.search(r"[^!-~]", url) or re.search(r"[@\[\]]", user)
    if has_odd_characters or "@" in rest or "#" in rest:
        raise ValueError(_ESCAPE)
    return scheme, user + at, hosts, rest


def _split_authority(rest: str) -> tuple[str, str]:
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    return authority, rest[len(authority) :]


def parse_host(text: str, default_port: int, example: str) -> HostPort:
    """Return the host and the port. Raises ValueError."""
    matched = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([\w.%~-]+))(?::(\d{0,5}))?", text)
    host = unquote(matched[1] or matched[2]) if matched else ""
    port = int(matched[3] or default_port) if matched else 0
    # A name with an empty or a long part would fail in the resolver with an unusual error.
    labels = [] if host.startswith("/") else host.removesuffix(".").split(".")
    if not host or not all(0 < len(label) < 64 for label in labels) or not 1 <= port <= 65535:
        raise ValueError(f"must be a URL like {example}")
    return HostPort(host, port)


def _options(url: str) -> list[tuple[str, str]]:
    return parse_qsl(url.partition("?")[2], keep_blank_values=True)


def _unknown_option(name: str) -> str:
    shown = f"the option {name}" if re.fullmatch("[A-Za-z_]{2,40}", name) else "an option"
    return f"has {shown}, which the broker does not support; remove it"


def _check_file(name: str, value: str) -> None:
    if not os.access(value, os.R_OK):
        raise ValueError(f"{name} must be a readable file")
