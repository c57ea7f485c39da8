"""Kill the allocator in the middle of each change of a lease. The repeated request has its effect once."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path

import httpx
import pytest

from devstack.conditions import wait_until
from devstack.testing import NewDatabase, NewVhost
from tests.integration.crash_stack import run_crashing_stack
from tests.integration.stack import Stack, track_headers


@pytest.fixture(scope="module")
async def crashing(
    new_database: NewDatabase, new_vhost: NewVhost, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Stack]:
    directory = tmp_path_factory.mktemp("crashes")
    async with run_crashing_stack(new_database, new_vhost, directory, {"ALLOCATE_TIMEOUT_SEC": "1"}) as stack:
        yield stack


async def change(stack: Stack, path: str, student: str, body: object = None, **headers: str) -> httpx.Response:
    url = f"{stack.url}/v1/sandboxes/{path}"
    return await stack.client.post(url, headers=track_headers(student) | headers, json=body)


async def repeat_over_the_kill(
    stack: Stack, command: str, moment: str, send: Callable[[], Awaitable[httpx.Response]]
) -> httpx.Response:
    """Kill the allocator at the command, start it again, and repeat the request until it is answered."""
    point_file = Path(stack.environment["DIE_AT"])
    point_file.write_text(f"allocator: {moment} {command}")
    lost = await send()
    assert lost.status_code in (503, 504), lost.text
    await stack.processes["allocator"].wait()
    assert not point_file.exists()
    await stack.start_service("allocator")
    answered: list[httpx.Response] = []

    async def is_answered() -> bool:
        answered[:] = [await send()]
        return answered[0].status_code < 500

    await wait_until(is_answered)
    return answered[0]


async def read_events(stack: Stack, sandbox_id: str) -> list[str]:
    story = (await stack.admin("GET", f"sandboxes/{sandbox_id}")).json()
    return [step["event"] for step in story["history"]]


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_an_extension_is_granted_once(crashing: Stack, moment: str) -> None:
    await crashing.fill(1)
    lease = (await crashing.allocate("ada")).json()
    send = partial(
        change,
        crashing,
        f"{lease['sandbox_id']}/extend",
        "ada",
        {"hours": 3},
        **{"Idempotency-Key": "extension"},
    )
    extended = (await repeat_over_the_kill(crashing, "ExtendLease", moment, send)).json()
    assert extended == {
        "expires_at": lease["expires_at"] + 3 * 3600,
        "max_expires_at": lease["expires_at"] + 4 * 3600,
    }
    assert (await read_events(crashing, lease["sandbox_id"])).count("lease.extended") == 1
    await crashing.assert_sound()


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_a_standby_lease_is_claimed_once(crashing: Stack, moment: str) -> None:
    await crashing.fill(1)
    lease = (await crashing.allocate("setup", **{"X-Lease-Mode": "standby"})).json()
    send = partial(change, crashing, f"{lease['sandbox_id']}/claim", "setup", **{"X-New-Holder": "ada"})
    claimed = (await repeat_over_the_kill(crashing, "ClaimLease", moment, send)).json()
    assert (claimed["sandbox_id"], claimed["mode"]) == (lease["sandbox_id"], "active")
    assert claimed["expires_at"] == claimed["claimed_at"] + 4 * 3600
    assert (await read_events(crashing, lease["sandbox_id"])).count("lease.claimed") == 1
    await crashing.assert_sound()


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_a_broken_sandbox_is_replaced_once(crashing: Stack, moment: str) -> None:
    await crashing.fill(3)
    broken = (await crashing.allocate("ada")).json()["sandbox_id"]
    send = partial(change, crashing, f"{broken}/replace", "ada", {"reason": "no DNS"})
    replacement = await repeat_over_the_kill(crashing, "ReplaceSandbox", moment, send)
    assert replacement.is_success
    assert (await crashing.allocate("ada")).json()["sandbox_id"] == replacement.json()["sandbox_id"]
    assert (await read_events(crashing, broken)).count("sandbox.replaced") == 1
    stats = await crashing.stats()
    assert (stats["available"], stats["allocated"], stats["on_hold"]) == (1, 1, 1)
    await crashing.assert_sound()


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_the_end_of_a_play_ends_its_lease_once(crashing: Stack, moment: str) -> None:
    await crashing.fill(2)
    lease = (await crashing.allocate("ada")).json()
    send = partial(crashing.end_play, "ada", ended_at=time.time())
    ended = await repeat_over_the_kill(crashing, "EndPlay", moment, send)
    assert ended.json()["outcome"] in ("released", "no_lease")
    await wait_until(crashing.nothing_pending)
    story = (await crashing.admin("GET", f"sandboxes/{lease['sandbox_id']}")).json()
    assert (story["status"], story["end_reason"]) == ("deleted", "play_ended")
    assert len(await crashing.deletions()) == 1
    await crashing.assert_sound()
