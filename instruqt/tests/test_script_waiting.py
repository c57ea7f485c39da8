"""Waiting line: both scripts for an allocation keep their place, and print each change of it."""

import re

import pytest

from .conftest import (
    CannedServer,
    Reply,
    Track,
    build_html_reply,
    build_json_reply,
    build_lease_reply,
    build_refusal,
)


def build_place_reply(position: int, **changes: object) -> Reply:
    body = {
        "status": "waiting",
        "position": position,
        "waiting_since": 1728054123,
        "estimated_wait_sec": None,
        "retry_after": 0.05,
    }
    return build_json_reply(202, {**body, **changes})


def places(out: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = re.findall(r"at position (\d+)\. (.*)", out)
    return found


def test_each_change_of_the_place_is_one_line_with_the_estimate(track: Track, broker: CannedServer) -> None:
    broker.replies = [
        build_place_reply(3),
        build_place_reply(3, estimated_wait_sec=240),
        build_place_reply(2, estimated_wait_sec=150),
        build_place_reply(1, estimated_wait_sec=0),
        build_lease_reply(),
    ]
    run = track.allocate()
    assert (run.code, run.err) == (0, "")
    assert places(run.out) == [
        ("3", "The wait is not known yet."),
        ("2", "The estimated wait is 150 s."),
        ("1", "The estimated wait is 0 s."),
    ]
    assert track.files()["sandbox_id.txt"] == "2012224"


@pytest.mark.parametrize("wait", [None, "40"])
def test_each_request_states_the_remaining_wait(track: Track, broker: CannedServer, wait: str | None) -> None:
    broker.replies = [build_place_reply(1), build_lease_reply()]
    assert track.allocate(BROKER_WAIT_SEC=wait).code == 0
    first, second = (call.headers["Prefer"] for call in broker.calls)
    assert first == f"respond-async, wait={wait or 900}"
    remaining = re.fullmatch(r"respond-async, wait=(\d+)", second)
    assert remaining is not None
    assert 0 < int(remaining[1]) <= int(wait or 900)


def test_without_a_wait_the_script_does_not_join_the_line(track: Track, broker: CannedServer) -> None:
    broker.replies = [build_refusal(409, "POOL_EXHAUSTED", retry_after=30)]
    run = track.allocate(BROKER_WAIT_SEC="0")
    assert run.code == 1
    assert "Prefer" not in broker.calls[0].headers
    assert len(broker.calls) == 1


def test_a_broker_without_a_line_refuses_as_before(track: Track, broker: CannedServer) -> None:
    broker.replies = [build_refusal(409, "POOL_EXHAUSTED", retry_after=30)]
    run = track.allocate()
    assert run.code == 1
    assert "409 POOL_EXHAUSTED" in run.err
    assert len(broker.calls) == 1


def test_the_wait_is_apart_from_the_budget_of_attempts(track: Track, broker: CannedServer) -> None:
    """Ten places take longer than the budget, and a fault between them starts with the whole budget."""
    broker.replies = [*(build_place_reply(9 - n, retry_after=0.3) for n in range(9)), build_html_reply(503)]
    broker.replies.append(build_lease_reply())
    run = track.allocate(BROKER_TIMEOUT_SEC="2")
    assert run.code == 0, run.err
    assert "attempt 1: HTTP 503" in run.out


def test_the_script_gives_up_at_the_end_of_the_wait(track: Track, broker: CannedServer) -> None:
    broker.replies = [build_place_reply(7)]
    run = track.allocate(BROKER_WAIT_SEC="0.5")
    assert run.code == 1
    assert "no sandbox became free in the 0.5 s of BROKER_WAIT_SEC; the last position in line was 7" in run.err
    assert track.files() == {}


def test_a_line_that_is_full_meanwhile_ends_the_script(track: Track, broker: CannedServer) -> None:
    broker.replies = [build_place_reply(1), build_refusal(409, "POOL_EXHAUSTED", retry_after=30)]
    run = track.allocate()
    assert run.code == 1
    assert "409 POOL_EXHAUSTED" in run.err


@pytest.mark.parametrize(
    "body", [b'{"status": "waiting"}', b'{"status": "waiting", "position": "x", "retry_after": -1}']
)
def test_a_place_with_unusable_fields_is_still_a_place(track: Track, broker: CannedServer, body: bytes) -> None:
    broker.replies = [Reply(202, body, {"Retry-After": "0.1"}), build_lease_reply()]
    assert track.allocate().code == 0


def test_an_invalid_wait_is_named(track: Track, broker: CannedServer) -> None:
    for value in ("-1", "soon", "nan"):
        run = track.allocate(BROKER_WAIT_SEC=value)
        assert run.code == 2
        assert "BROKER_WAIT_SEC" in run.err
    assert broker.calls == []
