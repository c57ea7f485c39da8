"""Claims of due logins: at most ACCESS_CONCURRENCY at once, over all replicas of the provisioner.

The allocator counts the running claims of all replicas, so the limit needs no leader lease. When a process dies,
its claims end after `claim_sec`.
"""

import asyncio

import structlog

from provisioner import metrics
from provisioner.access import AccessWorker
from provisioner.settings import Settings
from sandbox_broker.contract.commands import ClaimAccess
from sandbox_broker.contract.replies import DueAccess
from sandbox_broker.csp.circuit_breaker import CircuitBreaker, State
from sandbox_broker.messaging.maintenance_client import MaintenanceClient
from sandbox_broker.messaging.outcome import CommandNotDone

CLAIM_TIMEOUT_SEC = 5.0
"""Longest wait for the reply to a claim."""
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
        self._running: set[asyncio.Task[None]] = set()

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
        while (free := self._count_allowed(loop.time()) - len(self._running)) > 0:
            requested_at = loop.time()
            claimed = await self._allocator.request(self._build_claim(free), timeout_sec=CLAIM_TIMEOUT_SEC)
            if not claimed.logins:
                await asyncio.sleep(MIN_PAUSE_SEC)
                return None if claimed.next_in_sec is None else max(claimed.next_in_sec, MIN_PAUSE_SEC)
            for due in claimed.logins:
                # The rest of the claim is for the record.
                deadline = requested_at + CLAIM_TIMEOUT_SEC + self._settings.access_attempt_timeout_sec
                self._start(group, due, deadline)
        if not self._running and (pause_sec := self._circuit.seconds_until_half_open(loop.time())) > 0:
            log.warning("access.paused", reason="CSP keeps failing", pause_sec=round(pause_sec, 1))
            return pause_sec
        return None  # the end of an attempt wakes the run

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
        task = group.create_task(self._worker.carry_out(due, deadline))
        self._running.add(task)
        metrics.LOGINS_RUNNING.set(len(self._running))

        def end(task: asyncio.Task[None]) -> None:
            self._running.discard(task)
            metrics.LOGINS_RUNNING.set(len(self._running))
            self.wake()

        task.add_done_callback(end)
