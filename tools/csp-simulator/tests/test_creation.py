"""Creation of accounts and their look-up by name."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from csp_simulator.accounts import AccountStore
from csp_simulator.app import create_app

from .simulator_harness import (
    connect_in_process,
    fetch_calls,
    fetch_records,
    fetch_sandboxes,
    get_account_path,
    set_behaviour,
)

ACCOUNTS = "/v2/sandbox/accounts"


@pytest.fixture
async def csp() -> AsyncIterator[httpx.AsyncClient]:
    async with connect_in_process(create_app(accounts=1, seed=1)) as client:
        yield client


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def list_states(accounts: AccountStore) -> list[tuple[str, str]]:
    """Return name and state of the listed sandboxes without the decoys."""
    records = json.loads(accounts.build_listing())["results"]
    return [(r["name"], r["state"]) for r in records if r["name"].startswith("lab-")]


async def find(csp: httpx.AsyncClient, name: str, **query: str) -> list[Any]:
    quoted = name.replace('"', '""')
    response = await csp.get(ACCOUNTS, params={"_filter": f'name=="{quoted}"', **query})
    found: list[Any] = response.raise_for_status().json()["results"]
    return found


async def test_created_account_is_listed_found_and_deleted(csp: httpx.AsyncClient) -> None:
    admin_user = {"email": "a@example.com", "name": "A"}
    body = {"name": 'lab-"1', "description": "d", "state": "active", "tags": {}, "admin_user": admin_user}
    result = (await csp.post(ACCOUNTS, json=body)).raise_for_status().json()["result"]
    assert result["admin_user"] == {"account_id": result["id"]}
    created = (await fetch_sandboxes(csp))[-1]
    assert (created["id"], created["name"], created["state"]) == (result["id"], 'lab-"1', "active")
    assert await find(csp, 'lab-"1') == [created]
    assert await find(csp, "lab-1") == []
    assert (await csp.delete(get_account_path(created))).status_code == 204
    assert await find(csp, 'lab-"1') == []


async def test_look_up_has_pages_and_finds_every_account_of_the_name(csp: httpx.AsyncClient) -> None:
    ids = [(await csp.post(ACCOUNTS, json={"name": "lab-1"})).json()["result"]["id"] for _ in range(3)]
    assert [r["id"] for r in await find(csp, "lab-1")] == ids
    assert [r["id"] for r in await find(csp, "lab-1", _limit="2", _offset="1")] == ids[1:]
    assert await find(csp, "lab-1", _offset="3") == []


def test_account_is_pending_until_it_is_usable_and_hidden_until_it_is_listed(tmp_path: Path) -> None:
    clock, state = Clock(), tmp_path / "state.json"
    accounts = AccountStore(state, seed=1, now=clock)
    external_id = accounts.create_account("lab-1", listed_after_sec=5, usable_after_sec=120)
    assert list_states(accounts) == []
    assert [record["state"] for record in accounts.find_sandboxes("lab-1")] == ["pending"]
    clock.now += 5
    assert list_states(accounts) == [("lab-1", "pending")]
    assert not accounts.has_active_sandbox(external_id)
    accounts = AccountStore(state, seed=1, now=clock)  # a restart keeps the times
    clock.now += 115
    assert list_states(accounts) == [("lab-1", "active")]
    assert accounts.has_active_sandbox(external_id)
    assert accounts.delete_sandbox(external_id)
    assert list_states(accounts) == []


def test_account_may_be_usable_before_it_is_listed() -> None:
    clock = Clock()
    accounts = AccountStore(seed=1, now=clock)
    accounts.create_account("lab-1", listed_after_sec=60)
    assert accounts.count_active() == 1
    assert list_states(accounts) == []
    clock.now += 60
    assert list_states(accounts) == [("lab-1", "active")]


@pytest.mark.parametrize("status", [502, 504, 200])
async def test_failed_creation_can_take_effect(csp: httpx.AsyncClient, status: int) -> None:
    failure: dict[str, Any] = {"fail_next_creates": 1, "create_error_status": status}
    await set_behaviour(csp, **failure)
    assert (await csp.post(ACCOUNTS, json={"name": "lab-1"})).status_code == status
    assert await find(csp, "lab-1") == []
    await set_behaviour(csp, **failure, create_error_after_effect=True)
    response = await csp.post(ACCOUNTS, json={"name": "lab-1"})
    assert (response.status_code, "result" in response.json()) == (status, False)
    assert len(await find(csp, "lab-1")) == 1


async def test_burst_of_failures_ends_by_itself(csp: httpx.AsyncClient) -> None:
    await set_behaviour(csp, fail_next_creates=2, create_error_status=503, retry_after_sec=7)
    responses = [await csp.post(ACCOUNTS, json={"name": "lab-1"}) for _ in range(3)]
    assert [response.status_code for response in responses] == [503, 503, 200]
    assert responses[0].headers["Retry-After"] == "7"


async def test_creation_over_the_quota_is_refused(csp: httpx.AsyncClient) -> None:
    await set_behaviour(csp, create_quota=3, create_quota_status=402, create_usable_after_sec=60)
    statuses = [
        response.status_code
        for response in await asyncio.gather(*(csp.post(ACCOUNTS, json={"name": f"lab-{n}"}) for n in range(4)))
    ]
    assert sorted(statuses) == [200, 200, 402, 402]
    response = await csp.post(ACCOUNTS, json={"name": "lab-9"})
    assert response.json() == {"error": [{"message": "the quota of 3 sandboxes is used up"}]}
    await csp.delete(get_account_path((await fetch_sandboxes(csp))[0]))
    assert (await csp.post(ACCOUNTS, json={"name": "lab-9"})).status_code == 200


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"name": " "}', b'{"name": 7}', b'{"name": "a", "admin_user": {"email": "e"}}']
)
async def test_invalid_creation_is_refused(csp: httpx.AsyncClient, body: bytes) -> None:
    before = await fetch_records(csp)
    assert (await csp.post(ACCOUNTS, content=body)).status_code == 400
    assert await fetch_records(csp) == before


@pytest.mark.parametrize(
    "query",
    [
        {},
        {"_filter": "name==a"},
        {"_filter": 'name=="a"b"'},
        {"_filter": 'id=="a"'},
        {"_filter": 'name=="a"', "_limit": "x"},
        {"_filter": 'name=="a"', "_offset": "-1"},
    ],
)
async def test_invalid_look_up_is_refused(csp: httpx.AsyncClient, query: dict[str, str]) -> None:
    assert (await csp.get(ACCOUNTS, params=query)).status_code == 400


async def test_missing_token_is_401(csp: httpx.AsyncClient) -> None:
    del csp.headers["Authorization"]
    assert [(await csp.request(method, ACCOUNTS)).status_code for method in ("GET", "POST")] == [401, 401]


async def test_calls_are_recorded_with_the_name_of_the_account(csp: httpx.AsyncClient) -> None:
    await csp.post(ACCOUNTS, json={"name": "lab-1"})
    await find(csp, "lab-1")
    await fetch_records(csp)
    assert [(call["method"], call["account_name"]) for call in await fetch_calls(csp)] == [
        ("POST", "lab-1"),
        ("GET", "lab-1"),
        ("GET", None),
    ]
