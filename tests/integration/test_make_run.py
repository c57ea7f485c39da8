"""First steps of a new user: `make run`, the printed command, Ctrl-C."""

import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from playwright.async_api import expect

from devstack.conditions import wait_until
from devstack.ports import free_port, is_free
from devstack.processes import Process, run, spawn
from devstack.testing import NewDatabase, NewVhost
from tests.integration.console_page import launch_browser, open_console
from tests.integration.stack import PORTS, ROOT

STATE = ROOT / ".devstack"
LOOPBACK = {"0100007F", "0" * 24 + "01000000"}
"""127.0.0.1 and ::1 in the format of /proc/net/tcp and tcp6."""


@pytest.fixture
async def environment(new_database: NewDatabase, new_vhost: NewVhost) -> AsyncIterator[dict[str, str]]:
    async with new_database() as database_url, new_vhost() as amqp_url:
        before = state_files()
        yield {
            **{name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "BROKER_"))},
            "DATABASE_URL": database_url,
            "AMQP_URL": amqp_url,
            **{variable: str(free_port()) for variable in (*PORTS.values(), "CSP_SIMULATOR_PORT")},
        }
        for path in state_files() - before:
            path.unlink()


def state_files() -> set[Path]:
    """Return the state files of `make run` and of the demo."""
    return {path for path in STATE.rglob("*") if path.is_file()}


async def wait_for_line(process: Process, lines: list[str], text: str, *, within_sec: float = 60) -> None:
    async def is_printed() -> bool:
        assert process.running, lines[-20:]
        return any(text in line for line in lines)

    await wait_until(is_printed, within_sec=within_sec)


def find_pid(module: str, database_url: str) -> int:
    """Return the id of the process that runs the module on this database, from /proc."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().split(b"\0")
            environment = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if module.encode() in command and f"DATABASE_URL={database_url}".encode() in environment:
            return int(process.name)
    raise AssertionError(f"no process runs {module}")


def admin_headers(lines: list[str]) -> dict[str, str]:
    """Return the header with the admin token that was printed."""
    (line,) = (line for line in lines if line.startswith("  admin token "))
    return {"Authorization": f"Bearer {line.split()[-1]}"}


def listening_addresses(port: int) -> set[str]:
    """Return the local addresses that have a listener on the port, in the format of the kernel."""
    rows = [
        row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    listening = [row[1].rsplit(":", 1) for row in rows if row[3] == "0A"]
    return {address for address, hexadecimal in listening if int(hexadecimal, 16) == port}


async def test_the_printed_command_leases_a_sandbox_and_ctrl_c_stops_all_processes(
    environment: dict[str, str], tmp_path: Path
) -> None:
    lines: list[str] = []
    make = await spawn("make run", ["make", "run"], env=environment, cwd=ROOT, on_line=lines.append)
    try:
        await wait_for_line(make, lines, "Ctrl-C stops everything.")
        start = next(number for number, line in enumerate(lines) if "INSTRUQT_PARTICIPANT_ID" in line)
        command = f"{lines[start]}\n{lines[start + 1]}"
        code, output = await run(["bash", "-c", command], cwd=tmp_path)
        assert code == 0, output
        created = {path.name for path in tmp_path.iterdir()}
        assert created == {
            "sandbox_id.txt",
            "external_id.txt",
            "sandbox_name.txt",
            "sandbox_env.sh",
            "lease_secret.txt",
        }
        async with httpx.AsyncClient(trust_env=False) as client:
            stats = await client.get(
                f"http://127.0.0.1:{environment['GATEWAY_PORT']}/v1/admin/stats", headers=admin_headers(lines)
            )
        assert (stats.json()["available"], stats.json()["allocated"]) == (49, 1)
        await use_login(command, environment, tmp_path / "login")
        for variable in (*PORTS.values(), "CSP_SIMULATOR_PORT"):
            assert listening_addresses(int(environment[variable])) <= LOOPBACK
        brokerctl = Path(sys.executable).with_name("brokerctl")
        code, output = await run(
            [brokerctl, "pool"], env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"}, cwd=tmp_path
        )
        assert code == 0, output
        end = next(number for number, line in enumerate(lines) if line.strip().endswith("brokerctl status"))
        operator = f"{lines[end - 1]}\n{lines[end]}"

        async def is_healthy() -> bool:  # on a busy machine a component can seem down at first
            code, output = await run(["bash", "-c", operator], cwd=tmp_path)
            return code == 0 and "Nothing needs attention." in output

        await wait_until(is_healthy, within_sec=120)
    finally:
        # Like a terminal, signal make and its child processes.
        os.killpg(make.pid, signal.SIGINT)
        await make.wait()
    assert any("All processes have stopped." in line for line in lines)
    assert all(is_free(int(environment[variable])) for variable in (*PORTS.values(), "CSP_SIMULATOR_PORT"))


async def use_login(command: str, environment: dict[str, str], directory: Path) -> None:
    """Allocate with --access, sign in to the simulator as the student, and clean up."""
    directory.mkdir()
    simulator = f"http://127.0.0.1:{environment['CSP_SIMULATOR_PORT']}"
    command = command.replace("INSTRUQT_PARTICIPANT_ID=student-1", "INSTRUQT_PARTICIPANT_ID=student-2")
    code, output = await run(["bash", "-c", f"{command} --access"], cwd=directory)
    assert code == 0, output
    email, password = ((directory / f"user_{name}.txt").read_text() for name in ("email", "password"))
    assert email == "student-2@labs.example.com"
    async with httpx.AsyncClient(trust_env=False) as client:
        response = await client.post(
            f"{simulator}/v2/session/users/sign_in", json={"email": email, "password": password}
        )
        assert response.status_code == 200
        assert password not in output
        cleanup = command.replace("instruqt_broker_allocation", "instruqt_broker_cleanup")
        code, output = await run(["bash", "-c", cleanup], cwd=directory)
        assert code == 0, output
        external_id = (directory / "external_id.txt").read_text()

        async def are_user_and_account_gone() -> bool:
            users = (await client.get(f"{simulator}/_control/users")).json()["users"]
            accounts = (await client.get(f"{simulator}/_control/accounts")).text
            return not users and external_id not in accounts

        await wait_until(are_user_and_account_gone)


async def test_the_demo_prints_its_addresses_and_its_students_appear_in_the_console(
    environment: dict[str, str],
) -> None:
    """The Overview is open while two classes arrive, until its chart begins with the second sample of the pool."""
    lines: list[str] = []
    environment |= {"PROMETHEUS_PORT": str(free_port())}
    demo = await spawn("make demo", ["make", "demo"], env=environment, cwd=ROOT, on_line=lines.append)
    try:
        await wait_for_line(demo, lines, "  Prometheus ")
        token = admin_headers(lines)["Authorization"].split()[1]
        url = f"http://127.0.0.1:{environment['CONSOLE_PORT']}"
        async with launch_browser() as browser, open_console(browser, url, token) as console:
            tiles = console.page.locator(".tiles")
            await wait_for_line(demo, lines, "25 students of exam-401 have a sandbox")
            await wait_for_line(demo, lines, "40 students start dns-101")
            await expect(tiles.locator(".allocated .value")).to_have_text(re.compile("^[1-9]"))
            await expect(console.page.get_by_role("row", name="exam-")).to_be_visible()
            await expect(console.page.locator(".chart canvas")).to_be_visible(timeout=60_000)
            await expect(console.page.locator("#offline")).to_be_hidden()
            assert console.problems == []
    finally:
        os.killpg(demo.pid, signal.SIGINT)
        await demo.wait()
    assert any("All processes have stopped." in line for line in lines)
    ports = (*PORTS.values(), "CSP_SIMULATOR_PORT", "PROMETHEUS_PORT")
    assert all(is_free(int(environment[variable])) for variable in ports)


async def test_a_dead_service_is_reported_and_the_others_are_stopped(environment: dict[str, str]) -> None:
    lines: list[str] = []
    make = await spawn("make run", ["make", "run"], env=environment, cwd=ROOT, on_line=lines.append)
    try:
        await wait_for_line(make, lines, "Ctrl-C stops everything.")
        os.kill(find_pid("reaper", environment["DATABASE_URL"]), signal.SIGKILL)
        assert await make.wait() == 2  # the exit status of make for a failed target
    finally:
        make.kill()
    assert any("reaper was ended by SIGKILL" in line for line in lines), lines[-20:]
    assert all(is_free(int(environment[variable])) for variable in (*PORTS.values(), "CSP_SIMULATOR_PORT"))
