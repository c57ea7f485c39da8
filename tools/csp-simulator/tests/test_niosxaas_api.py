"""The NIOSXaaS API, which the clean-up of services uses."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from csp_simulator import sessions
from csp_simulator.app import DEFAULT_EMAIL, DEFAULT_PASSWORD, create_app
from csp_simulator.sessions import Sessions

from .simulator_harness import connect_in_process, fetch_sandboxes, get_account_path, get_external_id, set_behaviour

SIGN_IN = "/v2/session/users/sign_in"
SWITCH = "/v2/session/account_switch"
CURRENT_USER = "/v2/current_user"
SERVICES = "/api/universalinfra/v1/universalservices"


@pytest.fixture
async def csp() -> AsyncIterator[httpx.AsyncClient]:
    async with connect_in_process(create_app(accounts=3, seed=1)) as client:
        yield client


async def sign_in(csp: httpx.AsyncClient) -> dict[str, str]:
    """Start a session and return its headers."""
    response = await csp.post(SIGN_IN, json={"email": DEFAULT_EMAIL, "password": DEFAULT_PASSWORD})
    return build_bearer_headers(response)


def build_bearer_headers(response: httpx.Response) -> dict[str, str]:
    return {"Authorization": f"Bearer {response.raise_for_status().json()['jwt']}"}


async def sign_in_and_switch(csp: httpx.AsyncClient, account: dict[str, Any]) -> dict[str, str]:
    headers = await sign_in(csp)
    return build_bearer_headers(await csp.post(SWITCH, headers=headers, json={"id": account["id"]}))


async def replace_services(csp: httpx.AsyncClient, services: dict[str, list[Any]]) -> None:
    (await csp.put("/_control/services", json={"services": services})).raise_for_status()


async def fetch_service_names(csp: httpx.AsyncClient, headers: dict[str, str]) -> list[str]:
    response = await csp.get(SERVICES, headers=headers)
    return [service["name"] for service in response.raise_for_status().json()["results"]]


async def test_services_are_listed_and_deleted_in_the_current_account(csp: httpx.AsyncClient) -> None:
    first, second, third = await fetch_sandboxes(csp)
    await replace_services(
        csp, {get_external_id(first): ["a", "b"], get_external_id(second): ["c"], "home": ["keep"]}
    )
    headers = await sign_in_and_switch(csp, first)
    listed = (await csp.get(SERVICES, headers=headers)).json()["results"]
    assert [(s["name"], s["id"].rpartition("/")[0]) for s in listed] == [
        ("a", "infra/universal_service"),
        ("b", "infra/universal_service"),
    ]
    path = f"{SERVICES}/{listed[0]['id'].rpartition('/')[2]}"
    assert (await csp.delete(path, headers=await sign_in_and_switch(csp, second))).status_code == 404
    assert (await csp.delete(path, headers=headers)).status_code == 204
    assert (await csp.delete(path, headers=headers)).status_code == 404
    assert await fetch_service_names(csp, headers) == ["b"]
    remaining = (await csp.get("/_control/services")).json()["services"]
    assert {account: [s["name"] for s in services] for account, services in remaining.items()} == {
        get_external_id(first): ["b"],
        get_external_id(second): ["c"],
        "home": ["keep"],
    }
    assert await fetch_service_names(csp, await sign_in_and_switch(csp, third)) == []


async def test_session_starts_in_the_users_own_account(csp: httpx.AsyncClient) -> None:
    await replace_services(csp, {"home": ["keep"]})
    assert await fetch_service_names(csp, await sign_in(csp)) == ["keep"]


async def test_current_user_shows_the_account_of_the_jwt(csp: httpx.AsyncClient) -> None:
    async def fetch_current_account(headers: dict[str, str]) -> object:
        response = await csp.get(CURRENT_USER, headers=headers)
        return response.raise_for_status().json()["result"]["account_id"]

    first, second, _ = await fetch_sandboxes(csp)
    headers = await sign_in(csp)
    assert await fetch_current_account(headers) == "identity/accounts/00000000-0000-4000-8000-000000000001"
    assert await fetch_current_account(await sign_in_and_switch(csp, first)) == first["id"]
    assert await fetch_current_account(await sign_in_and_switch(csp, second)) == second["id"]


async def test_switch_without_effect_stays_in_the_earlier_account(csp: httpx.AsyncClient) -> None:
    first, second, _ = await fetch_sandboxes(csp)
    await replace_services(csp, {get_external_id(first): ["a"], get_external_id(second): ["b"], "home": ["keep"]})
    in_first = await sign_in_and_switch(csp, first)
    await set_behaviour(csp, account_switch_without_effect=True)
    headers = build_bearer_headers(await csp.post(SWITCH, headers=in_first, json={"id": second["id"]}))
    assert await fetch_service_names(csp, headers) == ["a"]
    assert await fetch_service_names(csp, await sign_in_and_switch(csp, second)) == ["keep"]


@pytest.mark.parametrize(
    "body", [{}, {"email": DEFAULT_EMAIL, "password": "x"}, {"email": "x", "password": DEFAULT_PASSWORD}, []]
)
async def test_wrong_credentials_are_401(csp: httpx.AsyncClient, body: object) -> None:
    assert (await csp.post(SIGN_IN, json=body)).status_code == 401


async def test_altered_jwt_is_refused(csp: httpx.AsyncClient) -> None:
    good = (await sign_in_and_switch(csp, (await fetch_sandboxes(csp))[0]))["Authorization"]
    jwt = good.removeprefix("Bearer ")
    header, payload, signature = jwt.split(".")
    bad = ["", "x", "a.b.c", f"{header}.{payload}.", f"{header}.{payload}x.{signature}", f"{jwt}x", jwt[:-2]]
    for headers in [{}, {"Authorization": jwt}, *({"Authorization": f"Bearer {wrong}"} for wrong in bad)]:
        for method, path in (
            ("POST", SWITCH),
            ("GET", CURRENT_USER),
            ("GET", SERVICES),
            ("DELETE", f"{SERVICES}/x"),
        ):
            response = await csp.request(method, path, headers={"Authorization": "", **headers})
            assert response.status_code == 401
    assert (await csp.get(SERVICES, headers={"Authorization": good})).status_code == 200


async def test_switch_invalidates_earlier_jwts_of_its_session_only(csp: httpx.AsyncClient) -> None:
    first, second, _ = await fetch_sandboxes(csp)
    headers = await sign_in(csp)
    in_first = build_bearer_headers(await csp.post(SWITCH, headers=headers, json={"id": first["id"]}))
    assert (await csp.get(SERVICES, headers=headers)).status_code == 401
    in_second = build_bearer_headers(await csp.post(SWITCH, headers=in_first, json={"id": second["id"]}))
    assert (await csp.get(SERVICES, headers=in_first)).status_code == 401
    assert (await csp.get(SERVICES, headers=in_second)).status_code == 200
    another = await sign_in_and_switch(csp, first)
    assert (await csp.get(SERVICES, headers=another)).status_code == 200
    assert (await csp.get(SERVICES, headers=in_second)).status_code == 200


async def test_switch_to_a_missing_account_is_404(csp: httpx.AsyncClient) -> None:
    account = (await fetch_sandboxes(csp))[0]
    await csp.delete(get_account_path(account))
    headers = await sign_in(csp)
    for body in ({"id": account["id"]}, {"id": "x"}, {}):
        assert (await csp.post(SWITCH, headers=headers, json=body)).status_code == 404


async def test_jwt_expires(csp: httpx.AsyncClient) -> None:
    await set_behaviour(csp, jwt_lifetime_sec=0)
    headers = await sign_in(csp)
    assert (await csp.get(SERVICES, headers=headers)).status_code == 401


async def test_reject_tokens_applies_to_jwts_and_sign_in(csp: httpx.AsyncClient) -> None:
    headers = await sign_in(csp)
    await set_behaviour(csp, reject_tokens=True)
    assert (await csp.get(SERVICES, headers=headers)).status_code == 401
    response = await csp.post(SIGN_IN, json={"email": DEFAULT_EMAIL, "password": DEFAULT_PASSWORD})
    assert response.status_code == 401


@pytest.mark.parametrize(
    ("switch", "method", "path"),
    [
        ("fail_next_sign_ins", "POST", SIGN_IN),
        ("fail_next_account_switches", "POST", SWITCH),
        ("fail_next_current_users", "GET", CURRENT_USER),
        ("fail_next_service_listings", "GET", SERVICES),
        ("fail_next_service_deletes", "DELETE", f"{SERVICES}/x"),
    ],
)
async def test_each_operation_has_its_own_failure_switch(
    csp: httpx.AsyncClient, switch: str, method: str, path: str
) -> None:
    user = {"email": DEFAULT_EMAIL, "password": DEFAULT_PASSWORD}
    headers = await sign_in(csp)
    await set_behaviour(csp, **{switch: 1})
    statuses = [(await csp.request(method, path, headers=headers, json=user)).status_code for _ in range(2)]
    assert statuses[0] == 500
    assert statuses[1] != 500


async def test_raw_service_records_are_listed_unchanged(csp: httpx.AsyncClient) -> None:
    await replace_services(csp, {"home": ["valid", {"id": 5}, None, ["x"]]})
    listed = (await csp.get(SERVICES, headers=await sign_in(csp))).json()["results"]
    assert listed[1:] == [{"id": 5}, None, ["x"]]


@pytest.mark.parametrize("body", [{}, {"services": []}, {"services": {"home": "a"}}])
async def test_malformed_services_are_refused(csp: httpx.AsyncClient, body: object) -> None:
    response = await csp.put("/_control/services", json=body)
    assert (response.status_code, response.json()) == (400, {"error": "services must be an object of lists"})


def test_oldest_session_is_dropped_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MAX_SESSIONS", 2)
    store = Sessions()
    jwts = [store.sign_in(60) for _ in range(3)]
    assert [store.is_valid(jwt) for jwt in jwts] == [False, True, True]
