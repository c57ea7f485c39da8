"""Routes for the login inside a sandbox, against a real database."""

from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import httpx
import pytest
from cryptography.fernet import Fernet

from sandbox_broker.contract.commands import AllocateSandbox, RotateAccessKeys
from sandbox_broker.contract.replies import AccessKeysRotated
from sandbox_broker.contract.replies import refuse as refusal
from sandbox_broker.runtime.access_keys import AccessKeys

from .gateway_harness import ADMIN, STUDENT, Gateway, detail, running

KEY = Fernet.generate_key().decode()
PASSWORD = "Abcdef12!?-secret"
ROTATE = "/v1/admin/access/rotate-keys"


@pytest.fixture(scope="module")
async def shared_gateway(amqp_url: str, database_url: str) -> AsyncIterator[Gateway]:
    async with running(amqp_url, database_url=database_url, access_keys=KEY, admin_wait_sec=5) as gateway:
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


async def lease(database: asyncpg.Connection, *, ended: bool = False) -> None:
    await database.execute(
        "INSERT INTO sandboxes (sandbox_id, external_id, name, status) VALUES ('1', 'a-1', 'lab-1', 'allocated')"
    )
    await database.execute(
        "INSERT INTO leases (sandbox_id, holder, expires_at, ended_at, end_reason) VALUES ('1', 'student-1', "
        "now() + interval '1 hour', CASE WHEN $1 THEN now() END, CASE WHEN $1 THEN 'student' END)",
        ended,
    )


async def login(database: asyncpg.Connection, **columns: Any) -> None:
    values = {"sandbox_id": "1", "groups": "[]", **columns}
    names, places = ", ".join(values), ", ".join(f"${number}" for number in range(1, len(values) + 1))
    await database.execute(f"INSERT INTO accesses ({names}) VALUES ({places})", *values.values())


async def ready(database: asyncpg.Connection, encrypted: str) -> None:
    await login(
        database, state="ready", email="s@labs", user_id="user-1", password=encrypted, password_key="k", due_at=None
    )


async def get(gateway: Gateway, sandbox_id: str = "1", student: str = "student-1") -> httpx.Response:
    headers = {**STUDENT, "X-Instruqt-Sandbox-ID": student}
    return await gateway.client.get(f"/v1/sandboxes/{sandbox_id}/access", headers=headers)


async def test_a_ready_login_is_returned_to_its_student(gateway: Gateway, database: asyncpg.Connection) -> None:
    await lease(database)
    await ready(database, AccessKeys(KEY).encrypt(PASSWORD))
    response = await get(gateway)
    assert response.status_code == 200
    assert response.json() == {
        "status": "ready",
        "email": "s@labs",
        "password": PASSWORD,
        "user_id": "user-1",
        "login_url": "https://csp.infoblox.com",
    }
    assert response.headers["Cache-Control"] == "no-store"


async def test_a_pending_login_asks_for_a_repetition(gateway: Gateway, database: asyncpg.Connection) -> None:
    await lease(database)
    await login(database)
    response = await get(gateway)
    assert (response.status_code, response.json()) == (202, {"status": "pending", "retry_after": 5})
    assert response.headers["Retry-After"] == "5"


async def test_a_failed_login_has_a_reason(gateway: Gateway, database: asyncpg.Connection) -> None:
    await lease(database)
    await login(database, state="failed", error="CSP refuses the sign-in.")
    response = await get(gateway)
    assert (response.status_code, response.json()) == (
        200,
        {"status": "failed", "reason": "CSP refuses the sign-in."},
    )


async def test_refusals(gateway: Gateway, database: asyncpg.Connection) -> None:
    await lease(database)
    for sandbox_id in ("2", "%00"):
        response = await get(gateway, sandbox_id)
        assert (response.status_code, detail(response)["code"]) == (404, "SANDBOX_NOT_FOUND")
    response = await get(gateway)
    assert (response.status_code, detail(response)["code"]) == (404, "ACCESS_NOT_REQUESTED")
    await ready(database, AccessKeys(KEY).encrypt(PASSWORD))
    response = await get(gateway, student="mallory")
    assert (response.status_code, detail(response)["code"]) == (403, "NOT_SANDBOX_OWNER")
    assert "labs" not in response.text
    response = await gateway.client.get("/v1/sandboxes/1/access", headers={"X-Instruqt-Sandbox-ID": "student-1"})
    assert response.status_code == 401


async def test_after_the_end_of_the_lease_the_login_is_gone(gateway: Gateway, database: asyncpg.Connection) -> None:
    await lease(database, ended=True)
    response = await get(gateway)
    assert (response.status_code, detail(response)["code"]) == (410, "ACCESS_ENDED")
    response = await get(gateway, student="mallory")
    assert response.status_code == 403


async def test_a_password_of_an_unknown_key_is_unreadable(gateway: Gateway, database: asyncpg.Connection) -> None:
    await lease(database)
    await ready(database, AccessKeys(Fernet.generate_key().decode()).encrypt(PASSWORD))
    response = await get(gateway)
    assert (response.status_code, detail(response)["code"]) == (503, "ACCESS_UNREADABLE")
    assert response.headers["Retry-After"] == "30"


async def test_without_keys_the_reason_names_the_setting(
    amqp_url: str, database_url: str, database: asyncpg.Connection
) -> None:
    await lease(database)
    await login(database)
    async with running(amqp_url, far_sides=False, database_url=database_url) as gateway:
        body = (await get(gateway)).json()
    assert body["status"] == "failed"
    assert "ACCESS_KEYS" in body["reason"]


async def test_the_header_asks_for_a_login(gateway: Gateway) -> None:
    await gateway.allocate(X_Sandbox_Access="User")
    await gateway.allocate()
    commands = gateway.allocator.commands
    assert [command.access for command in commands if isinstance(command, AllocateSandbox)] == ["user", None]
    response = await gateway.allocate(X_Sandbox_Access="admin")
    assert (response.status_code, detail(response)["code"]) == (400, "INVALID_HEADER")
    assert detail(response)["message"] == "X-Sandbox-Access is 'admin'. Send user, or omit the header."


async def test_keys_are_rotated_by_an_administrator(gateway: Gateway) -> None:
    async def rotate(_: object) -> AccessKeysRotated:
        return AccessKeysRotated(rotated=500, remaining=3, unreadable=1)

    gateway.maintenance.answer = rotate
    response = await gateway.client.post(ROTATE, headers=ADMIN)
    assert response.json() == {"rotated": 500, "remaining": 3, "unreadable": 1}
    (command,) = gateway.maintenance.commands
    assert isinstance(command, RotateAccessKeys)
    assert (await gateway.client.post(ROTATE, headers=STUDENT)).status_code == 403


async def test_a_rotation_without_keys_is_refused(gateway: Gateway) -> None:
    async def refuse(_: object) -> Any:
        return refusal("ACCESS_NOT_CONFIGURED", cause="allocator")

    gateway.maintenance.answer = refuse
    response = await gateway.client.post(ROTATE, headers=ADMIN)
    assert (response.status_code, detail(response)["code"]) == (409, "ACCESS_NOT_CONFIGURED")
