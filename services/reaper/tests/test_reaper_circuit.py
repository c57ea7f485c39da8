"""The circuit: opens after failures in a row, lets one call through later, and uses no attempts up meanwhile."""

from collections.abc import AsyncIterator

import pytest

from reaper.circuit import Circuit, State
from sandbox_broker.messages import ClaimDeletions, RecordDeletionFailure

from .reaper_harness import Allocator, Csp, announce, emptied, reaping, sample, simulated_csp, until

CLOSED, HALF_OPEN, OPEN = State


def opened(at: float = 0) -> Circuit:
    circuit = Circuit(threshold=5, timeout_sec=60)
    for _ in range(5):
        circuit.failed(at)
    return circuit


def test_it_opens_with_the_fifth_failure_in_a_row() -> None:
    circuit = Circuit(threshold=5, timeout_sec=60)
    for _ in range(4):
        circuit.failed(0)
    circuit.succeeded(0)
    for _ in range(4):
        circuit.failed(0)
    assert circuit.state(0) is CLOSED
    circuit.failed(0)
    assert circuit.state(0) is OPEN


def test_it_is_open_for_its_time_and_then_half_open() -> None:
    circuit = opened(at=100)
    assert (circuit.state(159.9), circuit.half_open_in_sec(150)) == (OPEN, 10)
    assert (circuit.state(160), circuit.half_open_in_sec(170)) == (HALF_OPEN, 0)


def test_a_success_closes_the_half_open_one_and_a_failure_opens_it_again() -> None:
    circuit = opened()
    circuit.succeeded(60)
    assert circuit.state(60) is CLOSED
    circuit.failed(61)
    assert circuit.state(61) is CLOSED
    circuit = opened()
    circuit.failed(60)
    assert circuit.state(119.9) is OPEN
    assert circuit.state(120) is HALF_OPEN


def test_answers_to_what_was_asked_before_it_opened_change_nothing() -> None:
    circuit = opened()
    circuit.failed(30)
    assert circuit.half_open_in_sec(30) == 30
    circuit.succeeded(30)
    assert circuit.state(30) is OPEN


@pytest.fixture
async def csp() -> AsyncIterator[Csp]:
    async with simulated_csp(accounts=12) as csp:
        yield csp


@pytest.fixture
async def allocator(csp: Csp, amqp_url: str) -> AsyncIterator[Allocator]:
    await emptied(amqp_url)
    allocator = Allocator(csp)
    async with allocator.consuming(amqp_url):
        yield allocator


@pytest.mark.parametrize("status", [500, "bomb", "flood"])
async def test_five_failures_open_it_and_while_it_is_open_nothing_is_claimed(
    csp: Csp, allocator: Allocator, amqp_url: str, status: int | str
) -> None:
    await csp.behave(delete_error_rate=1, delete_error_status=status)
    await allocator.add_due()
    async with reaping(amqp_url, csp, cleanup_concurrency=1, cleanup_interval_sec=0.1):
        await until(lambda: len(allocator.all(RecordDeletionFailure)) == 5)
        await until(lambda: sample("broker_circuit_state") == 2)
        claims = len(allocator.all(ClaimDeletions))
        assert claims == 5
        await csp.behave(delete_error_rate=0)
        for _ in range(20):
            await announce(amqp_url)
        assert len(allocator.all(ClaimDeletions)) == claims
    assert len(allocator.due) == 12
    assert sorted(due.attempts for due in allocator.due.values()) == [0] * 7 + [1] * 5


async def test_half_open_it_lets_exactly_one_through(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    await csp.behave(delete_error_rate=1, delete_latency_sec=0.3)
    await allocator.add_due()
    quick = {"circuit_breaker_timeout_sec": 1, "deletion_backoff_base_sec": 0.1, "deletion_max_attempts": 99}
    async with reaping(amqp_url, csp, cleanup_concurrency=4, **quick):
        await until(lambda: sample("broker_circuit_state") == 2)
        await until(lambda: sample("broker_circuit_state") == 1)
        before = len(allocator.all(RecordDeletionFailure))
        await until(lambda: sample("broker_circuit_state") == 2)
        await until(lambda: len(allocator.all(RecordDeletionFailure)) > before)
        assert len(allocator.all(RecordDeletionFailure)) == len(await csp.deletions()) == before + 1
        # It works again: the next that is let through closes it, and all the others follow.
        await csp.behave(delete_error_rate=0, delete_latency_sec=0)
        await until(lambda: not allocator.due)
        assert sample("broker_circuit_state") == 0
