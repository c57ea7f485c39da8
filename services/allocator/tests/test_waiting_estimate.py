"""Estimate of the wait in line, from creations in flight and measured creation times."""

from typing import Any

import pytest

from allocator.waiting_estimate import Creation, estimate_waits, expect_sandboxes

from .allocator_harness import Pool, allocate, allocate_command


def build_creation(name: str, **fields: Any) -> Creation:
    defaults = {"is_in_hand": True, "median_sec": 100.0, "slow_sec": 150.0, "elapsed_sec": 0.0, "due_in_sec": 0.0}
    return Creation(name=name, **{**defaults, **fields})


def test_a_creation_in_hand_takes_the_usual_time() -> None:
    creations = [build_creation("lab-1"), build_creation("lab-2", elapsed_sec=70.0)]
    assert expect_sandboxes(creations) == [(30, "lab-2"), (100, "lab-1")]


def test_a_late_creation_is_expected_after_a_long_time_and_then_never() -> None:
    creations = [build_creation("lab-1", elapsed_sec=120.0), build_creation("lab-2", elapsed_sec=151.0)]
    assert expect_sandboxes(creations) == [(30, "lab-1")]


def test_other_creations_begin_when_one_ends() -> None:
    in_hand = [build_creation("lab-1", elapsed_sec=70.0), build_creation("lab-2")]
    later = [build_creation(f"lab-{number}", is_in_hand=False) for number in (3, 4, 5)]
    assert expect_sandboxes([*in_hand, *later]) == [
        (30, "lab-1"),
        (100, "lab-2"),
        (130, "lab-3"),
        (200, "lab-4"),
        (230, "lab-5"),
    ]


def test_a_postponed_creation_begins_when_it_is_due() -> None:
    creations = [build_creation("lab-1"), build_creation("lab-2", is_in_hand=False, due_in_sec=300.0)]
    assert expect_sandboxes(creations) == [(100, "lab-1"), (400, "lab-2")]


def test_without_a_creation_in_hand_the_time_is_unknown() -> None:
    assert expect_sandboxes([build_creation("lab-1", is_in_hand=False)]) == []


@pytest.mark.parametrize(
    ("prefixes", "estimates"),
    [
        (["lab-b-", "lab-a-", "lab-b-", "lab-b-"], [11, 30, 20, None]),
        (["", "lab-b-", "lab-a-"], [11, 20, 30]),
        (["lab-c-"], [None]),
    ],
)
def test_the_expected_sandboxes_serve_the_line_in_its_order(
    prefixes: list[str], estimates: list[int | None]
) -> None:
    assert estimate_waits(prefixes, [(10.4, "lab-b-1"), (20, "lab-b-2"), (30, "lab-a-1")]) == estimates


def test_an_overdue_sandbox_is_expected_in_a_second() -> None:
    assert estimate_waits([""], [(0.0, "lab-1")]) == [1]


async def test_a_waiting_student_learns_the_estimate(pool: Pool) -> None:
    session = await pool.write_session()

    async def ask(holder: str) -> int | None:
        session.waiting_line.expected_at = float("-inf")
        (reply,) = await allocate(session, allocate_command(holder, "lab-", wait_sec=900))
        estimate: int | None = reply.estimated_wait_sec  # type: ignore[union-attr]
        return estimate

    await pool.execute("INSERT INTO stock_prefixes (name_prefix, next_number) VALUES ('lab-', 9)")
    await pool.execute(
        """
        INSERT INTO creations (name, name_prefix, state, in_flight, claim, first_claimed_at, created_at, history)
        SELECT 'lab-' || number, 'lab-', state, true, gen_random_uuid(), now() - interval '20 s',
            CASE WHEN state = 'created' THEN now() END,
            jsonb_build_array(jsonb_build_object('at', extract(epoch FROM now() - interval '10 s')))
        FROM (VALUES (2, 'pending'), (3, 'pending'), (4, 'pending')) AS new (number, state)
        """
    )
    assert await ask("ann") is None  # no measured time
    await pool.execute(
        """
        INSERT INTO creations (
            name, name_prefix, state, in_flight, first_claimed_at, created_at, ended_at, imported_at
        )
        SELECT 'lab-1', 'lab-', 'created', false, now() - interval '1 hour', now(), now(),
            now() - interval '1 hour' + interval '100 s'
        """
    )
    await pool.execute("UPDATE creations SET state = 'created', ended_at = now() WHERE name = 'lab-2'")
    await pool.execute("UPDATE creations SET claim = NULL WHERE name = 'lab-4'")
    assert 70 <= (await ask("ann") or 0) <= 80  # created, begun 20 s ago
    assert 80 <= (await ask("bob") or 0) <= 90
    assert 170 <= (await ask("cid") or 0) <= 180  # begins after the first
    assert await ask("dan") is None
    await pool.execute(
        "UPDATE stock_prefixes SET stopped_at = now(), stop_cause = 'refused', stop_reason = 'no licence'"
    )
    assert await ask("cid") is None
