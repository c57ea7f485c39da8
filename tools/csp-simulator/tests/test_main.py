"""Simulator process: start, state file, stop."""

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

from csp_simulator.accounts import AccountStore, StateError

COMMAND = [sys.executable, "-m", "csp_simulator"]


@contextlib.contextmanager
def run_simulator(*options: str, **env: str) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """Start a simulator; yield its process and a client for /v2 when it is ready."""
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


def fetch_sandboxes(client: httpx.Client) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = client.get("/current_user/accounts", timeout=60).json()["results"]
    return [r for r in listed if (r["account_type"], r["state"]) == ("sandbox", "active")]


def build_control_url(client: httpx.Client, path: str) -> str:
    return str(client.base_url).removesuffix("v2/") + "_control" + path


def test_default_is_50_accounts_and_one_line_of_output() -> None:
    with run_simulator("--port", "0") as (process, client):
        assert len(fetch_sandboxes(client)) == 50
        process.send_signal(signal.SIGTERM)
        rest, errors = process.communicate(timeout=10)
        assert (process.returncode, rest, errors) == (0, "", "")


@pytest.mark.parametrize("stop_signal", [signal.SIGTERM, signal.SIGINT])
def test_hanging_call_does_not_delay_the_stop(stop_signal: signal.Signals) -> None:
    with run_simulator("--port", "0", "--accounts", "1") as (process, client):
        switches = {"listing_latency_sec": 600}
        client.patch(build_control_url(client, "/behaviour"), json=switches).raise_for_status()
        with pytest.raises(httpx.ReadTimeout):
            client.get("/current_user/accounts", timeout=0.2)
        process.send_signal(stop_signal)
        _, errors = process.communicate(timeout=10)
        assert (process.returncode, errors) == (0, "")


def test_internal_error_is_500_in_json_with_the_reason_on_stderr(tmp_path: Path) -> None:
    directory = tmp_path / "gone"
    directory.mkdir()
    state = directory / "state.json"
    with run_simulator("--port", "0", "--accounts", "1", "--state", str(state)) as (process, client):
        state.unlink()
        directory.rmdir()
        response = client.post(build_control_url(client, "/accounts"), json={"count": 1})
        assert response.status_code == 500
        assert "failed" in response.json()["error"]
        process.terminate()
        assert "cannot write the state file" in process.communicate(timeout=10)[1]


def test_port_can_come_from_the_environment() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with run_simulator(CSP_SIMULATOR_PORT=str(port)) as (_, client):
        assert client.base_url.port == port
        assert len(fetch_sandboxes(client)) == 50


def test_restart_keeps_the_accounts(tmp_path: Path) -> None:
    state = str(tmp_path / "state.json")
    with run_simulator("--port", "0", "--accounts", "3", "--state", state) as (process, client):
        first, *kept = fetch_sandboxes(client)
        client.delete("/sandbox/accounts/" + first["id"].removeprefix("identity/accounts/")).raise_for_status()
        # Kill, because the file must contain an answered deletion without a clean stop.
        process.kill()
    with run_simulator("--port", "0", "--accounts", "4", "--state", state) as (_, client):
        accounts = fetch_sandboxes(client)
    assert accounts[:2] == kept
    assert [(a["name"], a["csp_id"]) for a in accounts[2:]] == [
        ("sandbox-4", 2012227),
        ("sandbox-5", 2012228),
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "{}", '{"accounts": 5, "next_csp_id": 1, "next_numbers": {}}', "\x00"]
)
def test_damaged_state_file_is_refused_and_not_changed(tmp_path: Path, content: str) -> None:
    state = tmp_path / "state.json"
    state.write_text(content)
    with pytest.raises(StateError, match=r"is damaged; delete it to start with new accounts$"):
        AccountStore(state)
    assert state.read_text() == content


def test_repeated_listings_of_100_000_accounts_use_little_memory() -> None:
    with run_simulator("--port", "0", "--accounts", "100000") as (process, client):
        for account in fetch_sandboxes(client)[:5]:
            client.delete("/sandbox/accounts/" + account["id"].removeprefix("identity/accounts/"))
            listing = client.get("/current_user/accounts", timeout=60).content
        status = Path(f"/proc/{process.pid}/status").read_text()
    peak_kib = int(status.partition("VmHWM:")[2].split()[0])
    # Memory holds the records, the listing, and a second copy while the listing is built.
    assert peak_kib * 1024 < 12 * len(listing)


def run_and_expect_failure(*options: str) -> str:
    result = subprocess.run([*COMMAND, *options], capture_output=True, text=True, timeout=30, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    return result.stderr


def test_damaged_state_file_stops_the_start_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{")
    message = run_and_expect_failure("--port", "0", "--state", str(tmp_path / "state.json"))
    assert message.count("\n") == 1
    assert "damaged" in message


def test_unwritable_state_file_stops_the_start_with_one_line(tmp_path: Path) -> None:
    message = run_and_expect_failure("--port", "0", "--state", str(tmp_path / "missing" / "state.json"))
    assert message.count("\n") == 1
    assert "cannot write" in message


def test_port_in_use_stops_the_start_with_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        message = run_and_expect_failure("--port", port)
    assert message.count("\n") == 1
    assert f"cannot listen on 127.0.0.1:{port}" in message


@pytest.mark.parametrize("options", [("--port", "x"), ("--port", "70000"), ("--accounts", "-1")])
def test_invalid_option_is_refused_by_name(options: tuple[str, str]) -> None:
    assert f"argument {options[0]}: invalid" in run_and_expect_failure(*options)


def test_state_file_is_readable_json(tmp_path: Path) -> None:
    accounts = AccountStore(tmp_path / "state.json")
    accounts.create_sandboxes(2, "lab-")
    state = json.loads((tmp_path / "state.json").read_text())
    assert state["next_csp_id"] == 2012226
    assert state["next_numbers"] == {"lab-": 3}
    assert [a["name"] for a in state["accounts"][-2:]] == ["lab-1", "lab-2"]
