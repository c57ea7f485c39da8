"""Virtual hosts for tests, created and deleted in groups."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from devstack.infrastructure import Server
from devstack.temporary import create_vhosts


@dataclass(slots=True)
class _Group:
    resources: AsyncExitStack
    unused: list[str]
    in_use: int = 0


class VhostPool:
    """Pool of virtual hosts. Each is used once, and is empty at first.

    A group is deleted when all its virtual hosts have been used, because two starts of rabbitmqctl for each virtual
    host would take a tenth of the processor time of `make test`.
    """

    def __init__(self, server: Server, prefix: str, *, group_size: int) -> None:
        self._server = server
        self._prefix = prefix
        self._group_size = group_size
        self._groups: list[_Group] = []

    @asynccontextmanager
    async def use_vhost(self) -> AsyncIterator[str]:
        """Yield the URL of an empty virtual host."""
        group = next((group for group in self._groups if group.unused), None) or await self._add_group()
        url = group.unused.pop()
        group.in_use += 1
        try:
            yield url
        finally:
            group.in_use -= 1
            if not group.unused and not group.in_use:
                self._groups.remove(group)
                await group.resources.aclose()

    async def close(self) -> None:
        """Delete the remaining virtual hosts."""
        while self._groups:
            await self._groups.pop().resources.aclose()

    async def _add_group(self) -> _Group:
        resources = AsyncExitStack()
        urls = await resources.enter_async_context(
            create_vhosts(self._server, self._prefix, number=self._group_size)
        )
        group = _Group(resources, urls)
        self._groups.append(group)
        return group
