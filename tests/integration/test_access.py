"""Logins inside sandboxes on the running broker: a class, kills at every step, a wrong password, a key rotation.

CLASS sets the number of students of the class, SWITCH_SEC the time for which CSP refuses the switch into their
accounts. `CLASS=200 SWITCH_SEC=40 pytest -s` prints the times until the logins are ready. KILLS sets the number of
random kills (100 for a long run), KILLS_SEED repeats a run.
"""

import asyncio
import itertools
import os
import random
import secrets
import statistics
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.fernet import Fernet

from devstack.conditions import wait_until
from devstack.prometheus import Prometheus
from devstack.testing import NewDatabase, NewVhost
from tests.integration.alert_watch import read_fired_alerts, read_rules_with_seconds, watch_alerts
from tests.integration.crash_stack import kill_at, run_crashing_stack
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
KILLS = int(os.environ.get("KILLS", "3"))
SEED = os.environ.get("KILLS_SEED") or secrets.token_hex(4)
CREATION_STEPS = (
    "the sign-in",
    "the account switch",
    "the current user",
    "the groups",
    "the creation of the user",
    "the password",
)
COMMANDS = ("ClaimAccess", "RecordAccess", "RecordAccessFailure", "RecordAccessRemoval")
POINTS = [
    *(f"provisioner: during {step}" for step in CREATION_STEPS),
    *(f"provisioner: after {step}" for step in CREATION_STEPS),
    "provisioner: before the record of a login",
    "provisioner: after the records and the claim",
    *(f"provisioner: {when} the deletion of the user" for when in ("before", "during", "after")),
    *(f"allocator: {when} {command}" for command in COMMANDS for when in ("before", "after")),
    "allocator: before the ack",
    *(f"reaper: {when}" for when in ("after the claim", "before CSP", "after CSP", "after the record")),
]


@pytest.fixture(scope="module")
async def shared_stack(empty_database_url: str, amqp_url: str) -> AsyncIterator[Stack]:
    async with run_stack(empty_database_url, amqp_url, settings=SETTINGS) as stack:
        yield stack


@pytest.fixture
async def stack(shared_stack: Stack) -> Stack:
    await shared_stack.control("POST", "reset", {})
    return shared_stack


@pytest.fixture(scope="module")
async def crashing(
    new_database: NewDatabase, new_vhost: NewVhost, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Stack]:
    settings = {
        **SETTINGS,
        "ACCESS_ATTEMPT_TIMEOUT_SEC": "1",
        "CLEANUP_INTERVAL_SEC": "1",
        "CIRCUIT_BREAKER_THRESHOLD": "1000",
        "DELETION_MAX_ATTEMPTS": "1000",
    }
    directory = tmp_path_factory.mktemp("crashes")
    async with run_crashing_stack(new_database, new_vhost, directory, settings) as stack:
        yield stack


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


async def use_login(stack: Stack, student: str) -> None:
    """Allocate with a login, sign in with it, and release. Retry each change, because services are killed."""
    sandbox_id = await allocate_after_restart(stack, student, X_Sandbox_Access="user")
    await wait_until(partial(is_status, stack, sandbox_id, student, "ready"), within_sec=90)
    login = (await get_access(stack, sandbox_id, student)).json()
    own = [user["id"] for user in await users(stack) if user["email"] == f"{student}@labs.example.com"]
    assert own == [login["user_id"]], SEED
    assert await can_sign_in(stack, login), SEED
    assert (await get_access(stack, sandbox_id, "mallory")).status_code == 403
    await wait_until(partial(is_released, stack, sandbox_id, student), within_sec=60)
    assert (await get_access(stack, sandbox_id, student)).status_code == 410


async def work_without_login(stack: Stack, student: str) -> None:
    sandbox_id = await allocate_after_restart(stack, student)
    assert (await get_access(stack, sandbox_id, student)).status_code == 404
    await wait_until(partial(is_released, stack, sandbox_id, student), within_sec=60)


async def is_released(stack: Stack, sandbox_id: str, student: str) -> bool:
    return (await stack.release(sandbox_id, student)).status_code == 200


@pytest.mark.parametrize("point", POINTS)
async def test_a_kill_at_this_point_leaves_one_user_and_then_none(crashing: Stack, point: str) -> None:
    await crashing.fill(1)
    # The first switch fails, so that a failure is recorded.
    await crashing.control("PATCH", "behaviour", {"fail_next_account_switches": 1})
    if "sign-in" in point:
        await _kill_and_restart(crashing, "provisioner")  # without a session
    Path(crashing.environment["DIE_AT"]).write_text(point)
    await asyncio.gather(use_login(crashing, "ann"), kill_at(crashing, point))
    await wait_until(partial(is_clean, crashing), within_sec=90)
    assert await crashing.database.fetchval("SELECT state FROM accesses") == "removed"
    await crashing.assert_sound()


@pytest.mark.timeout(120 + 30 * KILLS)
async def test_random_kills_leave_one_user_for_each_login_and_none_after_the_end(crashing: Stack) -> None:
    rng = random.Random(SEED)
    await crashing.fill(10 * KILLS)
    await crashing.control("PATCH", "behaviour", {"account_switch_error_rate": 0.3, "user_create_error_rate": 0.1})
    killed = logins = 0
    for number in itertools.count():
        point = rng.choice(POINTS)
        Path(crashing.environment["DIE_AT"]).write_text(point)
        demand = asyncio.gather(
            *(use_login(crashing, f"login-{number}-{other}") for other in range(2)),
            work_without_login(crashing, f"plain-{number}"),
        )

        async def is_over(demand: "asyncio.Future[list[None]]" = demand) -> bool:
            return demand.done() and await is_clean(crashing)

        killed += await kill_at(crashing, point, is_over)
        await demand
        logins += 2
        if killed == KILLS:
            break
    await wait_until(partial(is_clean, crashing), within_sec=120)
    states = await crashing.database.fetch("SELECT state, count(*) FROM accesses GROUP BY state")
    assert list(map(tuple, states)) == [("removed", logins)], SEED
    await crashing.assert_sound()


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
    await stack.forget_allocators()


async def _kill_and_restart(stack: Stack, module: str) -> None:
    await _kill(stack, module)
    await stack.start_service(module)


async def test_a_wrong_password_of_the_administrator_leaves_leases_alone_and_recovers(
    stack: Stack, tmp_path: Path
) -> None:
    """One alert fires, and ends after the correction."""
    await stack.fill(3)
    await _kill_and_restart(stack, "provisioner")  # without a session
    await stack.control("PATCH", "behaviour", {"reject_sign_ins": True})
    async with watch_alerts(stack, tmp_path, read_rules_with_seconds()) as watch:
        sandbox_id = await allocate(stack, "ann")
        await wait_until(partial(is_status, stack, sandbox_id, "ann", "failed"))
        assert "CSP refuses the sign-in" in (await get_access(stack, sandbox_id, "ann")).json()["reason"]
        assert (await stack.allocate("bob")).status_code == 201
        assert (await stack.release(sandbox_id, "ann")).status_code == 200
        other = await allocate(stack, "eve")
        await wait_until(partial(is_status, stack, other, "eve", "failed"))
        await wait_until(partial(has_failed_for_long, watch))
        await stack.control("PATCH", "behaviour", {"reject_sign_ins": False})
        await wait_until(partial(is_status, stack, other, "eve", "ready"), within_sec=30)

        async def is_over() -> bool:
            return "BrokerAccessSignInRefused" not in [
                alert["labels"]["alertname"] for alert in await watch.firing()
            ]

        await wait_until(is_over)
        assert await read_fired_alerts(watch) == ({"BrokerAccessSignInRefused"}, 1)


async def has_failed_for_long(watch: Prometheus) -> bool:
    """Return whether logins have failed for longer than the waiting time of BrokerAccessFailed, which is 10 s."""
    failed = "broker:access_failed:max[15s]"
    return bool(await watch.query(f"min_over_time({failed}) > 0 and count_over_time({failed}) > 13"))


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
