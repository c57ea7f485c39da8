"""A storm of one error is written a while, then counted."""

import threading

from sandbox_broker.observability.log_rate_limit import MAX_KINDS, OTHER, LogRateLimit


class Told:
    def __init__(self) -> None:
        self.counts: list[tuple[str, int]] = []
        self.something = threading.Event()

    def __call__(self, kind: str, lines: int) -> None:
        self.counts.append((kind, lines))
        self.something.set()


def storms(told: Told, now: list[float], *, lines: int = 3, interval_sec: float = 3600) -> LogRateLimit:
    return LogRateLimit(told, lines=lines, interval_sec=interval_sec, clock=lambda: now[0])


def test_the_first_lines_of_an_interval_are_let_through() -> None:
    now = [0.0]
    judge = storms(Told(), now)
    assert [judge.allow("database.lost") for _ in range(5)] == [True, True, True, False, False]
    now[0] = 3599.9
    assert not judge.allow("database.lost")
    now[0] = 3600.0
    assert judge.allow("database.lost")


def test_a_storm_of_one_error_hides_no_other() -> None:
    judge = storms(Told(), [0.0], lines=1)
    assert judge.allow("database.lost")
    assert not judge.allow("database.lost")
    assert judge.allow("rabbitmq.disconnected")


def test_at_the_end_of_the_interval_it_is_told_how_many_there_were() -> None:
    told = Told()
    judge = storms(told, [0.0], interval_sec=0.2)
    for _ in range(10):
        judge.allow("database.lost")
    assert told.something.wait(60)
    assert told.counts == [("database.lost", 7)]


def test_when_the_process_ends_it_is_told_at_once_and_once() -> None:
    told = Told()
    judge = storms(told, [0.0])
    for _ in range(5):
        judge.allow("database.lost")
    judge.allow("rabbitmq.disconnected")
    judge.flush()
    judge.flush()
    assert told.counts == [("database.lost", 2)]


def test_names_without_end_share_one_count() -> None:
    told = Told()
    judge = storms(told, [0.0], lines=1)
    assert all(judge.allow(f"kind-{number}") for number in range(MAX_KINDS))
    assert judge.allow("one more")
    assert not judge.allow("and another")
    judge.flush()
    assert told.counts == [(OTHER, 1)]
