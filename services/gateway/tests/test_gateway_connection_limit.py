"""Limit of open connections per address."""

from gateway.web.client_address import parse_networks
from gateway.web.connection_limit import ConnectionLimit


def test_a_closed_connection_frees_a_place() -> None:
    limit = ConnectionLimit(2, [])
    first, second = limit.acquire("192.0.2.1"), limit.acquire("192.0.2.1")
    assert first is not None
    assert second is not None
    assert limit.acquire("192.0.2.1") is None
    assert limit.acquire("192.0.2.2") is not None
    first()
    assert limit.acquire("192.0.2.1") is not None
    assert limit.acquire("192.0.2.1") is None


def test_an_ipv6_network_counts_as_one_address_and_a_mapped_address_as_ipv4() -> None:
    limit = ConnectionLimit(1, [])
    assert limit.acquire("2001:db8::1") is not None
    assert limit.acquire("2001:db8::2") is None
    assert limit.acquire("2001:db8:0:1::1") is not None
    assert limit.acquire("192.0.2.1") is not None
    assert limit.acquire("::ffff:192.0.2.1") is None


def test_a_trusted_proxy_is_not_limited() -> None:
    limit = ConnectionLimit(1, parse_networks("192.0.2.0/24"))
    assert all(limit.acquire("192.0.2.1") is not None for _ in range(5))
    assert limit.acquire("198.51.100.1") is not None
    assert limit.acquire("198.51.100.1") is None


def test_an_address_without_connections_uses_no_memory() -> None:
    limit = ConnectionLimit(1, [])
    release = limit.acquire("192.0.2.1")
    assert release is not None
    release()
    assert limit._open == {}
