"""The simulator as the clean-up of services sees it: the API of NIOSXaaS."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from csp_simulator import sessions
from csp_simulator.app import DEFAULT_EMAIL, DEFAULT_PASSWORD, create_app
from csp_simulator.sessions import Sessions

from .simulator_harness import behave, client_of, external_id, path_of, sandboxes

SIGN_IN = "/v2/session/users/sign_in"
SWITCH = "/v2/session/account_switch"
CURRENT_USER = "/v2/current_user"
SERVICES = "/api/universalinfra/v1/universalservices"


@pytest.fixture
async def csp() -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(create_app(accounts=3, seed=1)) as client:
        yield client


async def signed_in(csp: httpx.AsyncClient) -> dict[str, str]:
    """The headers of a new session."""
    response = await csp.post(SIGN_IN, json={"email": DEFAULT_EMAIL, "password": DEFAULT_PASSWORD})
    return bearer(response)


def bearer(response: httpx.Response) -> dict[str, str]:
    return {"Authorization": f"Bearer {response.raise_for_status().json()['jwt']}"}


async def switched_to(csp: httpx.AsyncClient, account: dict[str, Any]) -> dict[str, str]:
    headers = await signed_in(csp)
    return bearer(await csp.post(SWITCH, headers=headers, json={"id": account["id"]}))


async def have_services(csp: httpx.AsyncClient, services: dict[str, list[Any]]) -> None:
    (await csp.put("/_control/services", json={"services": services})).raise_for_status()


async def names(csp: httpx.AsyncClient, headers: dict[str, str]) -> list[str]:
    response = await csp.get(SERVICES, headers=headers)
    return [service["name"] for service in response.raise_for_status().json()["results"]]


async def test_services_are_listed_and_deleted_in_the_account_switched_to(csp: httpx.AsyncClient) -> None:
    first, second, third = await sandboxes(csp)
    await have_services(csp, {external_id(first): ["a", "b"], external_id(second): ["c"], "home": ["keep"]})
    headers = await switched_to(csp, first)
    listed = (await csp.get(SERVICES, headers=headers)).json()["results"]
    assert [(s["name"], s["id"].rpartition("/")[0]) for s in listed] == [
        ("a", "infra/universal_service"),
        ("b", "infra/universal_service"),
    ]
    path = f"{SERVICES}/{listed[0]['id'].rpartition('/')[2]}"
    assert (await csp.delete(path, headers=await switched_to(csp, second))).status_code == 404
    assert (await csp.delete(path, headers=headers)).status_code == 204
    assert (await csp.delete(path, headers=headers)).status_code == 404
    assert await names(csp, headers) == ["b"]
    left = (await csp.get("/_control/services")).json()["services"]
    assert {account: [s["name"] for s in all_] for account, all_ in left.items()} == {
        external_id(first): ["b"],
        external_id(second): ["c"],
        "home": ["keep"],
    }
    assert await names(csp, await switched_to(csp, third)) == []


async def test_who_has_not_switched_acts_in_the_users_own_account(csp: httpx.AsyncClient) -> None:
    await have_services(csp, {"home": ["keep"]})
    assert await names(csp, await signed_in(csp)) == ["keep"]


async def test_the_current_user_is_in_the_account_of_the_jwt(csp: httpx.AsyncClient) -> None:
    async def account(headers: dict[str, str]) -> object:
        response = await csp.get(CURRENT_USER, headers=headers)
        return response.raise_for_status().json()["result"]["account_id"]

    first, second, _ = await sandboxes(csp)
    headers = await signed_in(csp)
    assert await account(headers) == "identity/accounts/00000000-0000-4000-8000-000000000001"
    assert await account(await switched_to(csp, first)) == first["id"]
    assert await account(await switched_to(csp, second)) == second["id"]


async def test_a_switch_without_effect_stays_in_the_account_of_before(csp: httpx.AsyncClient) -> None:
    first, second, _ = await sandboxes(csp)
    await have_services(csp, {external_id(first): ["a"], external_id(second): ["b"], "home": ["keep"]})
    in_first = await switched_to(csp, first)
    await behave(csp, account_switch_without_effect=True)
    headers = bearer(await csp.post(SWITCH, headers=in_first, json={"id": second["id"]}))
    assert await names(csp, headers) == ["a"]
    assert await names(csp, await switched_to(csp, second)) == ["keep"]


@pytest.mark.parametrize(
    "body", [{}, {"email": DEFAULT_EMAIL, "password": "x"}, {"email": "x", "password": DEFAULT_PASSWORD}, []]
)
async def test_wrong_credentials_are_401(csp: httpx.AsyncClient, body: object) -> None:
    assert (await csp.post(SIGN_IN, json=body)).status_code == 401


async def test_a_jwt_is_checked_to_the_last_character(csp: httpx.AsyncClient) -> None:
    good = (await switched_to(csp, (await sandboxes(csp))[0]))["Authorization"]
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


async def test_switching_is_of_the_session_so_two_accounts_need_two_sessions(csp: httpx.AsyncClient) -> None:
    first, second, _ = await sandboxes(csp)
    headers = await signed_in(csp)
    in_first = bearer(await csp.post(SWITCH, headers=headers, json={"id": first["id"]}))
    assert (await csp.get(SERVICES, headers=headers)).status_code == 401
    in_second = bearer(await csp.post(SWITCH, headers=in_first, json={"id": second["id"]}))
    assert (await csp.get(SERVICES, headers=in_first)).status_code == 401
    assert (await csp.get(SERVICES, headers=in_second)).status_code == 200
    another = await switched_to(csp, first)
    assert (await csp.get(SERVICES, headers=another)).status_code == 200
    assert (await csp.get(SERVICES, headers=in_second)).status_code == 200


async def test_only_a_sandbox_that_is_there_can_be_switched_to(csp: httpx.AsyncClient) -> None:
    account = (await sandboxes(csp))[0]
    await csp.delete(path_of(account))
    headers = await signed_in(csp)
    for body in ({"id": account["id"]}, {"id": "x"}, {}):
        assert (await csp.post(SWITCH, headers=headers, json=body)).status_code == 404


async def test_a_jwt_ends_with_its_lifetime(csp: httpx.AsyncClient) -> None:
    await behave(csp, jwt_lifetime_sec=0)
    headers = await signed_in(csp)
    assert (await csp.get(SERVICES, headers=headers)).status_code == 401


async def test_every_jwt_can_be_rejected(csp: httpx.AsyncClient) -> None:
    headers = await signed_in(csp)
    await behave(csp, reject_tokens=True)
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
async def test_each_operation_has_its_own_failures(
    csp: httpx.AsyncClient, switch: str, method: str, path: str
) -> None:
    user = {"email": DEFAULT_EMAIL, "password": DEFAULT_PASSWORD}
    headers = await signed_in(csp)
    await behave(csp, **{switch: 1})
    statuses = [(await csp.request(method, path, headers=headers, json=user)).status_code for _ in range(2)]
    assert statuses[0] == 500
    assert statuses[1] != 500


async def test_records_of_services_can_be_anything(csp: httpx.AsyncClient) -> None:
    await have_services(csp, {"home": ["sound", {"id": 5}, None, ["x"]]})
    listed = (await csp.get(SERVICES, headers=await signed_in(csp))).json()["results"]
    assert listed[1:] == [{"id": 5}, None, ["x"]]


@pytest.mark.parametrize("body", [{}, {"services": []}, {"services": {"home": "a"}}])
async def test_services_that_make_no_sense_are_refused(csp: httpx.AsyncClient, body: object) -> None:
    response = await csp.put("/_control/services", json=body)
    assert (response.status_code, response.json()) == (400, {"error": "services must be an object of lists"})


def test_only_the_latest_sessions_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MAX_SESSIONS", 2)
    kept = Sessions()
    jwts = [kept.sign_in(60) for _ in range(3)]
    assert [kept.is_valid(jwt) for jwt in jwts] == [False, True, True]
