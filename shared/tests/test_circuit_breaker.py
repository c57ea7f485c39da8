"""Tests of circuit_breaker.py. A clean-up run and a refill with it have tests of their own."""

from sandbox_broker.csp.circuit_breaker import CircuitBreaker, CspCircuit, State

CLOSED, HALF_OPEN, OPEN = State


def open_breaker(at: float = 0) -> CircuitBreaker:
    breaker = CircuitBreaker(threshold=5, timeout_sec=60)
    for _ in range(5):
        breaker.record_failure(at)
    return breaker


def test_the_breaker_opens_at_the_fifth_failure_in_a_row() -> None:
    breaker = CircuitBreaker(threshold=5, timeout_sec=60)
    for _ in range(4):
        breaker.record_failure(0)
    breaker.record_success(0)
    for _ in range(4):
        breaker.record_failure(0)
    assert breaker.state(0) is CLOSED
    breaker.record_failure(0)
    assert breaker.state(0) is OPEN


def test_the_breaker_is_half_open_after_its_time() -> None:
    breaker = open_breaker(at=100)
    assert (breaker.state(159.9), breaker.seconds_until_half_open(150)) == (OPEN, 10)
    assert (breaker.state(160), breaker.seconds_until_half_open(170)) == (HALF_OPEN, 0)


def test_a_success_closes_a_half_open_breaker_and_a_failure_opens_it() -> None:
    breaker = open_breaker()
    breaker.record_success(60)
    assert breaker.state(60) is CLOSED
    breaker.record_failure(61)
    assert breaker.state(61) is CLOSED
    breaker = open_breaker()
    breaker.record_failure(60)
    assert breaker.state(119.9) is OPEN
    assert breaker.state(120) is HALF_OPEN


def test_results_of_calls_from_before_the_opening_have_no_effect() -> None:
    breaker = open_breaker()
    breaker.record_failure(30)
    assert breaker.seconds_until_half_open(30) == 30
    breaker.record_success(30)
    assert breaker.state(30) is OPEN


def test_the_first_refusal_of_the_token_opens_the_circuit() -> None:
    circuit = CspCircuit(threshold=5, timeout_sec=60)
    circuit.record_failure()
    assert circuit.state is CLOSED
    circuit.record_unauthorized()
    assert (circuit.state, circuit.obstacle) == (OPEN, "CSP refuses the broker's token")
    assert 0 < circuit.seconds_until_half_open <= 60


def test_consecutive_failures_open_the_circuit() -> None:
    circuit = CspCircuit(threshold=2, timeout_sec=60)
    for failed in (True, False, True, True):
        assert circuit.state is CLOSED
        circuit.record_failure() if failed else circuit.record_success()
    assert (circuit.state, circuit.obstacle) == (OPEN, "CSP keeps failing")
