"""Groups and users inside an account, their passwords, and the switch into a new account."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from csp_simulator.app import DEFAULT_EMAIL, DEFAULT_PASSWORD, create_app

from .simulator_harness import connect_in_process, fetch_sandboxes, get_account_path, get_external_id, set_behaviour

SIGN_IN = "/v2/session/users/sign_in"
SWITCH = "/v2/session/account_switch"
EMAIL = "student-1@labs.example.com"
PASSWORD = "Abcdef12!?"


@pytest.fixture
async def csp() -> AsyncIterator[httpx.AsyncClient]:
    async with connect_in_process(create_app(accounts=3, seed=1)) as client:
        yield client


async def sign_in(csp: httpx.AsyncClient, email: str = DEFAULT_EMAIL, password: str = DEFAULT_PASSWORD) -> Any:
    return await csp.post(SIGN_IN, json={"email": email, "password": password})


def bearer(response: httpx.Response) -> dict[str, str]:
    return {"Authorization": f"Bearer {response.raise_for_status().json()['jwt']}"}


async def enter(csp: httpx.AsyncClient, account: dict[str, Any]) -> dict[str, str]:
    return bearer(await csp.post(SWITCH, headers=bearer(await sign_in(csp)), json={"id": account["id"]}))


async def create_user(csp: httpx.AsyncClient, headers: dict[str, str], **changes: Any) -> httpx.Response:
    groups = (await csp.get("/v2/groups", headers=headers)).raise_for_status().json()["results"]
    body = {"name": "Student", "email": EMAIL, "type": "interactive", "group_ids": [groups[0]["id"]], **changes}
    return await csp.post("/v2/users", headers=headers, json=body)


async def control_users(csp: httpx.AsyncClient) -> list[dict[str, Any]]:
    users: list[dict[str, Any]] = (await csp.get("/_control/users")).json()["users"]
    return users


async def test_a_user_gets_a_password_and_signs_in(csp: httpx.AsyncClient) -> None:
    account = (await fetch_sandboxes(csp))[0]
    headers = await enter(csp, account)
    created = await create_user(csp, headers)
    assert created.status_code == 201
    user = created.json()["result"]
    assert (await sign_in(csp, EMAIL, PASSWORD)).status_code == 401
    path = f"/v2/users/{user['id']}"
    assert (await csp.post(f"{path}/password", headers=headers, json={"new_password": PASSWORD})).status_code == 200
    session = bearer(await sign_in(csp, EMAIL, PASSWORD))
    current = (await csp.get("/v2/current_user", headers=session)).json()["result"]
    assert current == {"email": EMAIL, "account_id": account["id"]}
    assert [(u["email"], u["groups"], u["account"], u["has_password"]) for u in await control_users(csp)] == [
        (EMAIL, ["user"], get_external_id(account), True)
    ]
    assert PASSWORD not in str(await control_users(csp))
    assert (await csp.delete(path, headers=headers)).status_code == 204
    assert (await csp.delete(path, headers=headers)).status_code == 404
    assert (await csp.get("/v2/current_user", headers=session)).status_code == 401
    assert (await sign_in(csp, EMAIL, PASSWORD)).status_code == 401


async def test_an_existing_user_is_409_and_found_by_its_email(csp: httpx.AsyncClient) -> None:
    first, second, _ = await fetch_sandboxes(csp)
    headers = await enter(csp, first)
    user = (await create_user(csp, headers)).json()["result"]
    assert (await create_user(csp, headers)).status_code == 409
    assert (await create_user(csp, await enter(csp, second))).status_code == 201

    async def find(account_headers: dict[str, str], email: str) -> list[Any]:
        query = {"_filter": f'email=="{email}"'}
        response = await csp.get("/v2/users", headers=account_headers, params=query)
        return [record["id"] for record in response.raise_for_status().json()["results"]]

    headers = await enter(csp, first)
    assert await find(headers, EMAIL) == [user["id"]]
    assert await find(headers, "another@labs.example.com") == []
    assert (await csp.get("/v2/users", headers=headers)).status_code == 400


@pytest.mark.parametrize(
    ("password", "problem"),
    [
        ("Ab1!?", "8 characters"),
        ("abcdef12!?", "upper-case"),
        ("ABCDEF12!?", "lower-case"),
        ("Abcdefgh!?", "digit"),
        ("Abcdef12!", "2 special"),
        (None, "8 characters"),
    ],
)
async def test_password_rules(csp: httpx.AsyncClient, password: object, problem: str) -> None:
    headers = await enter(csp, (await fetch_sandboxes(csp))[0])
    user = (await create_user(csp, headers)).json()["result"]
    response = await csp.post(f"/v2/users/{user['id']}/password", headers=headers, json={"new_password": password})
    assert response.status_code == 400
    assert problem in response.text


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ""},
        {"email": "no address"},
        {"email": f"{'x' * 65}@labs.example.com"},
        {"type": "service"},
        {"group_ids": []},
        {"group_ids": ["identity/groups/other"]},
    ],
)
async def test_an_invalid_user_is_refused(csp: httpx.AsyncClient, changes: dict[str, Any]) -> None:
    assert (await create_user(csp, await enter(csp, (await fetch_sandboxes(csp))[0]), **changes)).status_code == 400


async def test_users_need_a_switched_session(csp: httpx.AsyncClient) -> None:
    headers = bearer(await sign_in(csp))
    for method, path in (
        ("GET", "/v2/groups"),
        ("POST", "/v2/users"),
        ("GET", "/v2/users"),
        ("POST", "/v2/users/x/password"),
        ("DELETE", "/v2/users/x"),
    ):
        assert (await csp.request(method, path, headers=headers)).status_code == 401
        assert (await csp.request(method, path)).status_code == 401


@pytest.mark.parametrize("status", [403, 404, 503])
async def test_the_switch_into_an_account_fails_for_a_time(csp: httpx.AsyncClient, status: int) -> None:
    first, second, _ = await fetch_sandboxes(csp)
    await set_behaviour(csp, account_switch_ready_after_sec=3600, account_switch_not_ready_status=status)
    headers = bearer(await sign_in(csp))
    response = await csp.post(SWITCH, headers=headers, json={"id": first["id"]})
    assert (response.status_code, response.json()) == (status, {"error": [{"message": "the account is not ready"}]})
    await set_behaviour(csp, account_switch_ready_after_sec=0)
    for account in (first, second):  # the failed switch left the session as it was
        headers = bearer(await csp.post(SWITCH, headers=headers, json={"id": account["id"]}))


async def test_a_user_outlives_the_account(csp: httpx.AsyncClient) -> None:
    account = (await fetch_sandboxes(csp))[0]
    await create_user(csp, await enter(csp, account))
    await csp.delete(get_account_path(account))
    assert [user["email"] for user in await control_users(csp)] == [EMAIL]
    await csp.post("/_control/reset", json={})
    assert await control_users(csp) == []


async def test_reject_sign_ins_keeps_sessions(csp: httpx.AsyncClient) -> None:
    headers = await enter(csp, (await fetch_sandboxes(csp))[0])
    await set_behaviour(csp, reject_sign_ins=True)
    assert (await sign_in(csp)).status_code == 401
    assert (await csp.get("/v2/groups", headers=headers)).status_code == 200


@pytest.mark.parametrize(
    ("operation", "method", "path"),
    [
        ("group_listings", "GET", "/v2/groups"),
        ("user_creates", "POST", "/v2/users"),
        ("user_finds", "GET", "/v2/users"),
        ("user_passwords", "POST", "/v2/users/{id}/password"),
        ("user_deletes", "DELETE", "/v2/users/{id}"),
    ],
)
async def test_each_operation_has_its_own_failure_switch(
    csp: httpx.AsyncClient, operation: str, method: str, path: str
) -> None:
    headers = await enter(csp, (await fetch_sandboxes(csp))[0])
    user = (await create_user(csp, headers)).json()["result"]
    groups = (await csp.get("/v2/groups", headers=headers)).json()["results"]
    await set_behaviour(csp, **{f"fail_next_{operation}": 1})
    body = {
        "new_password": PASSWORD,
        "name": "Another",
        "email": "another@labs.example.com",
        "type": "interactive",
        "group_ids": [groups[1]["id"]],
    }
    query = {"_filter": f'email=="{EMAIL}"'}
    statuses = [
        (
            await csp.request(method, path.format(id=user["id"]), headers=headers, json=body, params=query)
        ).status_code
        for _ in range(2)
    ]
    assert statuses[0] == 500
    assert statuses[1] < 300


@pytest.mark.parametrize("operation", ["user_create", "user_password", "user_delete"])
async def test_a_failure_after_the_effect(csp: httpx.AsyncClient, operation: str) -> None:
    headers = await enter(csp, (await fetch_sandboxes(csp))[0])
    if operation == "user_create":
        await set_behaviour(csp, fail_next_user_creates=1, user_create_error_after_effect=True)
        assert (await create_user(csp, headers)).status_code == 500
        assert len(await control_users(csp)) == 1
        return
    user = (await create_user(csp, headers)).json()["result"]
    await set_behaviour(csp, **{f"fail_next_{operation}s": 1, f"{operation}_error_after_effect": True})
    path = f"/v2/users/{user['id']}"
    if operation == "user_password":
        response = await csp.post(f"{path}/password", headers=headers, json={"new_password": PASSWORD})
        assert (response.status_code, (await control_users(csp))[0]["has_password"]) == (500, True)
    else:
        assert ((await csp.delete(path, headers=headers)).status_code, await control_users(csp)) == (500, [])
