"""Proxy and trusted authorities of outgoing HTTP calls, from the usual environment variables.

The rules follow curl and Go: lower-case names win, NO_PROXY lists domains, addresses and networks, and loopback is
never called through a proxy. The HTTP client of CSP has its own rules, fails on networks in NO_PROXY, and shows
errors in the middle of a traceback.
"""

import contextlib
import ipaddress
import os
import re
import ssl
from collections.abc import Mapping
from urllib.parse import urlsplit

_EXAMPLE = "http://proxy.example.com:3128"


def is_loopback(host: str) -> bool:
    """Return whether the host of a URL is this machine, by its name or its address."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return address.is_loopback or (mapped is not None and mapped.is_loopback)


def find_proxy(url: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the proxy for `url`, or None for a direct connection.

    Raises ValueError with the name of the variable and without its value, if the proxy for this URL is invalid.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if is_loopback(host) or _is_excluded(host, parts.port, _read(environ, "no_proxy")[1]):
        return None
    for variable in (f"{parts.scheme}_proxy", "all_proxy"):
        name, value = _read(environ, variable)
        if value:
            return _normalize(name, value)
    return None


def check_trust(environ: Mapping[str, str] = os.environ) -> None:
    """Raise ValueError with the name of the variable, if SSL_CERT_FILE or SSL_CERT_DIR cannot be used."""
    file, directory = environ.get("SSL_CERT_FILE"), environ.get("SSL_CERT_DIR")
    if file:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=file)
        except (OSError, ValueError):  # a file without a certificate is an SSLError, a kind of OSError
            raise ValueError("SSL_CERT_FILE: is no readable file with PEM certificates") from None
    elif directory and not all(os.path.isdir(path) for path in directory.split(os.pathsep)):
        raise ValueError("SSL_CERT_DIR: is no directory")


def _read(environ: Mapping[str, str], variable: str) -> tuple[str, str]:
    """Return the name that is set and its value. The value is empty if none is set."""
    for name in (variable, variable.upper()):
        if value := environ.get(name, "").strip():
            return name, value
    return variable, ""


def _normalize(name: str, value: str) -> str:
    url = value if "://" in value else f"http://{value}"
    authority = re.split("[/?#]", url.partition("://")[2], maxsplit=1)[0]
    if url.partition("://")[0].lower().startswith("socks"):
        raise ValueError(f"{name}: is a SOCKS proxy, which is not supported; name an HTTP proxy like {_EXAMPLE}")
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        valid = False
    if not valid or authority.count("@") > 1 or "@" in url.partition(authority)[2] or re.search(r"\s", url):
        raise ValueError(
            f"{name}: must be a URL like {_EXAMPLE}, with percent-encoded special characters in the user name and "
            "password"
        )
    return f"{parts.scheme}://{authority}"


def _is_excluded(host: str, port: int | None, no_proxy: str) -> bool:
    return any(_matches(host, port, entry.lower()) for entry in re.split(r"[\s,]+", no_proxy) if entry)


def _matches(host: str, port: int | None, entry: str) -> bool:
    """Return whether an entry of NO_PROXY names the host: a network, or an address or a domain with its subdomains,
    both with an optional port."""
    if entry == "*":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry.strip("[]"), strict=False)
    named = re.fullmatch(r"(?:\[([^\]]*)\]|([^:]*))(?::(\d+))?", entry)
    if named is None or (named[3] and int(named[3]) != port):
        return False
    name = (named[1] or named[2] or "").removeprefix("*").lstrip(".")
    return bool(name) and (host == name or host.endswith(f".{name}"))
