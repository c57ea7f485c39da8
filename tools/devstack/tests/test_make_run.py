"""`make run` as a process, with stand-ins for the services and the simulator."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from dotenv import dotenv_values

from devstack import pool
from devstack.conditions import wait_until
from devstack.errors import CannotRun
from devstack.main import SERVICES
from devstack.ports import free_port
from devstack.processes import Process, spawn
from devstack.settings import PORTS

pytest_plugins = ("devstack.fixtures",)

PROCESSES = len(SERVICES) + 1
"""With the simulator."""
STAND_IN = """
import http.server, os, signal, sys, threading

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'{"total": 50, "available": 50, "allocated": 0}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        if self.path == "/die":
            print("internal error", flush=True)
            os._exit(7)
        print("POST", self.path, self.headers["Authorization"], flush=True)
        self.do_GET()

    def log_message(self, *_):
        pass

def stop(*_):
    print("finishing", flush=True)
    os._exit(0)

def serve(variable):
    signal.signal(signal.SIGTERM, stop)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ[variable])), Handler)
    print("pid", os.getpid(), "log format", os.environ["LOG_FORMAT"], flush=True)
    print("bind host", os.environ["BIND_HOST"], flush=True)
    server.serve_forever()
"""
# The child processes import the stand-ins, `make run` itself does not.
ENTRY = """
import os, sys
from pathlib import Path
sys.path.remove(os.environ["PYTHONPATH"])
from devstack.main import main

sys.exit(main(Path(sys.argv[1])))
"""
MODULES = {
    "gateway": "GATEWAY_PORT",
    "allocator": "ALLOCATOR_PORT",
    "reaper": "REAPER_PORT",
    "csp_syncer": "CSP_SYNCER_PORT",
    "provisioner": "PROVISIONER_PORT",
    "console": "CONSOLE_PORT",
    "csp_simulator": "CSP_SIMULATOR_PORT",
}


MakeRun = Callable[..., Awaitable[Process]]


@pytest.fixture
def environ(tmp_path: Path, own_postgres_url: str, amqp_url: str) -> dict[str, str]:
    """Variables of a run with real servers and stand-ins for the services."""
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "stand_in.py").write_text(STAND_IN)
    for module, variable in MODULES.items():
        (modules / f"{module}.py").write_text(f"import stand_in; stand_in.serve({variable!r})\n")
    (modules / "sandbox_broker").mkdir()
    (modules / "sandbox_broker" / "__init__.py").touch()
    (modules / "sandbox_broker" / "migrate.py").write_text("print('up to date')\n")
    return {
        **{name: value for name, value in os.environ.items() if name in {"PATH", "HOME"}},
        **{name: str(free_port()) for name in PORTS},
        "PYTHONPATH": str(modules),
        "DATABASE_URL": own_postgres_url,
        "AMQP_URL": amqp_url,
    }


@pytest.fixture
async def make_run(tmp_path: Path, environ: dict[str, str]) -> AsyncIterator[MakeRun]:
    runs: list[Process] = []

    async def start(**changes: str) -> Process:
        run = await spawn("make run", [sys.executable, "-c", ENTRY, tmp_path], env={**environ, **changes})
        run.tail = type(run.tail)(maxlen=1000)
        runs.append(run)
        return run

    yield start
    for run in runs:
        run.kill()
        await run.wait()


async def wait_for_line(run: Process, text: str) -> str:
    """Wait for a line with the text. Return the first one."""
    async with asyncio.timeout(60):
        while True:
            for line in run.tail:
                if text in line:
                    return line
            assert run.running, list(run.tail)
            await asyncio.sleep(0.01)


def replace_module(environ: dict[str, str], module: str, code: str) -> None:
    """Replace the code of a stand-in."""
    Path(environ["PYTHONPATH"], module).write_text(code)


def is_alive(pid: int) -> bool:
    """Return False for a process that has ended, also for a zombie."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def stand_in_pids(run: Process) -> list[int]:
    """Return the process ids printed by the stand-ins."""
    return [int(line.split(" pid ")[1].split()[0]) for line in run.tail if " pid " in line]


async def test_all_processes_start_the_pool_is_filled_and_the_addresses_are_printed(
    make_run: MakeRun, environ: dict[str, str], tmp_path: Path
) -> None:
    run = await make_run()
    ready = await wait_for_line(run, "Ready after")
    await wait_for_line(run, "Ctrl-C stops everything")

    text = "\n".join(run.tail)
    assert "Pool: 50 available." in ready
    for tag in ("migrate      │ up to date", "gateway      │ pid", "csp-simulator│ pid", "csp-syncer   │ pid"):
        assert tag in text
    assert f"http://127.0.0.1:{environ['GATEWAY_PORT']}/v1/docs" in text
    tokens = dotenv_values(tmp_path / ".devstack" / "tokens.env")
    assert f"POST /v1/admin/sync?force=true Bearer {tokens['BROKER_ADMIN_TOKEN']}" in text
    assert f"  track token    {tokens['BROKER_API_TOKEN']}" in text
    assert f"  admin token    {tokens['BROKER_ADMIN_TOKEN']}" in text
    assert f"BROKER_API_TOKEN={tokens['BROKER_API_TOKEN']} INSTRUQT_PARTICIPANT_ID" in text
    assert f"BROKER_ADMIN_TOKEN={tokens['BROKER_ADMIN_TOKEN']} " in text
    assert "bind host 127.0.0.1,::1" in text
    assert "log format json" in text
    run.send(signal.SIGINT)
    await run.wait()


async def test_ctrl_c_stops_the_services_then_the_simulator_with_exit_status_0(make_run: MakeRun) -> None:
    run = await make_run()
    await wait_for_line(run, "Ctrl-C stops everything")

    run.send(signal.SIGINT)

    assert await run.wait() == 0
    last = [line.split("│")[0].strip() for line in run.tail if "finishing" in line]
    assert sorted(last[:-1]) == sorted(SERVICES)
    assert last[-1] == "csp-simulator"
    assert not any(is_alive(pid) for pid in stand_in_pids(run))


async def test_a_second_sigterm_has_no_effect(make_run: MakeRun) -> None:
    run = await make_run()
    await wait_for_line(run, "Ctrl-C stops everything")

    run.send(signal.SIGTERM)
    run.send(signal.SIGTERM)

    assert await run.wait() == 0
    assert sum("finishing" in line for line in run.tail) == PROCESSES


async def test_ctrl_c_during_the_start_stops_all_processes(make_run: MakeRun, environ: dict[str, str]) -> None:
    replace_module(environ, "reaper.py", "import time; print('slow', flush=True); time.sleep(60)")
    run = await make_run()
    await wait_for_line(run, "reaper       │ slow")

    run.send(signal.SIGINT)

    assert await run.wait() == 0
    assert not any(is_alive(pid) for pid in stand_in_pids(run))


async def test_a_second_ctrl_c_kills_all_processes(make_run: MakeRun, environ: dict[str, str]) -> None:
    ignore_stop = "stand_in.stop = lambda *_: print('not yet', flush=True)"
    replace_module(environ, "reaper.py", f"import stand_in\n{ignore_stop}\nstand_in.serve('REAPER_PORT')\n")
    run = await make_run()
    await wait_for_line(run, "Ctrl-C stops everything")
    run.send(signal.SIGINT)
    await wait_for_line(run, "not yet")

    run.send(signal.SIGINT)

    async with asyncio.timeout(30):
        assert await run.wait() == 0
    assert not any(is_alive(pid) for pid in stand_in_pids(run))


async def test_a_dead_service_is_reported_and_the_others_are_stopped(
    make_run: MakeRun, environ: dict[str, str]
) -> None:
    run = await make_run()
    await wait_for_line(run, "Ctrl-C stops everything")

    async with httpx.AsyncClient(trust_env=False) as client:
        with pytest.raises(httpx.HTTPError):
            await client.post(f"http://127.0.0.1:{environ['REAPER_PORT']}/die")

    assert await run.wait() == 1
    lines = list(run.tail)
    start = lines.index("reaper ended with exit code 7. Its last lines:")
    assert "    internal error" in lines[start:]
    assert sum("finishing" in line for line in lines[start:]) == PROCESSES - 1
    assert not any(is_alive(pid) for pid in stand_in_pids(run))


async def test_a_service_that_dies_during_its_start_is_reported(make_run: MakeRun, environ: dict[str, str]) -> None:
    Path(environ["PYTHONPATH"], "reaper.py").write_text(
        "raise SystemExit('cannot start: CSP_API_TOKEN is not set')"
    )

    run = await make_run()

    assert await run.wait() == 1
    assert "reaper ended with exit code 1. Its last lines:" in run.tail
    assert not any(is_alive(pid) for pid in stand_in_pids(run))


async def test_a_failed_migration_stops_the_start(make_run: MakeRun, environ: dict[str, str]) -> None:
    replace_module(environ, "sandbox_broker/migrate.py", "raise SystemExit('revision 7 is unknown')")

    run = await make_run()

    assert await run.wait() == 1
    assert run.tail[-1] == "make run: the migration of the database failed: revision 7 is unknown"


async def test_no_orphans_remain_after_a_kill(make_run: MakeRun) -> None:
    run = await make_run()
    await wait_for_line(run, "Ctrl-C stops everything")

    run.send(signal.SIGKILL)
    await run.wait()

    await wait_until(lambda: not any(is_alive(pid) for pid in stand_in_pids(run)))
    assert len(stand_in_pids(run)) == PROCESSES


async def test_a_port_in_use_is_reported_with_its_variable(make_run: MakeRun, environ: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", int(environ["REAPER_PORT"]))):
        run = await make_run()

        assert await run.wait() == 2

    assert list(run.tail) == [
        f"make run: port {environ['REAPER_PORT']} is in use by another program; set REAPER_PORT to a free port"
    ]


async def test_two_services_cannot_share_a_port(make_run: MakeRun, environ: dict[str, str]) -> None:
    run = await make_run(REAPER_PORT=environ["ALLOCATOR_PORT"])

    assert await run.wait() == 2
    assert "ALLOCATOR_PORT and REAPER_PORT are both" in run.tail[-1]


async def test_an_unreachable_database_is_reported_in_one_line(make_run: MakeRun) -> None:
    run = await make_run(DATABASE_URL=f"postgresql://me@127.0.0.1:{free_port()}/unused")

    assert await run.wait() == 2
    assert len(run.tail) == 1
    assert run.tail[0].startswith("make run: cannot connect to DATABASE_URL")


async def test_a_second_run_on_the_same_database_is_refused(make_run: MakeRun) -> None:
    first = await make_run()
    await wait_for_line(first, "Ready after")

    second = await make_run(**{name: str(free_port()) for name in PORTS})

    assert await second.wait() == 2
    assert "is already running in this clone" in second.tail[-1]


async def test_with_a_real_csp_no_simulator_runs_and_the_sync_is_not_forced(make_run: MakeRun) -> None:
    run = await make_run(
        CSP_BASE_URL="https://csp.example/v2", CSP_API_TOKEN="csp-token-of-the-user", BROKER_ADMIN_TOKEN="new, old"
    )
    await wait_for_line(run, "Ctrl-C stops everything")

    text = "\n".join(run.tail)
    assert "POST /v1/admin/sync Bearer new" in text
    assert "csp-simulator" not in text
    assert "csp-token-of-the-user" not in text
    assert "admin token    $BROKER_ADMIN_TOKEN" in text


async def test_a_service_that_is_not_ready_is_reported_with_its_response(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool, "READY_SEC", 3)

    async def respond_503(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):  # the client may give up
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 8\r\n\r\nno queue")
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(respond_503, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(CannotRun, match="reaper responds: 503 no queue") as caught:
            await pool.wait_until_ready({"reaper": f"http://127.0.0.1:{port}/readyz"})

    assert caught.value.status == 1
