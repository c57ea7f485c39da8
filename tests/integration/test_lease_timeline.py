"""A lease follows the lab: hot start, extension and replacement on the running broker."""

from typing import Any

import httpx

from devstack.conditions import wait_until
from tests.integration.stack import Stack, track_headers


async def post(stack: Stack, path: str, student: str, json: Any = None, **headers: str) -> httpx.Response:
    url = f"{stack.url}/v1/sandboxes/{path}"
    return await stack.client.post(url, headers=track_headers(student) | headers, json=json)


async def read(stack: Stack, sandbox_id: str) -> dict[str, Any]:
    story: dict[str, Any] = (await stack.admin("GET", f"sandboxes/{sandbox_id}")).json()
    return story


async def test_a_hot_start_with_an_extension_and_a_broken_sandbox(stack: Stack) -> None:
    await stack.fill(3)
    standby = await stack.allocate("hot-start-1", **{"X-Lease-Mode": "standby"})
    assert standby.status_code == 201
    broken = standby.json()["sandbox_id"]
    assert (await stack.stats())["standby"] == 1

    claimed = await post(stack, f"{broken}/claim", "hot-start-1", **{"X-New-Holder": "ada"})
    repeated = await post(stack, f"{broken}/claim", "hot-start-1", **{"X-New-Holder": "ada"})
    assert claimed.json() == repeated.json()
    assert claimed.json()["mode"] == "active"
    assert (await stack.stats())["standby"] == 0

    key = {"Idempotency-Key": "extension-1"}
    extended = await post(stack, f"{broken}/extend", "ada", {"hours": 2}, **key)
    again = await post(stack, f"{broken}/extend", "ada", {"hours": 2}, **key)
    assert extended.json() == again.json()
    assert extended.json()["expires_at"] == claimed.json()["expires_at"] + 7200
    refused = await post(stack, f"{broken}/extend", "ada", {"hours": 3})
    assert (refused.status_code, refused.json()["detail"]["code"]) == (409, "EXTENSION_LIMIT")

    replaced = await post(stack, f"{broken}/replace", "ada", {"reason": "no DNS"})
    assert replaced.status_code == 201
    new = replaced.json()["sandbox_id"]
    second = await post(stack, f"{new}/replace", "ada", {"reason": "no DNS"})
    assert (second.status_code, second.json()["detail"]["code"]) == (409, "REPLACEMENT_LIMIT")

    # A clean-up leaves the broken sandbox to the operator.
    assert (await stack.admin("POST", "cleanup")).status_code == 200
    story = await read(stack, broken)
    assert (story["status"], story["end_reason"], story["end_note"]) == ("pending_deletion", "broken", "no DNS")
    assert story["replaced_by"] == new
    assert story["deletion_hold_until"] - story["deletion_requested_at"] == 24 * 3600
    assert [step["event"] for step in story["history"]][-4:] == [
        "lease.claimed",
        "lease.extended",
        "sandbox.deletion_requested",
        "sandbox.replaced",
    ]
    assert (await stack.stats())["on_hold"] == 1
    assert await stack.deletions() == []

    ended = await stack.admin("POST", f"sandboxes/{broken}/retry-deletion", end_hold="true")
    assert ended.status_code == 200

    async def is_deleted() -> bool:
        return bool((await read(stack, broken))["status"] == "deleted")

    await wait_until(is_deleted)
    assert (await stack.release(new, "ada")).status_code == 200
