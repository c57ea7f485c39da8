"""Scripts of existing tracks work unchanged with the broker."""

import asyncio
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from devstack.conditions import wait_until
from tests.integration.stack import TRACK_TOKEN, Stack

SCRIPT = Path(__file__).with_name("legacy_track.py")


@dataclass
class Track:
    """Machine of one student."""

    stack: Stack
    student: str
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    async def run(self, action: str, **environment: str) -> tuple[int, str]:
        """Run the script. Returns the exit code and the output."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(SCRIPT),
            action,
            cwd=self.folder,
            env={
                **self.stack.environment,
                "BROKER_API_URL": f"{self.stack.url}/v1",
                "BROKER_API_TOKEN": TRACK_TOKEN,
                "INSTRUQT_PARTICIPANT_ID": self.student,
                "INSTRUQT_TRACK_SLUG": "dns-basics",
                **self.environment,
                **environment,
            },
            stdout=asyncio.subprocess.PIPE,
        )
        output, _ = await process.communicate()
        return process.returncode or 0, output.decode().strip()

    def read_file(self, name: str) -> str:
        return (self.folder / f"{name}.txt").read_text()


@pytest.fixture
def ada(stack: Stack, tmp_path: Path) -> Track:
    return Track(stack, "inst-ada", tmp_path)


@pytest.mark.parametrize("student_header", ["X-Instruqt-Sandbox-ID", "X-Track-ID"])
async def test_a_repeated_allocation_returns_the_same_sandbox(ada: Track, student_header: str) -> None:
    ada.environment["STUDENT_HEADER"] = student_header
    assert await ada.run("allocate") == (0, f"201 {4 * 3600}")
    lease = await ada.stack.database.fetchrow(
        "SELECT sandbox_id, external_id, name, leases.track_name FROM leases JOIN sandboxes USING (sandbox_id) "
        "WHERE holder = 'inst-ada' AND ended_at IS NULL"
    )
    files = (ada.read_file("sandbox_id"), ada.read_file("external_id"), ada.read_file("sandbox_name"), "dns-basics")
    assert lease is not None
    assert tuple(lease) == files
    assert await ada.run("allocate") == (0, f"200 {4 * 3600}")
    assert ada.read_file("sandbox_id") == lease["sandbox_id"]
    code, output = await ada.run("cleanup")
    assert (code, output.split()[:3]) == (0, ["200", lease["sandbox_id"], "pending_deletion"])


async def test_the_prefix_is_applied(ada: Track) -> None:
    assert await ada.run("allocate", SANDBOX_NAME_PREFIX="sandbox-4") == (0, f"201 {4 * 3600}")
    assert ada.read_file("sandbox_name").startswith("sandbox-4")


async def test_repeated_and_late_cleanups_succeed(ada: Track) -> None:
    await ada.run("allocate")
    sandbox_id = ada.read_file("sandbox_id")
    released = await ada.stack.admin("POST", f"sandboxes/{sandbox_id}/release", reason="the class is over")
    assert released.status_code == 200

    async def is_deleted() -> bool:
        return (await ada.stack.stats())["deleted"] == 1

    for _ in range(2):
        assert (await ada.run("cleanup"))[0] == 0
    await wait_until(is_deleted)
    for _ in range(2):
        code, output = await ada.run("cleanup")
        assert (code, output.split()[:3]) == (0, ["200", sandbox_id, "deleted"])
    await ada.stack.database.execute("DELETE FROM sandboxes WHERE sandbox_id = $1", sandbox_id)  # purged
    code, output = await ada.run("cleanup")
    assert (code, output.split()[:3]) == (0, ["200", sandbox_id, "deleted"])


async def test_the_script_reads_errors_from_the_body(ada: Track) -> None:
    code, output = await ada.run("allocate", SANDBOX_NAME_PREFIX="nothing-")
    assert code == 1
    assert output.startswith("409 POOL_EXHAUSTED No available sandboxes in pool with the name prefix 'nothing-'")
    assert (await ada.run("allocate", BROKER_API_TOKEN="wrong"))[1].startswith(
        "401 UNAUTHORIZED The token is unknown."
    )
    await ada.run("allocate")
    code, output = await ada.run("cleanup", INSTRUQT_PARTICIPANT_ID="inst-eve")
    assert (code, output.split()[:2]) == (1, ["403", "NOT_SANDBOX_OWNER"])
    (ada.folder / "sandbox_id.txt").write_text("unknown-sandbox")
    code, output = await ada.run("cleanup")
    assert (code, output.split()[:2]) == (1, ["404", "SANDBOX_NOT_FOUND"])
