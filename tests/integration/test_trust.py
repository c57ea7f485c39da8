"""Named tokens, lease secrets and the audit on the running broker."""

import asyncio
import time
from typing import Any

import httpx

from devstack.conditions import wait_until
from devstack.ports import free_port
from tests.integration.stack import ADMIN, Stack

SECRET = "the secret of the script"
REVOKED_WITHIN_SEC = 5


async def issue(stack: Stack, **grant: Any) -> dict[str, str]:
    """Issue a named token; return its header."""
    return {"Authorization": f"Bearer {await stack.issue_token(**grant)}"}


async def allocate(stack: Stack, token: dict[str, str], student: str, track: str, **more: str) -> httpx.Response:
    headers = {**token, "X-Instruqt-Sandbox-ID": student, "X-Instruqt-Track-ID": track, **more}
    return await stack.client.post(f"{stack.url}/v1/allocate", headers=headers)


async def test_a_leaked_token_is_contained_and_the_audit_says_who_and_why(stack: Stack) -> None:
    lab = await issue(stack, name="lab-a", role="track", tracks=["a"], max_active=2)
    shift = await issue(stack, name="night-shift", role="operator")
    headers = {"X-Lease-Secret": SECRET}
    leased = await allocate(stack, lab, "student-1", "a", **headers)
    assert leased.status_code == 201, leased.text
    sandbox_id = leased.json()["sandbox_id"]
    refused = await allocate(stack, lab, "student-2", "b")
    assert (refused.status_code, refused.json()["detail"]["code"]) == (403, "FORBIDDEN_SCOPE")
    stolen = await allocate(stack, lab, "student-1", "a")
    assert (stolen.status_code, stolen.json()["detail"]["code"]) == (403, "NOT_SANDBOX_OWNER")
    assert (await allocate(stack, lab, "student-2", "a")).status_code == 201
    full = await allocate(stack, lab, "student-3", "a")
    assert (full.status_code, full.json()["detail"]["code"]) == (409, "QUOTA_EXCEEDED")

    released = await stack.client.post(
        f"{stack.url}/v1/admin/sandboxes/{sandbox_id}/release", headers=shift, params={"reason": "class over"}
    )
    assert released.status_code == 200, released.text
    audit = (await stack.admin("GET", "audit", object=sandbox_id)).json()["entries"]
    assert [(entry["actor"], entry["action"], entry["reason"], entry["outcome"]) for entry in audit] == [
        ("night-shift", "lease.release", "class over", "done")
    ]

    contained = await stack.admin("POST", "tokens/lab-a/suspend", release="true", reason="leaked")
    assert contained.status_code == 200, contained.text
    assert (len(contained.json()["released"]), contained.json()["leases"]) == (1, [])
    assert (await allocate(stack, lab, "student-4", "a")).status_code == 401
    assert (await stack.admin("DELETE", "tokens/lab-a")).status_code == 204

    forgotten = await stack.client.post(
        f"{stack.url}/v1/admin/forget", headers=ADMIN, json={"student": "student-1"}
    )
    assert forgotten.status_code == 200, forgotten.text
    assert (await stack.admin("GET", "allocations", holder="student-1")).json()["count"] == 0

    async def is_use_recorded() -> bool:
        listed = (await stack.admin("GET", "tokens")).json()["tokens"]
        return [entry["last_used_at"] is not None for entry in listed] == [True]

    await wait_until(is_use_recorded)


async def test_the_students_of_old_leases_become_pseudonyms(stack: Stack) -> None:
    """The csp-syncer has the ids replaced when it starts, and then every hour."""
    old = (await stack.allocate("student-1")).json()["sandbox_id"]
    assert (await stack.release(old, "student-1")).status_code == 200
    await wait_until(stack.nothing_pending)
    held = (await stack.allocate("student-1")).json()["sandbox_id"]
    await stack.database.execute(
        "UPDATE leases SET ended_at = now() - interval '401 days' WHERE sandbox_id = $1", old
    )
    await stack.processes["csp_syncer"].stop()
    await stack.start_service("csp_syncer")

    async def is_replaced() -> bool:
        holder = await stack.database.fetchval("SELECT holder FROM leases WHERE sandbox_id = $1", old)
        return bool(holder.startswith("forgotten-"))

    await wait_until(is_replaced)
    events = await stack.database.fetch("SELECT data::text FROM history WHERE sandbox_id = $1", old)
    assert events
    assert "student-1" not in str(events)
    listed = (await stack.admin("GET", "allocations", holder="student-1")).json()["allocations"]
    assert [entry["sandbox_id"] for entry in listed] == [held]


async def test_three_gateways_refuse_a_revoked_token_within_5_s(stack: Stack) -> None:
    ports = [free_port(), free_port()]
    gateways = [
        await stack.start_service("gateway", name=f"gateway {port}", settings={"GATEWAY_PORT": str(port)})
        for port in ports
    ]
    urls = [stack.url, *(f"http://127.0.0.1:{port}" for port in ports)]
    try:
        await _revoke_tokens_of(stack, urls)
    finally:
        await asyncio.gather(*(gateway.stop() for gateway in gateways))


async def _revoke_tokens_of(stack: Stack, urls: list[str]) -> None:
    student = {"X-Instruqt-Sandbox-ID": "student-1", "X-Instruqt-Track-ID": "a"}
    lab = await issue(stack, name="lab", role="track", tracks=["a"]) | student
    auditor = await issue(stack, name="auditor", role="operator")
    leased = await stack.client.post(f"{stack.url}/v1/allocate", headers=lab)
    assert leased.status_code == 201, leased.text
    reads = [("/v1/admin/audit", auditor), (f"/v1/sandboxes/{leased.json()['sandbox_id']}", lab)]

    async def read_everywhere() -> list[int]:
        requests = (stack.client.get(url + path, headers=headers) for url in urls for path, headers in reads)
        return [response.status_code for response in await asyncio.gather(*requests)]

    async def are_refused() -> bool:
        return 200 not in await read_everywhere()

    assert set(await read_everywhere()) == {200}
    revoked = [await stack.admin("DELETE", f"tokens/{name}") for name in ("lab", "auditor")]
    revoked_at = time.monotonic()
    assert [response.status_code for response in revoked] == [204, 204]
    # The allocator knows the revocation from its commit on, before the gateways do.
    for url in urls:
        assert (await stack.client.post(f"{url}/v1/allocate", headers=lab)).status_code == 401
    await wait_until(are_refused, within_sec=revoked_at + REVOKED_WITHIN_SEC - time.monotonic())

    async def are_unknown() -> bool:
        return set(await read_everywhere()) == {401}

    await wait_until(are_unknown)
