"""Log rate limit: repeated lines pass up to a limit, then they are counted."""

import threading

from sandbox_broker.observability.log_rate_limit import MAX_KINDS, OTHER, LogRateLimit


class Reports:
    def __init__(self) -> None:
        self.counts: list[tuple[str, int]] = []
        self.received = threading.Event()

    def __call__(self, kind: str, lines: int) -> None:
        self.counts.append((kind, lines))
        self.received.set()


def make_limit(reports: Reports, now: list[float], *, lines: int = 3, interval_sec: float = 3600) -> LogRateLimit:
    return LogRateLimit(reports, lines=lines, interval_sec=interval_sec, clock=lambda: now[0])


def test_the_first_lines_of_an_interval_pass() -> None:
    now = [0.0]
    limit = make_limit(Reports(), now)
    assert [limit.allow("database.lost") for _ in range(5)] == [True, True, True, False, False]
    now[0] = 3599.9
    assert not limit.allow("database.lost")
    now[0] = 3600.0
    assert limit.allow("database.lost")


def test_many_lines_of_one_error_hide_no_other_error() -> None:
    limit = make_limit(Reports(), [0.0], lines=1)
    assert limit.allow("database.lost")
    assert not limit.allow("database.lost")
    assert limit.allow("rabbitmq.disconnected")


def test_suppressed_lines_are_reported_at_the_end_of_the_interval() -> None:
    reports = Reports()
    limit = make_limit(reports, [0.0], interval_sec=0.2)
    for _ in range(10):
        limit.allow("database.lost")
    assert reports.received.wait(60)
    assert reports.counts == [("database.lost", 7)]


def test_flush_reports_suppressed_lines_once() -> None:
    reports = Reports()
    limit = make_limit(reports, [0.0])
    for _ in range(5):
        limit.allow("database.lost")
    limit.allow("rabbitmq.disconnected")
    limit.flush()
    limit.flush()
    assert reports.counts == [("database.lost", 2)]


def test_kinds_beyond_the_maximum_share_one_limit() -> None:
    reports = Reports()
    limit = make_limit(reports, [0.0], lines=1)
    assert all(limit.allow(f"kind-{number}") for number in range(MAX_KINDS))
    assert limit.allow("one more")
    assert not limit.allow("and another")
    limit.flush()
    assert reports.counts == [(OTHER, 1)]
