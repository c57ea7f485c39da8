"""The simulator as a process: start, state file, stop."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from csp_simulator.accounts import Accounts, StateError

COMMAND = [sys.executable, "-m", "csp_simulator"]


@contextlib.contextmanager
def simulator(*options: str, **env: str) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """Yields the process and a client of its /v2, once it is ready."""
    with subprocess.Popen(
        [*COMMAND, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **env},
    ) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[-1]
            with httpx.Client(base_url=url, headers={"Authorization": "Token simulator-token"}) as client:
                yield process, client
        finally:
            process.kill()


def results(client: httpx.Client) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = client.get("/current_user/accounts", timeout=60).json()["results"]
    return [r for r in listed if (r["account_type"], r["state"]) == ("sandbox", "active")]


def control(client: httpx.Client, path: str) -> str:
    return str(client.base_url).removesuffix("v2/") + "_control" + path


def test_serves_fifty_accounts_and_says_only_where() -> None:
    with simulator("--port", "0") as (process, client):
        assert len(results(client)) == 50
        process.send_signal(signal.SIGTERM)
        rest, errors = process.communicate(timeout=10)
        assert (process.returncode, rest, errors) == (0, "", "")


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_stops_soon_even_while_a_call_hangs(stop: signal.Signals) -> None:
    with simulator("--port", "0", "--accounts", "1") as (process, client):
        switches = {"listing_latency_sec": 600}
        client.patch(control(client, "/behaviour"), json=switches).raise_for_status()
        with pytest.raises(httpx.ReadTimeout):
            client.get("/current_user/accounts", timeout=0.2)
        process.send_signal(stop)
        _, errors = process.communicate(timeout=10)
        assert (process.returncode, errors) == (0, "")


def test_a_failure_of_its_own_is_500_in_json_with_the_reason_in_the_output(tmp_path: Path) -> None:
    directory = tmp_path / "gone"
    directory.mkdir()
    state = directory / "state.json"
    with simulator("--port", "0", "--accounts", "1", "--state", str(state)) as (process, client):
        state.unlink()
        directory.rmdir()
        response = client.post(control(client, "/accounts"), json={"count": 1})
        assert response.status_code == 500
        assert "failed" in response.json()["error"]
        process.terminate()
        assert "cannot write the state file" in process.communicate(timeout=10)[1]


def test_the_port_may_come_from_the_environment() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with simulator(CSP_SIMULATOR_PORT=str(port)) as (_, client):
        assert client.base_url.port == port
        assert len(results(client)) == 50


def test_a_restart_goes_on_with_the_same_accounts(tmp_path: Path) -> None:
    state = str(tmp_path / "state.json")
    with simulator("--port", "0", "--accounts", "3", "--state", state) as (process, client):
        first, *kept = results(client)
        client.delete("/sandbox/accounts/" + first["id"].removeprefix("identity/accounts/")).raise_for_status()
        # Killed, not stopped: what was answered must be in the file by then.
        process.kill()
    with simulator("--port", "0", "--accounts", "4", "--state", state) as (_, client):
        accounts = results(client)
    assert accounts[:2] == kept
    assert [(a["name"], a["csp_id"]) for a in accounts[2:]] == [
        ("sandbox-4", 2012227),
        ("sandbox-5", 2012228),
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "{}", '{"accounts": 5, "next_csp_id": 1, "next_numbers": {}}', "\x00"]
)
def test_a_damaged_state_file_is_refused_and_left_alone(tmp_path: Path, content: str) -> None:
    state = tmp_path / "state.json"
    state.write_text(content)
    with pytest.raises(StateError, match=r"is damaged; delete it to start afresh$"):
        Accounts(state)
    assert state.read_text() == content


def test_a_hundred_thousand_accounts_take_little_memory_however_often_they_are_listed() -> None:
    with simulator("--port", "0", "--accounts", "100000") as (process, client):
        for account in results(client)[:5]:
            client.delete("/sandbox/accounts/" + account["id"].removeprefix("identity/accounts/"))
            listing = client.get("/current_user/accounts", timeout=60).content
        status = Path(f"/proc/{process.pid}/status").read_text()
    peak_kib = int(status.partition("VmHWM:")[2].split()[0])
    # The records, the listing, and once more while it is put together.
    assert peak_kib * 1024 < 12 * len(listing)


def run_in_vain(*options: str) -> str:
    done = subprocess.run([*COMMAND, *options], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    return done.stderr


def test_a_damaged_state_file_ends_the_start_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{")
    complaint = run_in_vain("--port", "0", "--state", str(tmp_path / "state.json"))
    assert complaint.count("\n") == 1
    assert "damaged" in complaint


def test_a_state_file_that_cannot_be_written_ends_the_start_with_one_line(tmp_path: Path) -> None:
    complaint = run_in_vain("--port", "0", "--state", str(tmp_path / "missing" / "state.json"))
    assert complaint.count("\n") == 1
    assert "cannot write" in complaint


def test_a_port_in_use_ends_the_start_with_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        complaint = run_in_vain("--port", port)
    assert complaint.count("\n") == 1
    assert f"cannot listen on 127.0.0.1:{port}" in complaint


@pytest.mark.parametrize("options", [("--port", "x"), ("--port", "70000"), ("--accounts", "-1")])
def test_a_wrong_option_is_refused_by_name(options: tuple[str, str]) -> None:
    assert f"argument {options[0]}: invalid" in run_in_vain(*options)


def test_the_state_file_is_json_that_a_person_can_read(tmp_path: Path) -> None:
    accounts = Accounts(tmp_path / "state.json")
    accounts.add(2, "lab-")
    state = json.loads((tmp_path / "state.json").read_text())
    assert state["next_csp_id"] == 2012226
    assert state["next_numbers"] == {"lab-": 3}
    assert [a["name"] for a in state["accounts"][-2:]] == ["lab-1", "lab-2"]
