"""Claims of due logins: at most ACCESS_CONCURRENCY at once, over all replicas of the provisioner.

The allocator counts the running claims of all replicas, so the limit needs no leader lease. When a process dies,
its claims end after `claim_sec`.

The records of ended attempts and the next claim share an envelope. The allocator pauses after each envelope of its
maintenance queue, so two commands for each attempt would take most of the time of a class.
"""

import asyncio

import structlog

from provisioner import metrics
from provisioner.access import AccessRecord, AccessWorker
from provisioner.settings import Settings
from sandbox_broker.contract.commands import ClaimAccess
from sandbox_broker.contract.replies import AccessClaimed, DueAccess
from sandbox_broker.csp.circuit_breaker import CircuitBreaker, State
from sandbox_broker.messaging.maintenance_client import MaintenanceClient
from sandbox_broker.messaging.outcome import CommandNotDone, read_reply

CLAIM_TIMEOUT_SEC = 5.0
"""Longest wait for the replies to records and a claim."""
CLAIM_MARGIN_SEC = 5.0
MIN_PAUSE_SEC = 0.5
"""Pause after a claim without a login, because a class wakes the provisioner hundreds of times in a second."""
NO_REPLY_PAUSE_SEC = 5.0

log = structlog.get_logger()


class AccessRuns:
    def __init__(
        self, settings: Settings, allocator: MaintenanceClient, worker: AccessWorker, circuit: CircuitBreaker
    ) -> None:
        self._settings = settings
        self._allocator = allocator
        self._worker = worker
        self._circuit = circuit
        self._wake_event = asyncio.Event()
        self._running = 0
        self._records: list[AccessRecord] = []
        """Outcomes of ended attempts without a reply of the allocator."""
        self._has_record = asyncio.Event()

    def wake(self) -> None:
        """Claim logins, because one may be due."""
        self._wake_event.set()

    async def run(self) -> None:
        """Create and remove logins for ever: after each wake-up, and when the next one is due."""
        pause_sec: float | None = 0
        async with asyncio.TaskGroup() as group:
            while True:
                try:
                    async with asyncio.timeout(pause_sec):
                        await self._wake_event.wait()
                except TimeoutError:
                    pass
                self._wake_event.clear()
                try:
                    pause_sec = await self._start_due(group)
                except CommandNotDone as error:
                    log.warning("access.postponed", error=str(error))
                    pause_sec = NO_REPLY_PAUSE_SEC

    async def _start_due(self, group: asyncio.TaskGroup) -> float | None:
        """Start all logins that are due and allowed. Return the seconds until the next call at the latest, or None
        to wait for a wake-up."""
        loop = asyncio.get_running_loop()
        while (free := self._count_allowed(loop.time()) - self._running) > 0 or self._records:
            requested_at = loop.time()
            claimed = await self._record_and_claim(max(free, 0))
            if claimed is None:
                continue
            if not claimed.logins:
                await self._pause()
                return None if claimed.next_in_sec is None else max(claimed.next_in_sec, MIN_PAUSE_SEC)
            for due in claimed.logins:
                # The rest of the claim is for the record.
                deadline = requested_at + CLAIM_TIMEOUT_SEC + self._settings.access_attempt_timeout_sec
                self._start(group, due, deadline)
        if not self._running and (pause_sec := self._circuit.seconds_until_half_open(loop.time())) > 0:
            log.warning("access.paused", reason="CSP keeps failing", pause_sec=round(pause_sec, 1))
            return pause_sec
        return None  # the end of an attempt wakes the run

    async def _record_and_claim(self, limit: int) -> AccessClaimed | None:
        """Send all records and, unless `limit` is 0, a claim. Return the reply to the claim.

        Without replies the records stay for the next call. The allocator ignores a second record of a claim.
        """
        records = tuple(self._records)
        claims = [self._build_claim(limit)] if limit > 0 else []
        self._has_record.clear()
        self._wake_event.clear()  # this call serves all earlier wake-ups
        replies = await self._allocator.request_all([*records, *claims], timeout_sec=CLAIM_TIMEOUT_SEC)
        del self._records[: len(records)]
        for record, reply in zip(records, replies, strict=False):
            try:
                read_reply(record, reply)
            except CommandNotDone as error:  # the login is due again when its claim ends
                log.warning("access.not_recorded", sandbox_id=record.sandbox_id, error=str(error))
        return read_reply(claims[0], replies[-1]) if claims else None

    async def _pause(self) -> None:
        """Wait for MIN_PAUSE_SEC, or for the end of an attempt, which the allocator should know at once."""
        try:
            async with asyncio.timeout(MIN_PAUSE_SEC):
                await self._has_record.wait()
        except TimeoutError:
            pass

    def _build_claim(self, free: int) -> ClaimAccess:
        attempt_sec = self._settings.access_attempt_timeout_sec
        return ClaimAccess(
            limit=free,
            max_running=self._settings.access_concurrency,
            claim_sec=CLAIM_TIMEOUT_SEC + attempt_sec + CLAIM_MARGIN_SEC,
            email_domain=self._settings.access_email_domain,
            removal_wait_sec=self._settings.access_removal_wait_sec,
        )

    def _count_allowed(self, now: float) -> int:
        """Return the number of attempts that may run at once."""
        return {State.CLOSED: self._settings.access_concurrency, State.HALF_OPEN: 1, State.OPEN: 0}[
            self._circuit.state(now)
        ]

    def _start(self, group: asyncio.TaskGroup, due: DueAccess, deadline: float) -> None:
        self._count_running(+1)
        group.create_task(self._carry_out(due, deadline))

    async def _carry_out(self, due: DueAccess, deadline: float) -> None:
        record = await self._worker.carry_out(due, deadline)
        self._count_running(-1)
        self._records.append(record)
        self._has_record.set()
        self.wake()

    def _count_running(self, change: int) -> None:
        self._running += change
        metrics.LOGINS_RUNNING.set(self._running)
