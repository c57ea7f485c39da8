"""Named tokens, lease secrets and the audit on the running broker."""

import asyncio
import time
from typing import Any

import httpx
import pytest

from devstack.conditions import wait_until
from devstack.ports import free_port
from gateway.api import role_table
from tests.integration.stack import ADMIN, Stack

SECRET = "the secret of the script"
SANDBOX = "/v1/sandboxes/{sandbox_id}"
REQUEST_BODIES = {f"{SANDBOX}/extend": {"hours": 1}, f"{SANDBOX}/replace": {"reason": "no DNS"}}
"""Body of the request by path."""
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


@pytest.mark.parametrize("scope", [{"tracks": ["b"]}, {"prefixes": ["lab-b-"]}, {"tracks": ["a"]}])
async def test_a_track_token_reaches_no_lease_of_another_by_any_route(stack: Stack, scope: dict[str, Any]) -> None:
    """Not even with the lab of the lease in its scope, because another token made the lease."""
    document = (await stack.client.get(f"{stack.url}/v1/openapi.json")).json()
    routes = [route for route in role_table.list_routes(document) if "track" in role_table.permitted_roles(*route)]
    assert len(routes) >= 7
    own = await issue(stack, name="own", role="track", tracks=["a"])
    other = await issue(stack, name="other", role="track", **scope)
    leased = await allocate(stack, own, "ann", "a")
    assert leased.status_code == 201, leased.text
    sandbox_id = leased.json()["sandbox_id"]

    async def send(method: str, path: str, token: dict[str, str], **more: str) -> httpx.Response:
        url = f"{stack.url}{path.replace('{sandbox_id}', sandbox_id)}"
        headers = {**token, "X-Instruqt-Sandbox-ID": "ann", "X-Instruqt-Track-ID": "a", **more}
        return await stack.client.request(method, url, headers=headers, json=REQUEST_BODIES.get(path))

    async def read_state() -> list[tuple[Any, ...]]:
        rows = await stack.database.fetch("SELECT * FROM leases JOIN sandboxes USING (sandbox_id)")
        return [tuple(row) for row in rows]

    before = await read_state()
    for method, path in routes:
        for lab in ({}, {"X-Instruqt-Track-ID": "b", "X-Sandbox-Name-Prefix": "lab-b-"}):
            refused = await send(method, path, other, **lab)
            code = refused.json().get("detail", {}).get("code")
            assert (refused.status_code, code) == (403, "FORBIDDEN_SCOPE"), (method, path, refused.text)
            assert leased.json()["external_id"] not in refused.text
    assert await read_state() == before
    for method, path in sorted(routes, key=lambda route: "mark-for-deletion" in route[1]):
        permitted = await send(method, path, own)
        assert permitted.status_code not in (401, 403), (method, path, permitted.text)
    ended = await stack.admin("POST", f"sandboxes/{sandbox_id}/retry-deletion", end_hold="true")
    assert ended.status_code == 200, ended.text


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
