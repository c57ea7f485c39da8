"""Limit of open connections per client address."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

from gateway.web.client_address import Network, build_address_resolver


class ConnectionLimit:
    """Counter of open connections per peer address.

    Trusted proxies are not limited, because all clients behind a proxy share its address. An IPv6 address counts as
    its /64.
    """

    def __init__(self, max_per_address: int, trusted: Sequence[Network]) -> None:
        self._max = max_per_address
        self._resolve = build_address_resolver(trusted)
        self._open: Counter[str] = Counter()

    def acquire(self, host: str) -> Callable[[], None] | None:
        """Count a connection, and return the function to call when it closes; None if `host` has too many."""
        resolved = self._resolve(host)
        address = host
        if resolved is not None:
            client, is_proxy = resolved
            if is_proxy:
                return _do_nothing
            address = client.counted
        if self._open[address] >= self._max:
            return None
        self._open[address] += 1
        return partial(self._release, address)

    def _release(self, address: str) -> None:
        self._open[address] -= 1
        if not self._open[address]:
            del self._open[address]


def _do_nothing() -> None:
    pass
