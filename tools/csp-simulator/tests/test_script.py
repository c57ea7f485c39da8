"""Scripts of faults over time, and their player."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from starlette.responses import Response

from csp_simulator import script
from csp_simulator.accounts import AccountStore
from csp_simulator.app import create_app
from csp_simulator.faults import FaultInjector
from csp_simulator.script import ScriptPlayer, parse
from devstack.conditions import wait_until

from .simulator_harness import connect_in_process, fetch_calls, fetch_sandboxes, get_account_path


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def faults() -> FaultInjector:
    return FaultInjector(seed=1)


@pytest.fixture
def accounts() -> AccountStore:
    accounts = AccountStore(seed=1)
    accounts.create_sandboxes(20, "lab-")
    return accounts


@pytest.fixture
def player(faults: FaultInjector, accounts: AccountStore, clock: Clock) -> ScriptPlayer:
    return ScriptPlayer(faults, accounts, "new-", clock)


@pytest.fixture
async def csp() -> AsyncIterator[httpx.AsyncClient]:
    async with connect_in_process(create_app(accounts=60, seed=1)) as client:
        yield client


def advance_to(player: ScriptPlayer, clock: Clock, sec: float) -> None:
    clock.now = 1000.0 + sec
    player.apply_due_steps()


def test_step_is_applied_at_its_time(player: ScriptPlayer, faults: FaultInjector, clock: Clock) -> None:
    steps = [
        {"at_sec": 0, "behaviour": {"delete_error_rate": 0.1}},
        {"at_sec": 10, "behaviour": {"delete_error_rate": 0.2, "reject_tokens": True}},
        {"at_sec": 20, "behaviour": {"delete_error_rate": 0}},
    ]
    player.play(parse(steps), speed=1)
    assert faults.settings["delete_error_rate"] == 0.1
    advance_to(player, clock, 9.9)
    assert faults.settings["delete_error_rate"] == 0.1
    advance_to(player, clock, 10)
    assert (faults.settings["delete_error_rate"], faults.settings["reject_tokens"]) == (0.2, True)
    assert player.get_progress() == {"elapsed_sec": 10, "speed": 1, "steps": 3, "steps_done": 2}
    advance_to(player, clock, 1000)
    assert (faults.settings["delete_error_rate"], faults.settings["reject_tokens"]) == (0, True)


def test_speed_divides_every_duration(player: ScriptPlayer, faults: FaultInjector, clock: Clock) -> None:
    late = {"delete_latency_sec": 5, "retry_after_sec": 30, "delete_error_rate": 0.5}
    steps = [{"at_sec": 0, "behaviour": {"retry_after_sec": None}}, {"at_sec": 60, "behaviour": late}]
    player.play(parse(steps), speed=100)
    advance_to(player, clock, 0.59)
    assert faults.settings["delete_latency_sec"] == 0
    advance_to(player, clock, 0.6)
    assert faults.settings["delete_latency_sec"] == 0.05
    assert faults.settings["retry_after_sec"] == 0.3
    assert faults.settings["delete_error_rate"] == 0.5


def test_fail_next_counts_add_up_for_a_slow_client(
    player: ScriptPlayer, faults: FaultInjector, clock: Clock
) -> None:
    steps = [{"at_sec": sec, "behaviour": {"fail_next_deletes": 3}} for sec in (0, 5, 10)]
    player.play(parse(steps), speed=1)
    advance_to(player, clock, 100)
    assert faults.settings["fail_next_deletes"] == 9


def test_script_adds_and_disturbs_accounts(player: ScriptPlayer, accounts: AccountStore, clock: Clock) -> None:
    player.play(parse([{"at_sec": 1, "accounts": {"add": 5, "drop": 7, "rename": 2, "new_id": 1}}]), speed=1)
    assert accounts.count_active() == 20
    advance_to(player, clock, 1)
    assert accounts.count_active() == 18
    advance_to(player, clock, 2)
    assert accounts.count_active() == 18


def test_new_script_replaces_the_current_one(player: ScriptPlayer, faults: FaultInjector, clock: Clock) -> None:
    player.play(parse([{"at_sec": 10, "behaviour": {"delete_error_rate": 1}}]), speed=1)
    advance_to(player, clock, 5)
    player.play(parse([{"at_sec": 10, "behaviour": {"listing_error_rate": 1}}]), speed=1)
    advance_to(player, clock, 12)
    assert (faults.settings["delete_error_rate"], faults.settings["listing_error_rate"]) == (0, 0)
    advance_to(player, clock, 15)
    assert (faults.settings["delete_error_rate"], faults.settings["listing_error_rate"]) == (0, 1)


INVALID_STEPS: Any = [
    ({}, "steps must be a list"),
    ([5], "steps[0]: must be an object"),
    ([{"at_sec": 0}, {"at": 1}], "steps[1]: must be an object with at_sec"),
    ([{}], "steps[0]: at_sec must be seconds"),
    ([{"at_sec": -1}], "steps[0]: at_sec must be"),
    ([{"at_sec": True}], "steps[0]: at_sec must be"),
    ([{"at_sec": 5}, {"at_sec": 4}], "steps[1]: at_sec must be"),
    ([{"at_sec": 0, "behaviour": []}], "steps[0]: behaviour and accounts must be objects"),
    ([{"at_sec": 0, "behaviour": {"mood": 1}}], "steps[0]: mood is unknown"),
    ([{"at_sec": 0, "behaviour": {"delete_latency_sec": "x"}}], "steps[0]: delete_latency_sec must be"),
    ([{"at_sec": 0, "accounts": {"add": -1}}], "steps[0]: add must be"),
    ([{"at_sec": 0, "accounts": {"grow": 1}}], "steps[0]: grow must be one of add"),
]


@pytest.mark.parametrize(("steps", "message"), INVALID_STEPS)
async def test_invalid_script_is_refused_and_changes_nothing(
    csp: httpx.AsyncClient, steps: Any, message: str
) -> None:
    before = (await csp.get("/_control/behaviour")).json()
    response = await csp.put("/_control/script", json={"steps": steps})
    assert response.status_code == 400
    assert message in response.json()["error"]
    assert (await csp.get("/_control/behaviour")).json() == before


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "give either name or steps"),
        ({"name": "bad-day", "steps": []}, "give either name or steps"),
        ({"name": "good-day"}, "name must be one of bad-day"),
        ({"name": "bad-day", "speed": 0}, "speed must be"),
        ({"name": "bad-day", "speed": "fast"}, "speed must be"),
    ],
)
async def test_script_needs_a_known_name_or_steps(
    csp: httpx.AsyncClient, body: dict[str, object], message: str
) -> None:
    response = await csp.put("/_control/script", json=body)
    assert response.status_code == 400
    assert message in response.json()["error"]


async def test_script_ends_by_delete_or_reset(csp: httpx.AsyncClient) -> None:
    steps = [{"at_sec": 0, "behaviour": {"reject_tokens": True}}, {"at_sec": 3600}]
    stop_requests: list[Callable[[], Any]] = [
        lambda: csp.delete("/_control/script"),
        lambda: csp.post("/_control/reset", json={}),
    ]
    for stop, still_set in zip(stop_requests, (True, False), strict=True):
        assert (await csp.put("/_control/script", json={"steps": steps})).json()["steps_done"] == 1
        (await stop()).raise_for_status()
        assert (await csp.get("/_control/script")).json()["steps"] == 0
        assert (await csp.get("/_control/behaviour")).json()["reject_tokens"] is still_set


async def test_listing_shows_the_changes_of_due_steps(csp: httpx.AsyncClient) -> None:
    before = len(await fetch_sandboxes(csp))
    await csp.put("/_control/script", json={"steps": [{"at_sec": 0.1, "accounts": {"drop": 1}}]})

    async def is_dropped() -> bool:
        return len(await fetch_sandboxes(csp)) == before - 1

    await wait_until(is_dropped)


@pytest.mark.parametrize("name", script.list_bundled())
def test_bundled_script_is_valid(name: str) -> None:
    assert script.load(name)


async def test_bad_day_fails_56_deletions_in_16_minutes_and_the_last_ones_succeed(
    player: ScriptPlayer, faults: FaultInjector, clock: Clock
) -> None:
    responses: list[Response] = []
    player.play(script.load("bad-day"), speed=10_000)
    for sec in range(0, 16 * 60 + 120, 10):
        advance_to(player, clock, sec / 10_000)
        responses += [await faults.respond("delete", lambda: Response(status_code=204)) for _ in range(3)]
    failed = [response for response in responses if response.status_code == 500]
    assert len(failed) == 56
    assert len([response for response in failed if response.media_type == "text/html"]) == 8
    assert {response.status_code for response in responses} == {204, 500}
    assert {response.status_code for response in responses[-3:]} == {204}


async def test_slow_client_meets_every_failure_of_the_bad_day(csp: httpx.AsyncClient) -> None:
    response = await csp.put("/_control/script", json={"name": "bad-day", "speed": 10_000})
    assert response.json()["steps"] == 5

    async def is_finished() -> bool:
        progress = (await csp.get("/_control/script")).json()
        return bool(progress["steps_done"] == progress["steps"])

    await wait_until(is_finished)
    for account in await fetch_sandboxes(csp):
        while (await csp.delete(get_account_path(account))).status_code != 204:
            pass
    statuses = [call["status"] for call in await fetch_calls(csp, method="DELETE")]
    assert (statuses.count(204), statuses.count(500), len(statuses)) == (60, 56, 116)
