"""Address of the client of a request, also behind trusted proxies."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import NamedTuple

from starlette.types import Scope

Network = IPv4Network | IPv6Network

_IPV6_BITS = 64
"""Leading bits of an IPv6 address that identify a household or a server. The owner chooses the other bits."""


def parse_networks(listed: str) -> list[Network]:
    """Return the networks of a comma-separated list of addresses and networks. Raises ValueError."""
    return [ip_network(part.strip(), strict=False) for part in listed.split(",") if part.strip()]


class ClientAddress(NamedTuple):
    full: str
    """The address for logs: an IP address without a zone, or `unknown`."""
    counted: str
    """The address for limits: an IPv6 address as its /64."""


UNKNOWN = ClientAddress("unknown", "unknown")


def build_address_resolver(trusted: Sequence[Network]) -> Callable[[str], tuple[ClientAddress, bool] | None]:
    """Return a function that resolves the text of an address.

    Its result is the address and True for a trusted proxy, or None for an invalid address.
    """

    @lru_cache(maxsize=10_000)
    def resolve(written: str) -> tuple[ClientAddress, bool] | None:
        address = _parse(written)
        if address is None:
            return None
        full = counted = str(address)
        if isinstance(address, IPv6Address):
            full = str(IPv6Address(int(address)))  # without the zone, which may be any text
            counted = str(IPv6Network((int(address), _IPV6_BITS), strict=False))
        return ClientAddress(full, counted), any(address in network for network in trusted)

    return resolve


def build_client_address(trusted: Sequence[Network]) -> Callable[[Scope], ClientAddress]:
    """Return a function that finds the client address of a request.

    The client is the peer, unless the peer is a trusted proxy. A proxy appends the address of its own peer to
    X-Forwarded-For. The function therefore reads this field from the end and stops at the first address that is not
    a trusted proxy, because a client can invent the addresses before it.
    """
    resolve = build_address_resolver(trusted)

    def find_client(scope: Scope) -> ClientAddress:
        peer = scope["client"]
        result = resolve(peer[0]) if peer else None
        if result is None:
            return UNKNOWN
        client, is_proxy = result
        if is_proxy:
            for hop in reversed(_forwarded(scope)):
                result = resolve(hop)
                if result is None:
                    break
                client, is_proxy = result
                if not is_proxy:
                    break
        return client

    return find_client


def _forwarded(scope: Scope) -> list[str]:
    values = [value for name, value in scope["headers"] if name == b"x-forwarded-for"]
    return b",".join(values).decode("latin-1").split(",")


def _parse(written: str) -> IPv4Address | IPv6Address | None:
    """Return the address without the port that some proxies add; None for an invalid address."""
    host = written.strip()
    if host.startswith("["):
        host = host[1:].partition("]")[0]
    elif host.count(":") == 1:
        host = host.partition(":")[0]
    try:
        address = ip_address(host)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
