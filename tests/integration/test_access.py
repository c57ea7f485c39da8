"""Logins inside sandboxes on the running broker: a class, kills at every step, a wrong password, a key rotation.

CLASS sets the number of students of the class, SWITCH_SEC the time for which CSP refuses the switch into their
accounts. `CLASS=200 SWITCH_SEC=40 pytest -s` prints the times until the logins are ready.
"""

import asyncio
import os
import random
import statistics
import sys
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import httpx
import pytest
from cryptography.fernet import Fernet

from devstack.conditions import wait_until
from tests.integration.stack import ADMIN, Stack, run_stack, track_headers

LOGIN_EMAIL, LOGIN_PASSWORD = "simulator@example.com", "simulator-password"
CLASS = int(os.environ.get("CLASS", "40"))
SWITCH_SEC = float(os.environ.get("SWITCH_SEC", "8"))
KEY = Fernet.generate_key().decode()
SETTINGS = {
    "CSP_LOGIN_EMAIL": LOGIN_EMAIL,
    "CSP_LOGIN_PASSWORD": LOGIN_PASSWORD,
    "ACCESS_KEYS": KEY,
    "ACCESS_EMAIL_DOMAIN": "labs.example.com",
    "ACCESS_ATTEMPT_TIMEOUT_SEC": "2",
    "ACCESS_REMOVAL_WAIT_SEC": "120",
    "CIRCUIT_BREAKER_TIMEOUT_SEC": "1",
}
NAMED_POINTS = {
    "sign-in": ("POST", "session/users/sign_in", "sign_in"),
    "account switch": ("POST", "session/account_switch", "account_switch"),
    "current user": ("GET", "current_user", "current_user"),
    "groups": ("GET", "groups", "group_listing"),
    "user": ("POST", "users", "user_create"),
    "password": ("POST", "password", "user_password"),
}


@pytest.fixture(scope="module")
async def shared_stack(empty_database_url: str, amqp_url: str) -> AsyncIterator[Stack]:
    async with run_stack(empty_database_url, amqp_url, settings=SETTINGS) as stack:
        yield stack


@pytest.fixture
async def stack(shared_stack: Stack) -> Stack:
    await shared_stack.control("POST", "reset", {})
    return shared_stack


async def get_access(stack: Stack, sandbox_id: str, student: str) -> httpx.Response:
    return await stack.client.get(f"{stack.url}/v1/sandboxes/{sandbox_id}/access", headers=track_headers(student))


async def is_status(stack: Stack, sandbox_id: str, student: str, status: str) -> bool:
    return bool((await get_access(stack, sandbox_id, student)).json().get("status") == status)


async def allocate(stack: Stack, student: str) -> str:
    response = await stack.allocate(student, X_Sandbox_Access="user")
    assert response.status_code == 201, response.text
    return str(response.json()["sandbox_id"])


async def users(stack: Stack) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = (await stack.control("GET", "users"))["users"]
    return records


async def can_sign_in(stack: Stack, login: dict[str, Any]) -> bool:
    body = {"email": login["email"], "password": login["password"]}
    response = await stack.client.post(f"{stack.simulator}/v2/session/users/sign_in", json=body)
    return response.status_code == 200


async def release_all(stack: Stack, leases: dict[str, str]) -> None:
    for sandbox_id, student in leases.items():
        assert (await stack.release(sandbox_id, student)).status_code == 200


async def is_clean(stack: Stack) -> bool:
    """Return whether all released sandboxes are deleted, with the users inside them."""
    return await stack.nothing_pending() and await users(stack) == []


async def test_a_login_from_the_allocation_to_the_deletion(stack: Stack) -> None:
    await stack.fill(2)
    sandbox_id = await allocate(stack, "ann")
    await wait_until(partial(is_status, stack, sandbox_id, "ann", "ready"))
    login = (await get_access(stack, sandbox_id, "ann")).json()
    assert login["email"] == "ann@labs.example.com"
    assert await can_sign_in(stack, login)
    assert (await get_access(stack, sandbox_id, "mallory")).status_code == 403
    await stack.release(sandbox_id, "ann")
    assert (await get_access(stack, sandbox_id, "ann")).status_code == 410
    await wait_until(partial(is_clean, stack))
    assert not await can_sign_in(stack, login)
    deletions = [call["path"].split("/")[2] for call in await stack.deletions()]
    assert deletions == ["users", "sandbox"], "the user is deleted before the account"
    assert await stack.database.fetchval("SELECT state FROM accesses") == "removed"


@pytest.mark.timeout(240 + SWITCH_SEC)
async def test_a_class_gets_its_logins_soon_after_csp_lets_the_broker_in(stack: Stack) -> None:
    await stack.fill(CLASS)
    await stack.control("PATCH", "behaviour", {"account_switch_ready_after_sec": SWITCH_SEC})
    await asyncio.gather(*(allocate(stack, f"s-{number}") for number in range(CLASS)))

    async def are_ready() -> bool:
        ready = "SELECT count(*) = $1 FROM accesses WHERE state = 'ready'"
        return bool(await stack.database.fetchval(ready, CLASS))

    await wait_until(are_ready, within_sec=120 + SWITCH_SEC)
    rows = await stack.database.fetch(
        "SELECT extract(epoch FROM ready_at - requested_at)::float AS ready_sec, attempts FROM accesses"
    )
    percentiles = statistics.quantiles((row["ready_sec"] for row in rows), n=100, method="inclusive")
    sys.stdout.write(
        f"ready after the lease, in s: p50 {percentiles[49]:.1f}, p95 {percentiles[94]:.1f}, "
        f"max {max(row['ready_sec'] for row in rows):.1f}; "
        f"failed attempts for each login: {statistics.mean(row['attempts'] for row in rows):.1f}; "
        f"load of the machine: {os.getloadavg()[0]:.1f}\n"
    )
    assert sorted(user["email"] for user in await users(stack)) == sorted(
        f"s-{number}@labs.example.com" for number in range(CLASS)
    )
    assert len({user["account"] for user in await users(stack)}) == CLASS


@pytest.mark.parametrize("point", NAMED_POINTS)
async def test_a_kill_at_a_step_leaves_one_user(stack: Stack, point: str) -> None:
    """The provisioner dies while CSP carries out this step."""
    await stack.fill(1)
    method, path, operation = NAMED_POINTS[point]
    await _kill_and_restart(stack, "provisioner")  # without a session
    await stack.control("PATCH", "behaviour", {f"{operation}_latency_sec": 1})
    sandbox_id = await allocate(stack, "ann")

    async def is_running() -> bool:
        calls = (await stack.control("GET", f"calls?method={method}&path_contains={path}"))["running"]
        return bool(calls)

    await wait_until(is_running, every_sec=0.05)
    await _kill(stack, "provisioner")
    await stack.control("PATCH", "behaviour", {f"{operation}_latency_sec": 0})
    await stack.start_service("provisioner")
    await wait_until(partial(is_status, stack, sandbox_id, "ann", "ready"), within_sec=60)
    (user,) = await users(stack)
    login = (await get_access(stack, sandbox_id, "ann")).json()
    assert user["id"] == login["user_id"]
    assert await can_sign_in(stack, login)
    await stack.release(sandbox_id, "ann")
    await wait_until(partial(is_clean, stack), within_sec=60)


async def test_a_kill_before_the_record_leaves_one_user(stack: Stack) -> None:
    """The provisioner has created the user and dies before the allocator hears of it."""
    await stack.fill(1)
    await stack.control("PATCH", "behaviour", {"user_password_latency_sec": 1})
    sandbox_id = await allocate(stack, "ann")

    async def has_user() -> bool:
        return len(await users(stack)) == 1

    await wait_until(has_user)
    await _kill(stack, "allocator")

    async def has_password() -> bool:
        return bool((await users(stack))[0]["has_password"])

    await wait_until(has_password)
    await _kill(stack, "provisioner")
    await stack.control("PATCH", "behaviour", {"user_password_latency_sec": 0})
    await stack.start_service("allocator")
    await stack.start_service("provisioner")
    await wait_until(partial(is_status, stack, sandbox_id, "ann", "ready"), within_sec=60)
    (user,) = await users(stack)
    login = (await get_access(stack, sandbox_id, "ann")).json()
    assert user["id"] == login["user_id"]
    assert await can_sign_in(stack, login)


@pytest.mark.parametrize("after_effect", [False, True])
async def test_a_kill_during_the_removal_leaves_no_user(stack: Stack, after_effect: bool) -> None:
    await stack.fill(1)
    sandbox_id = await allocate(stack, "ann")
    await wait_until(partial(is_status, stack, sandbox_id, "ann", "ready"))
    await stack.control("PATCH", "behaviour", {"user_delete_latency_sec": 1})
    await stack.release(sandbox_id, "ann")
    key = "calls" if after_effect else "running"

    async def has_call() -> bool:
        return bool((await stack.control("GET", "calls?method=DELETE&path_contains=users"))[key])

    if after_effect:
        await _kill(stack, "reaper")

        async def is_running() -> bool:
            return bool((await stack.control("GET", "calls?method=DELETE&path_contains=users"))["running"])

        await wait_until(is_running)
        await _kill(stack, "allocator")
    await wait_until(has_call)
    await _kill(stack, "provisioner")
    await stack.control("PATCH", "behaviour", {"user_delete_latency_sec": 0})
    for module in ("allocator", "reaper", "provisioner") if after_effect else ("provisioner",):
        await stack.start_service(module)
    await wait_until(partial(is_clean, stack), within_sec=90)
    assert [call["path"].split("/")[2] for call in await stack.deletions()][-1] == "sandbox"


async def test_random_kills_leave_one_user_for_each_login_and_none_after_the_end(stack: Stack) -> None:
    await stack.fill(24)
    await stack.control(
        "PATCH",
        "behaviour",
        {f"{operation}_latency_spread_sec": 0.2 for _, _, operation in NAMED_POINTS.values()},
    )
    chosen = random.Random(31)
    with_login, without = {}, {}
    for number in range(12):
        sandbox_id = await allocate_after_restart(stack, f"login-{number}", X_Sandbox_Access="user")
        with_login[sandbox_id] = f"login-{number}"
        without[await allocate_after_restart(stack, f"plain-{number}")] = f"plain-{number}"
        if number % 3 == 2:
            await _kill_and_restart(stack, chosen.choice(["provisioner", "allocator", "reaper"]))
    for sandbox_id, student in with_login.items():
        await wait_until(partial(is_status, stack, sandbox_id, student, "ready"), within_sec=90)
    assert sorted(user["email"] for user in await users(stack)) == sorted(
        f"{student}@labs.example.com" for student in with_login.values()
    )
    for sandbox_id, student in with_login.items():
        assert await can_sign_in(stack, (await get_access(stack, sandbox_id, student)).json())
    await release_all(stack, {**with_login, **without})
    for module in ("provisioner", "reaper", "allocator"):
        await _kill_and_restart(stack, module)
    await wait_until(partial(is_clean, stack), within_sec=120)
    assert await stack.database.fetchval("SELECT count(*) FROM accesses WHERE state <> 'removed'") == 0
    await stack.assert_sound()


async def allocate_after_restart(stack: Stack, student: str, **headers: str) -> str:
    """Allocate, and repeat the request, because the gateway notices a new allocator half a second later."""
    responses: list[httpx.Response] = []

    async def is_allocated() -> bool:
        responses.append(await stack.allocate(student, **headers))
        return responses[-1].status_code in (200, 201)

    await wait_until(is_allocated)
    return str(responses[-1].json()["sandbox_id"])


async def _kill(stack: Stack, module: str) -> None:
    stack.processes[module].kill()
    await stack.processes[module].wait()


async def _kill_and_restart(stack: Stack, module: str) -> None:
    await _kill(stack, module)
    await stack.start_service(module)


async def test_a_wrong_password_of_the_administrator_leaves_leases_alone_and_recovers(stack: Stack) -> None:
    await stack.fill(3)
    await _kill_and_restart(stack, "provisioner")  # without a session
    await stack.control("PATCH", "behaviour", {"reject_sign_ins": True})
    sandbox_id = await allocate(stack, "ann")
    await wait_until(partial(is_status, stack, sandbox_id, "ann", "failed"))
    assert "CSP refuses the sign-in" in (await get_access(stack, sandbox_id, "ann")).json()["reason"]
    assert (await stack.allocate("bob")).status_code == 201
    assert (await stack.release(sandbox_id, "ann")).status_code == 200
    other = await allocate(stack, "eve")
    await wait_until(partial(is_status, stack, other, "eve", "failed"))
    await stack.control("PATCH", "behaviour", {"reject_sign_ins": False})
    await wait_until(partial(is_status, stack, other, "eve", "ready"), within_sec=30)


async def test_a_deletion_waits_for_the_removal_no_longer_than_allowed(stack: Stack) -> None:
    await stack.fill(1)
    sandbox_id = await allocate(stack, "ann")
    await wait_until(partial(is_status, stack, sandbox_id, "ann", "ready"))
    await stack.control("PATCH", "behaviour", {"user_delete_error_rate": 1, "user_delete_error_status": 403})
    await stack.release(sandbox_id, "ann")

    async def has_failed() -> bool:
        return bool(await stack.database.fetchval("SELECT attempts > 0 FROM accesses WHERE state = 'removing'"))

    await wait_until(has_failed)
    assert (await stack.stats())["pending_deletion"] == 1
    await stack.database.execute("UPDATE sandboxes SET deletion_due_at = now() WHERE status = 'pending_deletion'")
    await wait_until(stack.nothing_pending)
    (row,) = await stack.database.fetch("SELECT state, email FROM accesses")
    assert tuple(row) == ("remains", "ann@labs.example.com")
    assert [user["email"] for user in await users(stack)] == ["ann@labs.example.com"]


async def test_keys_are_rotated_while_students_use_their_logins(stack: Stack) -> None:
    await stack.fill(2)
    sandbox_id = await allocate(stack, "ann")
    await wait_until(partial(is_status, stack, sandbox_id, "ann", "ready"))
    login = (await get_access(stack, sandbox_id, "ann")).json()
    new = Fernet.generate_key().decode()
    for keys in (f"{KEY},{new}", f"{new},{KEY}"):
        for module in ("gateway", "provisioner", "allocator"):
            await _kill(stack, module)
            await stack.start_service(module, settings={"ACCESS_KEYS": keys})

    async def rotate() -> httpx.Response:
        return await stack.client.post(f"{stack.url}/v1/admin/access/rotate-keys", headers=ADMIN)

    await wait_until(partial(_is_ok, rotate))
    assert (await rotate()).json() == {"rotated": 0, "remaining": 0, "unreadable": 0}
    await _kill(stack, "gateway")
    await stack.start_service("gateway", settings={"ACCESS_KEYS": new})
    assert (await get_access(stack, sandbox_id, "ann")).json() == login
    for module in ("gateway", "provisioner", "allocator"):
        await _kill_and_restart(stack, module)


async def _is_ok(request: Any) -> bool:
    return bool((await request()).status_code == 200)
