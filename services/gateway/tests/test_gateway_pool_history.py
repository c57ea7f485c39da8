"""The pool over time: the latest sample of each step."""

from collections.abc import AsyncIterator

import asyncpg
import pytest

from .gateway_harness import ADMIN, Gateway, running

PATH = "/v1/admin/stats/history"


@pytest.fixture
async def gateway(amqp_url: str, clean_database: str) -> AsyncIterator[Gateway]:
    async with running(amqp_url, database_url=clean_database, far_sides=False) as gateway:
        yield gateway


@pytest.mark.parametrize(("hours", "step_sec", "samples"), [(1, 30, 119), (24, 300, 288), (168, 2040, 296)])
async def test_a_longer_period_has_longer_steps(
    gateway: Gateway, clean_database: str, hours: int, step_sec: int, samples: int
) -> None:
    connection = await asyncpg.connect(clean_database)
    await connection.execute(
        "INSERT INTO pool_samples SELECT at, extract(epoch FROM at)::bigint, 1, 2, 3, 4, 5 FROM "
        "generate_series(date_bin('30 seconds', now() - interval '8 days', 'epoch'), now(), '30 seconds') at"
    )
    await connection.close()
    body = (await gateway.client.get(PATH, params={"hours": hours}, headers=ADMIN)).json()
    assert body["step_sec"] == step_sec
    assert samples <= len(body["samples"]) <= samples + 2
    times = [sample["at"] for sample in body["samples"]]
    assert times == sorted(times)
    assert len({at // step_sec for at in times}) == len(times)
    assert all(sample["available"] == sample["at"] for sample in body["samples"])
    assert body["samples"][-1] == {
        "at": times[-1],
        "available": times[-1],
        "allocated": 1,
        "pending_deletion": 2,
        "deletion_failed": 3,
        "stale": 4,
        "waiting": 5,
    }


async def test_a_young_broker_has_short_steps_in_a_long_period(gateway: Gateway, clean_database: str) -> None:
    connection = await asyncpg.connect(clean_database)
    await connection.execute(
        "INSERT INTO pool_samples SELECT at, 1, 1, 2, 3, 4, 5 FROM "
        "generate_series(now() - interval '5 minutes', now() - interval '30 seconds', '30 seconds') at"
    )
    await connection.close()
    body = (await gateway.client.get(PATH, params={"hours": 24}, headers=ADMIN)).json()
    assert (body["step_sec"], len(body["samples"])) == (30, 10)


@pytest.mark.parametrize("hours", [0, 169])
async def test_other_periods_are_refused(gateway: Gateway, hours: int) -> None:
    response = await gateway.client.get(PATH, params={"hours": hours}, headers=ADMIN)
    assert response.status_code == 400
