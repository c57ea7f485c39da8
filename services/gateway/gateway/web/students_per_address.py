"""Count of the students per client address. A leaked token under invented ids has many at one address."""

import structlog

from gateway import metrics
from gateway.web.rate_limit import Rate, RateLimit

log = structlog.get_logger()


class StudentsPerAddress:
    """Counter of distinct student ids per client address and window.

    It refuses no request, because a whole class shares one address. Memory: two tables with a limited number of
    counters, the oldest first out.
    """

    def __init__(self, rate: Rate) -> None:
        self._requests = RateLimit(Rate(1, rate.window_sec))
        """Requests per address and student. Only the first of a window counts."""
        self._students = RateLimit(rate)

    def count(self, address: str, holder: str) -> None:
        """Count a student. The first one beyond the rate in a window raises the metric and writes a log line."""
        if self._requests.hit(f"{address} {holder}").is_exceeded:
            return
        status = self._students.hit(address)
        if status.requests == status.limit + 1:
            metrics.ADDRESSES_WITH_MANY_STUDENTS.inc()
            log.warning("client.many_students", client=address, limit=status.limit)
