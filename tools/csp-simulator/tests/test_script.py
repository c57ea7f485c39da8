"""Scripts of faults over time."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from starlette.responses import Response

from csp_simulator import script
from csp_simulator.accounts import Accounts
from csp_simulator.app import create_app
from csp_simulator.faults import Faults
from csp_simulator.script import Player, parse

from .simulator_harness import calls, client_of, eventually, path_of, sandboxes


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def faults() -> Faults:
    return Faults(seed=1)


@pytest.fixture
def accounts() -> Accounts:
    accounts = Accounts(seed=1)
    accounts.add(20, "lab-")
    return accounts


@pytest.fixture
def player(faults: Faults, accounts: Accounts, clock: Clock) -> Player:
    return Player(faults, accounts, "new-", clock)


@pytest.fixture
async def csp() -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(create_app(accounts=60, seed=1)) as client:
        yield client


def at(player: Player, clock: Clock, sec: float) -> None:
    clock.now = 1000.0 + sec
    player.catch_up()


def test_every_step_is_taken_when_its_time_has_come(player: Player, faults: Faults, clock: Clock) -> None:
    steps = [
        {"at_sec": 0, "behaviour": {"delete_error_rate": 0.1}},
        {"at_sec": 10, "behaviour": {"delete_error_rate": 0.2, "reject_tokens": True}},
        {"at_sec": 20, "behaviour": {"delete_error_rate": 0}},
    ]
    player.play(parse(steps), speed=1)
    assert faults.settings["delete_error_rate"] == 0.1
    at(player, clock, 9.9)
    assert faults.settings["delete_error_rate"] == 0.1
    at(player, clock, 10)
    assert (faults.settings["delete_error_rate"], faults.settings["reject_tokens"]) == (0.2, True)
    assert player.progress() == {"elapsed_sec": 10, "speed": 1, "steps": 3, "steps_done": 2}
    at(player, clock, 1000)
    assert (faults.settings["delete_error_rate"], faults.settings["reject_tokens"]) == (0, True)


def test_speed_shortens_every_duration(player: Player, faults: Faults, clock: Clock) -> None:
    late = {"delete_latency_sec": 5, "retry_after_sec": 30, "delete_error_rate": 0.5}
    steps = [{"at_sec": 0, "behaviour": {"retry_after_sec": None}}, {"at_sec": 60, "behaviour": late}]
    player.play(parse(steps), speed=100)
    at(player, clock, 0.59)
    assert faults.settings["delete_latency_sec"] == 0
    at(player, clock, 0.6)
    assert faults.settings["delete_latency_sec"] == 0.05
    assert faults.settings["retry_after_sec"] == 0.3
    assert faults.settings["delete_error_rate"] == 0.5


def test_failures_to_come_add_up_when_the_client_is_slow(player: Player, faults: Faults, clock: Clock) -> None:
    steps = [{"at_sec": sec, "behaviour": {"fail_next_deletes": 3}} for sec in (0, 5, 10)]
    player.play(parse(steps), speed=1)
    at(player, clock, 100)
    assert faults.settings["fail_next_deletes"] == 9


def test_accounts_come_and_go_by_script(player: Player, accounts: Accounts, clock: Clock) -> None:
    player.play(parse([{"at_sec": 1, "accounts": {"add": 5, "drop": 7, "rename": 2, "new_id": 1}}]), speed=1)
    assert accounts.active_count() == 20
    at(player, clock, 1)
    assert accounts.active_count() == 18
    at(player, clock, 2)
    assert accounts.active_count() == 18


def test_another_script_takes_the_place_of_the_first(player: Player, faults: Faults, clock: Clock) -> None:
    player.play(parse([{"at_sec": 10, "behaviour": {"delete_error_rate": 1}}]), speed=1)
    at(player, clock, 5)
    player.play(parse([{"at_sec": 10, "behaviour": {"listing_error_rate": 1}}]), speed=1)
    at(player, clock, 12)
    assert (faults.settings["delete_error_rate"], faults.settings["listing_error_rate"]) == (0, 0)
    at(player, clock, 15)
    assert (faults.settings["delete_error_rate"], faults.settings["listing_error_rate"]) == (0, 1)


STEPS: Any = [
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


@pytest.mark.parametrize(("steps", "complaint"), STEPS)
async def test_a_script_that_is_wrong_is_refused_whole(csp: httpx.AsyncClient, steps: Any, complaint: str) -> None:
    before = (await csp.get("/_control/behaviour")).json()
    response = await csp.put("/_control/script", json={"steps": steps})
    assert response.status_code == 400
    assert complaint in response.json()["error"]
    assert (await csp.get("/_control/behaviour")).json() == before


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ({}, "give either name or steps"),
        ({"name": "bad-day", "steps": []}, "give either name or steps"),
        ({"name": "good-day"}, "name must be one of bad-day"),
        ({"name": "bad-day", "speed": 0}, "speed must be"),
        ({"name": "bad-day", "speed": "fast"}, "speed must be"),
    ],
)
async def test_a_script_must_be_named_or_given(
    csp: httpx.AsyncClient, body: dict[str, object], complaint: str
) -> None:
    response = await csp.put("/_control/script", json=body)
    assert response.status_code == 400
    assert complaint in response.json()["error"]


async def test_a_script_ends_when_told_and_with_a_reset(csp: httpx.AsyncClient) -> None:
    steps = [{"at_sec": 0, "behaviour": {"reject_tokens": True}}, {"at_sec": 3600}]
    end: list[Callable[[], Any]] = [
        lambda: csp.delete("/_control/script"),
        lambda: csp.post("/_control/reset", json={}),
    ]
    for stop, still_set in zip(end, (True, False), strict=True):
        assert (await csp.put("/_control/script", json={"steps": steps})).json()["steps_done"] == 1
        (await stop()).raise_for_status()
        assert (await csp.get("/_control/script")).json()["steps"] == 0
        assert (await csp.get("/_control/behaviour")).json()["reject_tokens"] is still_set


async def test_a_listing_shows_what_the_script_has_done_by_then(csp: httpx.AsyncClient) -> None:
    before = len(await sandboxes(csp))
    await csp.put("/_control/script", json={"steps": [{"at_sec": 0.1, "accounts": {"drop": 1}}]})

    async def dropped() -> bool:
        return len(await sandboxes(csp)) == before - 1

    await eventually(dropped)


@pytest.mark.parametrize("name", script.shipped())
def test_the_scripts_that_come_with_it_are_sound(name: str) -> None:
    assert script.load(name)


async def test_the_bad_day_fails_56_deletions_in_16_minutes_and_all_succeed_later(
    player: Player, faults: Faults, clock: Clock
) -> None:
    answers: list[Response] = []
    player.play(script.load("bad-day"), speed=10_000)
    for sec in range(0, 16 * 60 + 120, 10):
        at(player, clock, sec / 10_000)
        answers += [await faults.play("delete", lambda: Response(status_code=204)) for _ in range(3)]
    failed = [answer for answer in answers if answer.status_code == 500]
    assert len(failed) == 56
    assert len([answer for answer in failed if answer.media_type == "text/html"]) == 8
    assert {answer.status_code for answer in answers} == {204, 500}
    assert {answer.status_code for answer in answers[-3:]} == {204}


async def test_the_bad_day_is_over_for_a_slow_client_when_it_has_met_every_failure(csp: httpx.AsyncClient) -> None:
    answer = await csp.put("/_control/script", json={"name": "bad-day", "speed": 10_000})
    assert answer.json()["steps"] == 5

    async def day_is_over() -> bool:
        progress = (await csp.get("/_control/script")).json()
        return bool(progress["steps_done"] == progress["steps"])

    await eventually(day_is_over)
    for account in await sandboxes(csp):
        while (await csp.delete(path_of(account))).status_code != 204:
            pass
    answers = [call["status"] for call in await calls(csp, method="DELETE")]
    assert (answers.count(204), answers.count(500), len(answers)) == (60, 56, 116)
