"""Student journey: allocation, look-up and release, with the Instruqt scripts and over HTTP."""

import sys
from pathlib import Path

from devstack.conditions import wait_until
from devstack.processes import run
from tests.integration.stack import ROOT, TRACK_TOKEN, Stack

INSTRUQT = ROOT / "instruqt"


async def run_script(stack: Stack, name: str, directory: Path, participant: str) -> tuple[int, str]:
    environment = {
        "PATH": "/usr/bin:/bin",
        "BROKER_API_TOKEN": TRACK_TOKEN,
        "BROKER_API_URL": f"{stack.url}/v1",
        "INSTRUQT_PARTICIPANT_ID": participant,
        "INSTRUQT_TRACK_SLUG": "dns-101",
    }
    return await run([sys.executable, INSTRUQT / name], env=environment, cwd=directory)


async def test_the_scripts_allocate_and_release_a_sandbox(stack: Stack, tmp_path: Path) -> None:
    code, output = await run_script(stack, "instruqt_broker_allocation.py", tmp_path, "ada")
    assert code == 0, output
    sandbox_id = (tmp_path / "sandbox_id.txt").read_text()
    (lease,) = [
        account
        for account in (await stack.control("GET", "accounts"))["accounts"]
        if str(account["csp_id"]) == sandbox_id
    ]
    assert (tmp_path / "external_id.txt").read_text() == lease["id"].removeprefix("identity/accounts/")
    assert (tmp_path / "sandbox_name.txt").read_text() == lease["name"]
    assert sandbox_id in (tmp_path / "sandbox_env.sh").read_text()
    assert (await stack.stats())["allocated"] == 1

    code, output = await run_script(stack, "instruqt_broker_allocation.py", tmp_path, "ada")
    assert code == 0, output
    assert (tmp_path / "sandbox_id.txt").read_text() == sandbox_id
    secret = (tmp_path / "lease_secret.txt").read_text().strip()
    assert (await stack.allocate("ada", X_Lease_Secret=secret)).status_code == 200
    assert (await stack.allocate("ada")).status_code == 403

    other = tmp_path / "other"
    other.mkdir()
    code, output = await run_script(stack, "instruqt_broker_allocation.py", other, "grace")
    assert code == 0, output
    assert (other / "sandbox_id.txt").read_text() != sandbox_id
    assert (await stack.stats())["allocated"] == 2

    for _ in range(2):  # a repeated cleanup succeeds
        code, output = await run_script(stack, "instruqt_broker_cleanup.py", tmp_path, "ada")
        assert code == 0, output

    async def is_deleted() -> bool:
        return (await stack.stats())["deleted"] == 1

    await wait_until(is_deleted)
    (call,) = await stack.deletions()
    assert call["path"].endswith(lease["id"].removeprefix("identity/accounts/"))
    stats = await stack.stats()
    assert (stats["total"], stats["available"], stats["allocated"]) == (50, 48, 1)


async def test_the_shell_test_script_succeeds(stack: Stack, tmp_path: Path) -> None:
    environment = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "BROKER_API_TOKEN": TRACK_TOKEN,
        "BROKER_API_URL": f"{stack.url}/v1",
    }
    code, output = await run(["bash", INSTRUQT / "test_allocation.sh"], env=environment, cwd=tmp_path)
    assert code == 0, output
    assert (await stack.stats())["allocated"] == 1


async def test_the_holder_can_read_the_sandbox_before_and_after_the_release(stack: Stack) -> None:
    lease = (await stack.allocate("ada", X_Instruqt_Track_ID="dns-101")).json()
    address = f"{stack.url}/v1/sandboxes/{lease['sandbox_id']}"
    headers = {"Authorization": f"Bearer {TRACK_TOKEN}", "X-Instruqt-Sandbox-ID": "ada"}
    response = (await stack.client.get(address, headers=headers)).json()
    assert response == {
        **lease,
        "status": "allocated",
        "allocated_to_track": "ada",
        "track_name": "dns-101",
    }
    assert lease["expires_at"] - lease["allocated_at"] == 4 * 3600
    await stack.release(lease["sandbox_id"], "ada")
    released = (await stack.client.get(address, headers=headers)).json()
    assert released["status"] in ("pending_deletion", "deleted")
    other_student = await stack.client.get(address, headers={**headers, "X-Instruqt-Sandbox-ID": "eve"})
    assert (other_student.status_code, other_student.json()["detail"]["code"]) == (403, "NOT_SANDBOX_OWNER")


async def test_a_new_student_never_gets_a_used_sandbox(stack: Stack) -> None:
    await stack.fill(1)
    await stack.control("PATCH", "behaviour", {"delete_latency_sec": 1})
    first = (await stack.allocate("ada")).json()
    assert (await stack.release(first["sandbox_id"], "ada")).status_code == 200
    assert (await stack.sync()).status_code == 200  # CSP still lists it
    assert (await stack.allocate("grace")).status_code == 409
    assert (await stack.allocate("ada")).status_code == 409
