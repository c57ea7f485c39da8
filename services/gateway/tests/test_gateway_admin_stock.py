"""Tests of the admin routes for the stock."""

import json
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from sandbox_broker.contract.commands import ResumeStock
from sandbox_broker.contract.replies import Recorded, Refused, refuse

from .gateway_harness import ADMIN, Gateway, detail, running

PATH = "/v1/admin/stock"


@pytest.fixture(scope="module")
async def shared_gateway(amqp_url: str, database_url: str) -> AsyncIterator[Gateway]:
    async with running(amqp_url, database_url=database_url, admin_wait_sec=5) as gateway:
        yield gateway


@pytest.fixture
async def database(clean_database: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(clean_database)
    yield connection
    await connection.close()


@pytest.fixture
def gateway(shared_gateway: Gateway, database: asyncpg.Connection) -> Gateway:
    shared_gateway.reset()
    return shared_gateway


async def add_rule(database: asyncpg.Connection, name_prefix: str, min_: int, max_: int) -> None:
    stock = {"name_prefix": name_prefix, "min": min_, "max": max_}
    document = json.dumps({"name": f"policy-{name_prefix}", "stock": stock})
    await database.execute("INSERT INTO policies (name, document) VALUES ($1, $2)", name_prefix, document)


async def get(gateway: Gateway, path: str = "", **parameters: Any) -> Any:
    response = await gateway.client.get(f"{PATH}{path}", params=parameters, headers=ADMIN)
    assert response.status_code == 200, response.text
    return response.json()


async def test_without_rules_the_stock_is_empty(gateway: Gateway) -> None:
    assert await get(gateway) == {"stock": [], "asked_at": None}
    assert await get(gateway, "/creations") == {"creations": [], "count": 0, "cursor": None}


async def test_the_stock_has_counts_intents_and_the_reason_of_a_stop(
    gateway: Gateway, database: asyncpg.Connection
) -> None:
    await add_rule(database, "lab-", 5, 9)
    await add_rule(database, "empty-", 0, 9)
    await database.execute(
        """
        INSERT INTO sandboxes (sandbox_id, external_id, name, status)
            SELECT n::text, 'a-' || n, 'lab-' || n, CASE WHEN n < 3 THEN 'available' ELSE 'allocated' END
            FROM generate_series(1, 4) n;
        INSERT INTO creations (name, name_prefix, granted_at, claim, attempts, error)
            VALUES ('lab-7', 'lab-', now() - interval '1 minute', gen_random_uuid(), 1, 'CSP said 503');
        INSERT INTO stock_prefixes (name_prefix, next_number, failures, last_error, last_error_at, stopped_at,
                stop_cause, stop_reason)
            VALUES ('lab-', 8, 1, 'quota', to_timestamp(1000), to_timestamp(2000), 'refused', 'quota');
        UPDATE creation_duty SET claimed_at = to_timestamp(3000)
        """
    )
    body = await get(gateway)
    assert body["asked_at"] == 3000
    empty, lab = body["stock"]
    assert (empty["name_prefix"], empty["state"], empty["intents"]) == ("empty-", "full", [])
    (intent,) = lab.pop("intents")
    assert 60 <= intent.pop("age_sec") < 3600
    assert intent == {
        "creation_id": intent["creation_id"],
        "name": "lab-7",
        "state": "pending",
        "claimed": True,
        "attempts": 1,
        "error": "CSP said 503",
    }
    assert lab == {
        "name_prefix": "lab-",
        "policy": "lab-",
        "state": "stopped",
        "min": 5,
        "max": 9,
        "target": 5,
        "available": 2,
        "allocated": 2,
        "creating": 1,
        "waiting": 0,
        "exhaustion_sec": None,
        "recent_leases_per_hour": 0,
        "usual_leases_per_hour": 0,
        "creation": {"count": 0, "p50_sec": None, "p90_sec": None},
        "failures": 1,
        "last_error": "quota",
        "last_error_at": 1000,
        "stopped_at": 2000,
        "stop_cause": "refused",
        "stop_reason": "quota",
    }


@pytest.mark.parametrize(
    ("available", "creating", "state"), [(1, 0, "filling"), (0, 2, "filling"), (2, 0, "full"), (0, 0, "limited")]
)
async def test_the_state_tells_whether_the_stock_fills(
    gateway: Gateway, database: asyncpg.Connection, available: int, creating: int, state: str
) -> None:
    await add_rule(database, "lab-", 2, 2)
    await database.execute(
        """
        INSERT INTO sandboxes (sandbox_id, external_id, name, status)
        SELECT n::text, 'a-' || n, 'lab-' || n, CASE WHEN n <= $1 THEN 'available' ELSE 'allocated' END
        FROM generate_series(1, $2::int) n
        """,
        available,
        2 if state == "limited" else available,
    )
    await database.execute(
        "INSERT INTO creations (name, name_prefix) SELECT 'lab-9' || n, 'lab-' FROM generate_series(1, $1::int) n",
        creating,
    )
    (level,) = (await get(gateway))["stock"]
    assert level["state"] == state


async def test_creations_are_listed_newest_first_with_their_history(
    gateway: Gateway, database: asyncpg.Connection
) -> None:
    history = json.dumps([{"at": 1000, "what": "granted"}, {"at": 1001, "what": "failed", "error": "CSP said 503"}])
    await database.execute(
        "INSERT INTO creations (name, name_prefix, history) "
        "SELECT 'lab-' || n, 'lab-', $1::jsonb FROM generate_series(1, 5) n",
        history,
    )
    await database.execute("INSERT INTO creations (name, name_prefix) VALUES ('other-1', 'other-')")
    page = await get(gateway, "/creations", name_prefix="lab-", limit=3)
    assert [entry["name"] for entry in page["creations"]] == ["lab-5", "lab-4", "lab-3"]
    assert page["creations"][0]["history"][1] == {"at": 1001, "what": "failed", "error": "CSP said 503"}
    last = await get(gateway, "/creations", name_prefix="lab-", limit=3, cursor=page["cursor"])
    assert ([entry["name"] for entry in last["creations"]], last["cursor"]) == (["lab-2", "lab-1"], None)
    assert (await get(gateway, "/creations"))["count"] == 6
    response = await gateway.client.get(f"{PATH}/creations", params={"cursor": page["cursor"]}, headers=ADMIN)
    assert detail(response)["code"] == "INVALID_CURSOR"


async def test_a_stopped_prefix_is_resumed(gateway: Gateway) -> None:
    async def answer(_: object) -> Recorded:
        return Recorded(changed=True)

    gateway.maintenance.answer = answer
    response = await gateway.client.post(f"{PATH}/resume", params={"name_prefix": "lab-"}, headers=ADMIN)
    assert (response.status_code, response.json()) == (200, {"name_prefix": "lab-", "changed": True})
    (command,) = gateway.maintenance.commands
    assert isinstance(command, ResumeStock)
    assert command.name_prefix == "lab-"


async def test_an_unknown_prefix_is_refused_with_the_next_action(gateway: Gateway) -> None:
    async def answer(_: object) -> Refused:
        return refuse("STOCK_RULE_NOT_FOUND", name_prefix="lab-")

    gateway.maintenance.answer = answer
    response = await gateway.client.post(f"{PATH}/resume", params={"name_prefix": "lab-"}, headers=ADMIN)
    assert response.status_code == 404
    assert "'lab-'. GET /v1/admin/stock lists the rules." in detail(response)["message"]


@pytest.mark.parametrize(
    "parameters", [{}, {"name_prefix": ""}, {"name_prefix": "läb"}, {"name_prefix": "x" * 129}]
)
async def test_an_invalid_prefix_is_refused(gateway: Gateway, parameters: dict[str, str]) -> None:
    response = await gateway.client.post(f"{PATH}/resume", params=parameters, headers=ADMIN)
    assert (response.status_code, detail(response)["code"]) == (400, "INVALID_REQUEST")
