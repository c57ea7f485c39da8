"""What a newcomer does: `make run`, the command that it prints, Ctrl-C."""

import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from devstack.ports import free_port, is_free
from devstack.processes import Process, run, spawn
from devstack.testing import NewDatabase, NewVhost
from tests.integration.stack import PORTS, ROOT, eventually

STATE = ROOT / ".devstack"
LOOPBACK = {"0100007F", "0" * 24 + "01000000"}
"""127.0.0.1 and ::1, as /proc/net/tcp and tcp6 have them."""


@pytest.fixture
async def environment(new_database: NewDatabase, new_vhost: NewVhost) -> AsyncIterator[dict[str, str]]:
    async with new_database() as database_url, new_vhost() as amqp_url:
        before = files()
        yield {
            **{name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "BROKER_"))},
            "DATABASE_URL": database_url,
            "AMQP_URL": amqp_url,
            **{variable: str(free_port()) for variable in (*PORTS.values(), "CSP_SIMULATOR_PORT")},
        }
        for path in files() - before:
            path.unlink()


def files() -> set[Path]:
    """In the folders of `make run` and of the demo."""
    return {path for path in STATE.rglob("*") if path.is_file()}


async def until_line(process: Process, lines: list[str], text: str) -> None:
    async def written() -> bool:
        assert process.running, lines[-20:]
        return any(text in line for line in lines)

    await eventually(written, within_sec=60)


def pid_of(module: str, database_url: str) -> int:
    """The process that runs our module on this database, found as the kernel tells it."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().split(b"\0")
            environment = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if module.encode() in command and f"DATABASE_URL={database_url}".encode() in environment:
            return int(process.name)
    raise AssertionError(f"no process runs {module}")


def administrator(lines: list[str]) -> dict[str, str]:
    """Return the header with the admin token that was printed."""
    (line,) = (line for line in lines if line.startswith("  admin token "))
    return {"Authorization": f"Bearer {line.split()[-1]}"}


def listening_addresses(port: int) -> set[str]:
    """Return the local addresses that have a listener on the port, as the kernel writes them."""
    rows = [
        row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    listening = [row[1].rsplit(":", 1) for row in rows if row[3] == "0A"]
    return {address for address, hexadecimal in listening if int(hexadecimal, 16) == port}


async def test_the_printed_command_leases_a_sandbox_and_ctrl_c_stops_everything(
    environment: dict[str, str], tmp_path: Path
) -> None:
    lines: list[str] = []
    make = await spawn("make run", ["make", "run"], env=environment, cwd=ROOT, on_line=lines.append)
    try:
        await until_line(make, lines, "Ctrl-C stops everything.")
        start = next(number for number, line in enumerate(lines) if "INSTRUQT_PARTICIPANT_ID" in line)
        command = f"{lines[start]}\n{lines[start + 1]}"
        code, said = await run(["bash", "-c", command], cwd=tmp_path)
        assert code == 0, said
        written = {path.name for path in tmp_path.iterdir()}
        assert written == {"sandbox_id.txt", "external_id.txt", "sandbox_name.txt", "sandbox_env.sh"}
        async with httpx.AsyncClient(trust_env=False) as client:
            stats = await client.get(
                f"http://127.0.0.1:{environment['GATEWAY_PORT']}/v1/admin/stats", headers=administrator(lines)
            )
        assert (stats.json()["available"], stats.json()["allocated"]) == (49, 1)
        for variable in (*PORTS.values(), "CSP_SIMULATOR_PORT"):
            assert listening_addresses(int(environment[variable])) <= LOOPBACK
        brokerctl = Path(sys.executable).with_name("brokerctl")
        code, said = await run(
            [brokerctl, "pool"], env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"}, cwd=tmp_path
        )
        assert code == 0, said
        end = next(number for number, line in enumerate(lines) if line.strip().endswith("brokerctl status"))
        operator = f"{lines[end - 1]}\n{lines[end]}"

        async def all_is_well() -> bool:  # on a busy machine a part may be late, and seem down
            code, said = await run(["bash", "-c", operator], cwd=tmp_path)
            return code == 0 and "Nothing needs attention." in said

        await eventually(all_is_well, within_sec=120)
    finally:
        # As the terminal does it: to make and to what it runs.
        os.killpg(make.pid, signal.SIGINT)
        await make.wait()
    assert any("Everything that was started has stopped." in line for line in lines)
    assert all(is_free(int(environment[variable])) for variable in (*PORTS.values(), "CSP_SIMULATOR_PORT"))


async def test_the_demo_says_where_to_look_and_students_come(environment: dict[str, str]) -> None:
    lines: list[str] = []
    environment |= {"PROMETHEUS_PORT": str(free_port())}
    demo = await spawn("make demo", ["make", "demo"], env=environment, cwd=ROOT, on_line=lines.append)
    try:
        await until_line(demo, lines, "  Prometheus ")
        await until_line(demo, lines, "40 students come to dns-101")

        async def somebody_has_a_sandbox() -> bool:
            async with httpx.AsyncClient(trust_env=False) as client:
                stats = await client.get(
                    f"http://127.0.0.1:{environment['GATEWAY_PORT']}/v1/admin/stats", headers=administrator(lines)
                )
            return bool(stats.json()["allocated"] > 0)

        await eventually(somebody_has_a_sandbox)
    finally:
        os.killpg(demo.pid, signal.SIGINT)
        await demo.wait()
    assert any("Everything that was started has stopped." in line for line in lines)
    ports = (*PORTS.values(), "CSP_SIMULATOR_PORT", "PROMETHEUS_PORT")
    assert all(is_free(int(environment[variable])) for variable in ports)


async def test_when_a_service_dies_it_is_named_and_the_rest_is_stopped(environment: dict[str, str]) -> None:
    lines: list[str] = []
    make = await spawn("make run", ["make", "run"], env=environment, cwd=ROOT, on_line=lines.append)
    try:
        await until_line(make, lines, "Ctrl-C stops everything.")
        os.kill(pid_of("reaper", environment["DATABASE_URL"]), signal.SIGKILL)
        assert await make.wait() == 2  # make's own word for a target that failed
    finally:
        make.kill()
    assert any("reaper was ended by SIGKILL" in line for line in lines), lines[-20:]
    assert all(is_free(int(environment[variable])) for variable in (*PORTS.values(), "CSP_SIMULATOR_PORT"))
