from collections.abc import AsyncIterator

import pytest

from .allocator_harness import Pool, pool_in


@pytest.fixture
async def pool(clean_database: str) -> AsyncIterator[Pool]:
    """An empty pool."""
    async with pool_in(clean_database) as pool:
        yield pool
