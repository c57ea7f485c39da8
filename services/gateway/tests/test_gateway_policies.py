"""Tests of the admin routes for policies."""

import json
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from sandbox_broker.contract.commands import ApplyPolicies
from sandbox_broker.contract.policies import parse_policies

from .gateway_harness import ADMIN, TRACK, Gateway, detail, running

PATH = "/v1/admin/policies"
POLICIES: list[dict[str, Any]] = [
    {"name": "a", "match": {"track_name": "lab"}, "lease_hours": 8, "max_active": 50},
    {"name": "b", "stock": {"name_prefix": "lab-", "min": 1, "max": 2}},
]


@pytest.fixture(scope="module")
async def shared_gateway(amqp_url: str, database_url: str) -> AsyncIterator[Gateway]:
    async with running(amqp_url, database_url=database_url, admin_wait_sec=5) as gateway:
        yield gateway


@pytest.fixture
def gateway(shared_gateway: Gateway) -> Gateway:
    shared_gateway.reset()
    return shared_gateway


@pytest.mark.parametrize("dry_run", [False, True])
async def test_policies_are_sent_to_the_allocator(gateway: Gateway, dry_run: bool) -> None:
    parameters = {"dry_run": "true"} if dry_run else {}
    response = await gateway.client.put(PATH, headers=ADMIN, json={"policies": POLICIES}, params=parameters)
    assert (response.status_code, response.json()) == (
        200,
        {"changes": [{"name": "a", "change": "changed", "fields": ["lease_hours"]}]},
    )
    (command,) = gateway.maintenance.commands
    assert isinstance(command, ApplyPolicies)
    assert (command.policies, command.dry_run) == (parse_policies(POLICIES), dry_run)


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ({"policies": [{"lease_hours": "8"}]}, ["policies.0.name", "policies.0.lease_hours"]),
        ({"policies": [*POLICIES, POLICIES[0]]}, ["policies.2.name"]),
        ({"policies": {}}, ["policies"]),
        ({"policies": [], "dry_run": True}, ["body"]),
        ([], ["body"]),
        ("nonsense", ["body"]),
    ],
)
async def test_invalid_policies_are_refused_with_every_problem(
    gateway: Gateway, body: Any, fields: list[str]
) -> None:
    content = body if isinstance(body, str) else json.dumps(body)
    response = await gateway.client.put(PATH, headers=ADMIN, content=content)
    assert (response.status_code, detail(response)["code"]) == (400, "INVALID_POLICY")
    assert [field["field"] for field in detail(response)["fields"]] == fields
    assert all(field["problem"] for field in detail(response)["fields"])
    assert gateway.maintenance.commands == []


async def test_a_body_is_required(gateway: Gateway) -> None:
    response = await gateway.client.put(PATH, headers=ADMIN)
    assert (response.status_code, detail(response)["code"]) == (400, "INVALID_POLICY")


async def test_policies_are_returned_as_they_were_applied(gateway: Gateway, clean_database: str) -> None:
    assert (await gateway.client.get(PATH, headers=ADMIN)).json() == {"policies": []}
    connection = await asyncpg.connect(clean_database)
    for policy in reversed(POLICIES):
        await connection.execute(
            "INSERT INTO policies (name, document) VALUES ($1, $2)", policy["name"], json.dumps(policy)
        )
    await connection.close()
    response = await gateway.client.get(PATH, headers=ADMIN)
    assert (response.status_code, response.json()) == (200, {"policies": POLICIES})


async def test_policies_need_the_admin_token(gateway: Gateway) -> None:
    for method in ("GET", "PUT"):
        response = await gateway.client.request(method, PATH, headers=TRACK)
        assert (response.status_code, detail(response)["code"]) == (403, "FORBIDDEN")
