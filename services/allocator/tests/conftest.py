from collections.abc import AsyncIterator

import pytest

from .allocator_harness import Pool, pool_in
from .bus_harness import Allocator, Client, allocator, client


@pytest.fixture
async def pool(clean_database: str) -> AsyncIterator[Pool]:
    """An empty pool."""
    async with pool_in(clean_database) as pool:
        yield pool


@pytest.fixture
async def asking(clean_queues: str) -> AsyncIterator[Client]:
    async with client(clean_queues) as found:
        yield found


@pytest.fixture
async def running(clean_queues: str, pool: Pool) -> AsyncIterator[Allocator]:
    async with allocator(clean_queues, pool.url) as found:
        yield found
