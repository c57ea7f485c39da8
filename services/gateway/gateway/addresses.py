"""Whose request it is: the address of the client, also behind proxies that we trust."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from starlette.types import Scope

Network = IPv4Network | IPv6Network

_HOME = 64
"""The part of an IPv6 address that names a household or a server; the rest its owner chooses freely."""


def networks(listed: str) -> list[Network]:
    """From a comma-separated list of addresses and networks. Raises ValueError."""
    return [ip_network(part.strip(), strict=False) for part in listed.split(",") if part.strip()]


def client_address(trusted: Sequence[Network]) -> Callable[[Scope], str]:
    """A function that tells the client of a request: the peer, unless that is a trusted proxy. What a proxy has
    seen, it adds at the end of X-Forwarded-For; what stands before the first proxy that is not ours may be made
    up. An IPv6 address stands for its /64."""

    @lru_cache(maxsize=10_000)
    def known(given: str) -> tuple[str, bool] | None:
        """The address as it is counted, and whether it is a proxy of ours; None if it is none."""
        address = _parse(given)
        if address is None:
            return None
        whole = IPv6Network((int(address), _HOME), strict=False) if isinstance(address, IPv6Address) else address
        return str(whole), any(address in network for network in trusted)

    def client(scope: Scope) -> str:
        peer = scope["client"]
        found = known(peer[0]) if peer else None
        if found is None:
            return "unknown"
        counted, is_proxy = found
        if is_proxy:
            for hop in reversed(_forwarded(scope)):
                found = known(hop)
                if found is None:
                    break
                counted, is_proxy = found
                if not is_proxy:
                    break
        return counted

    return client


def _forwarded(scope: Scope) -> list[str]:
    values = [value for name, value in scope["headers"] if name == b"x-forwarded-for"]
    return b",".join(values).decode("latin-1").split(",")


def _parse(given: str) -> IPv4Address | IPv6Address | None:
    """Some proxies add the port."""
    host = given.strip()
    if host.startswith("["):
        host = host[1:].partition("]")[0]
    elif host.count(":") == 1:
        host = host.partition(":")[0]
    try:
        address = ip_address(host)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
