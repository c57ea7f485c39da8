"""brokerctl with a running broker: named tokens, the audit, and personal data."""

import json
import signal
from typing import Any

import httpx

from tests.integration.ctl import run_brokerctl, start_brokerctl
from tests.integration.stack import Stack


async def create_token(stack: Stack, name: str, *options: str) -> str:
    result = await run_brokerctl(stack, "token", "create", name, *options, "--json")
    assert result.status == 0, result
    token: str = result.json["token"]
    return token


async def allocate(stack: Stack, token: str, student: str) -> httpx.Response:
    return await stack.allocate(student, Authorization=f"Bearer {token}", X_Instruqt_Track_ID="a")


async def lease(stack: Stack, token: str, student: str) -> str:
    """Allocate a sandbox with the token; return its id."""
    response = await allocate(stack, token, student)
    assert response.status_code == 201, response.text
    sandbox_id: str = response.json()["sandbox_id"]
    return sandbox_id


async def test_a_token_is_created_listed_and_revoked(stack: Stack) -> None:
    created = ("lab-a", "--role", "track", "--track", "a", "--max-active", "2", "--reason", "new lab")
    token = await create_token(stack, *created)
    await lease(stack, token, "ada")
    (listed,) = (await run_brokerctl(stack, "token", "list", "--json")).json["tokens"]
    assert (listed["name"], listed["role"], listed["tracks"], listed["max_active"]) == ("lab-a", "track", ["a"], 2)
    shown = (await run_brokerctl(stack, "token", "list")).out
    assert "lab-a" in shown
    assert "2 active" in shown
    assert token not in shown
    refused = await run_brokerctl(stack, "token", "create", *created, "--json")
    assert (refused.status, refused.error["code"]) == (1, "TOKEN_EXISTS")

    revoked = await run_brokerctl(stack, "token", "revoke", "lab-a", "--reason", "class over")
    assert (revoked.status, "The token lab-a is revoked." in revoked.out) == (0, True)
    assert (await allocate(stack, token, "bob")).status_code == 401
    assert "no named token" in (await run_brokerctl(stack, "token", "list")).out
    refused = await run_brokerctl(stack, "token", "revoke", "other", "--json")
    assert (refused.status, refused.error["code"]) == (1, "TOKEN_NOT_FOUND")
    audit = (await run_brokerctl(stack, "audit", "--object", "lab-a", "--json")).lines
    assert [(entry["action"], entry["reason"], entry["outcome"]) for entry in audit] == [
        ("token.create", "new lab", "done"),
        ("token.create", "new lab", "TOKEN_EXISTS"),
        ("token.revoke", "class over", "done"),
    ]


async def test_contain_suspends_a_token_and_ends_its_leases(stack: Stack) -> None:
    token = await create_token(stack, "lab-a", "--role", "track")
    sandboxes = {await lease(stack, token, student) for student in ("ada", "bob")}
    suspended = await run_brokerctl(stack, "token", "contain", "lab-a", "--json")
    assert suspended.json["released"] == []
    assert {entry["sandbox_id"] for entry in suspended.json["leases"]} == sandboxes
    assert (await allocate(stack, token, "cid")).status_code == 401
    assert "suspended" in (await run_brokerctl(stack, "token", "list")).out
    resumed = await run_brokerctl(stack, "token", "resume", "lab-a")
    assert "The token lab-a is valid again." in resumed.out
    assert (await allocate(stack, token, "ada")).status_code == 200

    contain = ("token", "contain", "lab-a", "--release", "--reason", "leaked")
    unconfirmed = await run_brokerctl(stack, *contain)
    assert unconfirmed.status != 0
    assert "--yes" in unconfirmed.err
    contained = await run_brokerctl(stack, *contain, "--yes", "--json")
    assert (set(contained.json["released"]), contained.json["leases"]) == (sandboxes, [])
    assert "It has no active lease." in (await run_brokerctl(stack, *contain, "--yes")).out
    assert (await allocate(stack, token, "ada")).status_code == 401
    for sandbox_id in sandboxes:
        (entry,) = (await run_brokerctl(stack, "audit", "--object", sandbox_id, "--json")).lines
        assert (entry["action"], entry["reason"]) == ("lease.release", "leaked")


async def test_one_command_shows_who_released_a_sandbox_and_why(stack: Stack) -> None:
    operator = await create_token(stack, "night-shift", "--role", "operator")
    sandbox_id = (await stack.allocate("ada")).json()["sandbox_id"]
    release = ("release", sandbox_id, "--reason", "class over")
    assert (await run_brokerctl(stack, *release, BROKER_ADMIN_TOKEN=operator)).status == 0

    (line,) = (await run_brokerctl(stack, "audit", "--object", sandbox_id)).out.splitlines()
    for part in ("night-shift", "lease.release", sandbox_id, "done", "reason: class over", "from 127.0.0.1"):
        assert part in line


async def test_the_audit_shows_refusals_of_a_leaked_token(stack: Stack) -> None:
    token = await create_token(stack, "lab-b", "--role", "track", "--track", "b")
    assert (await allocate(stack, token, "ada")).status_code == 403
    (entry,) = (await run_brokerctl(stack, "audit", "--actor", "lab-b", "--json")).lines
    assert (entry["action"], entry["object"], entry["outcome"]) == ("lease.allocate", "a", "FORBIDDEN_SCOPE")


async def test_audit_follow_prints_each_new_entry_once(stack: Stack) -> None:
    insert = (
        "INSERT INTO audit (audit_id, actor, action, object, outcome) OVERRIDING SYSTEM VALUE "
        "VALUES ($1, 'a', 'token.create', $2, 'done')"
    )
    await create_token(stack, "first", "--role", "viewer")
    following = await start_brokerctl(f"{stack.url}/v1", "audit", "--follow", "--action", "token.create", "--json")
    assert following.stdout is not None

    async def next_object() -> Any:
        assert following.stdout is not None
        return json.loads(await following.stdout.readline())["object"]

    assert await next_object() == "first"
    await create_token(stack, "second", "--role", "viewer")
    assert await next_object() == "second"
    # The transaction with the lower id commits last.
    await stack.database.execute(insert, 0, "late")
    assert await next_object() == "late"
    await create_token(stack, "third", "--role", "viewer")
    assert await next_object() == "third"
    following.send_signal(signal.SIGINT)
    out, _ = await following.communicate()
    assert (following.returncode, out) == (0, b"")


async def test_a_student_is_forgotten(stack: Stack) -> None:
    sandbox_id = (await stack.allocate("ada")).json()["sandbox_id"]
    forget = ("forget", "ada", "--reason", "ada asked", "--yes", "--json")
    refused = await run_brokerctl(stack, *forget)
    assert (refused.status, refused.error["code"]) == (1, "STUDENT_HAS_LEASE")
    await run_brokerctl(stack, "release", sandbox_id, "--reason", "ada left")
    unconfirmed = await run_brokerctl(stack, "forget", "ada")
    assert unconfirmed.status != 0
    assert "--yes" in unconfirmed.err

    forgotten = (await run_brokerctl(stack, *forget)).json
    pseudonym = forgotten["pseudonym"]
    assert forgotten == {"pseudonym": pseudonym, "leases": 1}
    assert "never had a sandbox" in (await run_brokerctl(stack, "who", "ada")).out
    (record,) = (await run_brokerctl(stack, "who", pseudonym, "--json")).json
    assert (record["sandbox_id"], record["end_note"]) == (sandbox_id, f"{pseudonym} left")
    audit = (await run_brokerctl(stack, "audit", "--json")).lines
    reasons = [entry["reason"] for entry in audit if entry["action"] in ("student.forget", "lease.release")]
    assert reasons == [f"{pseudonym} asked", f"{pseudonym} left", f"{pseudonym} asked"]
    repeated = await run_brokerctl(stack, "forget", "ada", "--yes")
    assert f"0 past leases have the pseudonym {pseudonym} now." in repeated.out
