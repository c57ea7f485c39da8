from collections.abc import AsyncIterator

import pytest

from devstack.conditions import wait_until
from devstack.testing import NewDatabase, NewVhost
from tests.integration import hypothesis_settings
from tests.integration.stack import Stack, run_stack


def pytest_report_header() -> str | None:
    cases, seed = hypothesis_settings.RANDOM_CASES, hypothesis_settings.SEED
    return f"search: {cases} random cases, SEARCH_SEED={seed}" if cases else None


@pytest.fixture(scope="package")
async def whole_stack(new_database: NewDatabase, new_vhost: NewVhost) -> AsyncIterator[Stack]:
    settings = {"INVARIANT_CHECK_SEC": "5"}
    async with (
        new_database() as database_url,
        new_vhost() as amqp_url,
        run_stack(database_url, amqp_url, settings=settings) as stack,
    ):
        yield stack


@pytest.fixture
async def stack(whole_stack: Stack) -> AsyncIterator[Stack]:
    """Running broker with 50 available sandboxes. Then checks the invariants and waits for deletions."""
    await whole_stack.fill(50)
    yield whole_stack
    await whole_stack.assert_sound()
    await wait_until(whole_stack.nothing_pending)
