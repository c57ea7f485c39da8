from collections.abc import AsyncIterator

import pytest

from .allocator_harness import Pool, pool_in
from .bus_harness import Allocator, Client, connect_client, run_allocator


@pytest.fixture
async def pool(clean_database: str) -> AsyncIterator[Pool]:
    """An empty pool."""
    async with pool_in(clean_database) as pool:
        yield pool


@pytest.fixture
async def client(clean_queues: str) -> AsyncIterator[Client]:
    async with connect_client(clean_queues) as connected:
        yield connected


@pytest.fixture
async def running(clean_queues: str, pool: Pool) -> AsyncIterator[Allocator]:
    async with run_allocator(clean_queues, pool.url) as allocator:
        yield allocator
