"""Control API: accounts, behaviour, recorded calls, reset."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from csp_simulator.app import create_app

from .simulator_harness import LISTING, connect_in_process, fetch_sandboxes


@pytest.fixture
async def csp() -> AsyncIterator[httpx.AsyncClient]:
    async with connect_in_process(create_app(accounts=2)) as client:
        yield client


def build_account(number: int, **changes: object) -> dict[str, Any]:
    return {
        "account_type": "sandbox",
        "state": "active",
        "id": f"identity/accounts/00000000-0000-4000-8000-{number:012d}",
        "name": f"lab-{number}",
        "csp_id": 3000000 + number,
        "created_at": "2025-03-27T16:53:47.605459Z",
        "sfdc_account_id": None,
        **changes,
    }


async def fetch_names(csp: httpx.AsyncClient) -> list[str]:
    return [record["name"] for record in await fetch_sandboxes(csp)]


async def test_healthz_answers(csp: httpx.AsyncClient) -> None:
    assert (await csp.get("/healthz")).status_code == 200


async def test_control_needs_no_token_and_shows_the_listed_accounts(csp: httpx.AsyncClient) -> None:
    listed = (await csp.get(LISTING)).json()["results"]
    del csp.headers["Authorization"]
    assert (await csp.get("/_control/accounts")).json() == {"accounts": listed}


async def test_replacing_the_accounts_changes_the_listing(csp: httpx.AsyncClient) -> None:
    records = [build_account(1), build_account(2, state="disabled")]
    response = await csp.put("/_control/accounts", json={"accounts": records})
    assert response.status_code == 200
    assert (await csp.get(LISTING)).json() == {"results": records}


async def test_dumped_accounts_can_be_restored(csp: httpx.AsyncClient) -> None:
    dump = (await csp.get("/_control/accounts")).json()
    assert (await csp.put("/_control/accounts", json=dump)).json() == dump


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ("none", "accounts must be a list"),
        ([build_account(1), 7], "accounts[1] must be an object"),
        ([build_account(1, csp_id="3000001")], "accounts[0].csp_id must be a positive integer"),
        ([build_account(1, csp_id=True)], "accounts[0].csp_id must be"),
        ([build_account(1, id="00000000-0000-4000-8000-000000000001")], "accounts[0].id must be"),
        ([build_account(1, name=" ")], "accounts[0].name must be"),
        ([build_account(1, sfdc_account_id=5)], "accounts[0].sfdc_account_id must be"),
        ([{k: v for k, v in build_account(1).items() if k != "state"}], "accounts[0].state must be"),
        ([build_account(1), build_account(1, csp_id=9)], "accounts[1] repeats"),
        ([build_account(1), build_account(2, csp_id=3000001)], "accounts[1] repeats"),
    ],
)
async def test_invalid_account_is_refused_with_its_index(
    csp: httpx.AsyncClient, records: Any, message: str
) -> None:
    before = await fetch_names(csp)
    response = await csp.put("/_control/accounts", json={"accounts": records})
    assert response.status_code == 400
    assert message in response.json()["error"]
    assert await fetch_names(csp) == before


async def test_raw_records_are_listed_unchanged(csp: httpx.AsyncClient) -> None:
    raw = [build_account(1), build_account(1), {"id": ["odd"]}, None, "text", {"name": "\ud800"}]
    body = json.dumps({"raw": raw})  # httpx cannot encode the lone surrogate
    assert (await csp.put("/_control/accounts", content=body)).status_code == 200
    assert (await csp.get(LISTING)).json()["results"] == raw


async def test_duplicate_raw_accounts_are_deleted_together(csp: httpx.AsyncClient) -> None:
    await csp.put("/_control/accounts", json={"raw": [build_account(1), build_account(1), build_account(2)]})
    path = "/v2/sandbox/accounts/00000000-0000-4000-8000-000000000001"
    assert (await csp.delete(path)).status_code == 204
    assert (await csp.get(LISTING)).json()["results"] == [build_account(2)]


async def test_added_accounts_are_numbered_per_prefix(csp: httpx.AsyncClient) -> None:
    response = await csp.post("/_control/accounts", json={"count": 2, "name_prefix": "lab-"})
    assert response.status_code == 201
    assert [(a["name"], a["csp_id"]) for a in response.json()["accounts"]] == [
        ("lab-1", 2012226),
        ("lab-2", 2012227),
    ]
    await csp.post("/_control/accounts", json={"count": 1})
    assert await fetch_names(csp) == ["sandbox-1", "sandbox-2", "lab-1", "lab-2", "sandbox-3"]


async def test_added_account_gets_the_next_csp_id(csp: httpx.AsyncClient) -> None:
    await csp.put("/_control/accounts", json={"accounts": [build_account(5)]})
    added = (await csp.post("/_control/accounts", json={"count": 1})).json()["accounts"]
    assert added[0]["csp_id"] == 3000006


@pytest.mark.parametrize(
    ("method", "path", "body", "message"),
    [
        ("POST", "/_control/accounts", {}, "count is missing"),
        ("POST", "/_control/accounts", {"count": -1}, "count must be"),
        ("POST", "/_control/accounts", {"count": 1, "name_prefix": 5}, "name_prefix must be"),
        ("POST", "/_control/accounts", {"count": 1, "prefix": "x"}, "unknown: prefix"),
        ("POST", "/_control/reset", {"accounts": True}, "accounts must be"),
        ("PUT", "/_control/accounts", {"accounts": [], "raw": []}, "either accounts"),
        ("PUT", "/_control/accounts", [], "JSON object"),
    ],
)
async def test_invalid_body_is_refused_with_the_reason(
    csp: httpx.AsyncClient, method: str, path: str, body: Any, message: str
) -> None:
    response = await csp.request(method, path, json=body)
    assert response.status_code == 400
    assert message in response.json()["error"]


async def test_body_must_be_json(csp: httpx.AsyncClient) -> None:
    response = await csp.patch("/_control/behaviour", content=b"{")
    assert (response.status_code, response.json()) == (400, {"error": "the body must be JSON"})


async def test_account_can_be_removed_without_a_deletion(csp: httpx.AsyncClient) -> None:
    added = (await csp.post("/_control/accounts", json={"count": 1})).json()["accounts"][0]
    path = "/_control/accounts/" + added["id"].removeprefix("identity/accounts/")
    assert (await csp.delete(path)).status_code == 204
    assert await fetch_names(csp) == ["sandbox-1", "sandbox-2"]
    assert (await csp.delete(path)).status_code == 404


async def test_patch_keeps_other_switches(csp: httpx.AsyncClient) -> None:
    defaults = (await csp.get("/_control/behaviour")).json()
    response = await csp.patch("/_control/behaviour", json={"delete_latency_sec": 0.5})
    assert response.json() == {**defaults, "delete_latency_sec": 0.5}
    assert (await csp.get("/_control/behaviour")).json() == response.json()


@pytest.mark.parametrize(
    ("switch", "value"),
    [
        ("delete_latency_sec", -1),
        ("delete_latency_sec", "1"),
        ("delete_error_rate", 1.1),
        ("delete_error_rate", True),
        ("delete_error_status", 204),
        ("delete_error_status", 500.5),
        ("delete_error_html", 1),
        ("fail_next_deletes", 1.5),
        ("fail_next_deletes", True),
        ("retry_after_sec", "soon"),
        ("delete_mood", 1),
    ],
)
async def test_unknown_or_invalid_switch_is_refused_by_name(
    csp: httpx.AsyncClient, switch: str, value: object
) -> None:
    before = (await csp.get("/_control/behaviour")).json()
    response = await csp.patch("/_control/behaviour", json={"listing_error_rate": 0.5, switch: value})
    assert response.status_code == 400
    assert response.json()["error"].startswith(f"{switch} ")
    assert (await csp.get("/_control/behaviour")).json() == before


async def test_default_behaviour_can_be_restored(csp: httpx.AsyncClient) -> None:
    defaults = (await csp.get("/_control/behaviour")).json()
    assert (await csp.patch("/_control/behaviour", json=defaults)).json() == defaults


async def test_reset_restores_everything_except_used_csp_ids(csp: httpx.AsyncClient) -> None:
    await csp.patch("/_control/behaviour", json={"delete_error_rate": 1, "fail_next_listings": 3})
    await csp.get(LISTING)
    before = (await csp.get("/_control/accounts")).json()["accounts"]
    response = await csp.post("/_control/reset", json={"accounts": 3, "name_prefix": "lab-"})
    assert response.status_code == 200
    after = response.json()["accounts"]
    assert (await csp.get("/_control/calls")).json() == {"calls": [], "running": []}
    assert (await csp.get("/_control/behaviour")).json()["delete_error_rate"] == 0
    assert await fetch_names(csp) == ["lab-1", "lab-2", "lab-3"]
    assert {a["id"] for a in before}.isdisjoint(a["id"] for a in after)
    assert [a["csp_id"] for a in after if a["csp_id"] > 2000000] == [2012226, 2012227, 2012228]


async def test_index_lists_every_route_and_switch(csp: httpx.AsyncClient) -> None:
    await csp.patch("/_control/behaviour", json={"delete_error_rate": 0.5})
    index = (await csp.get("/_control")).json()
    behaviour = (await csp.get("/_control/behaviour")).json()
    assert {name: switch["now"] for name, switch in index["switches"].items()} == behaviour
    assert index["switches"]["delete_error_rate"] == {
        "now": 0.5,
        "default": 0,
        "rule": "must be a number from 0 to 1",
        "meaning": "delete: probability of a failure",
    }
    assert index["routes"]["PATCH /_control/behaviour"].startswith("Set some switches")
    assert all(index["routes"].values())
    assert index["scripts"] == ["bad-day"]
