"""What the reaper does: ends overdue leases, and deletes in CSP what was released."""

import asyncio
from collections.abc import Iterator

import structlog

from reaper import metrics
from reaper.backoff import retry_in_sec
from reaper.settings import Settings
from sandbox_broker import topology
from sandbox_broker.bus import Disconnected, Requester, Unroutable
from sandbox_broker.csp import CspClient, CspUnauthorized, CspUnavailable
from sandbox_broker.messages import (
    ClaimDeletions,
    Command,
    DeletionsClaimed,
    DueDeletion,
    ExpireLeases,
    LeasesExpired,
    RecordDeletion,
    RecordDeletionFailure,
    Refused,
    Reply,
)

CSP_TIMEOUT_SEC = 30.0
REQUEST_TIMEOUT_SEC = 10.0
EXPIRY_PIECE = 200
"""Leases ended by one command: an allocation waits for one such piece at most."""
CLAIM_MARGIN_SEC = 60.0
MAX_ERROR = 500

log = structlog.get_logger()


class NoAnswer(Exception):
    """The allocator did not do what was asked; whatever is due stays due, and the next tick finds it."""


class Reaper:
    def __init__(self, settings: Settings, csp: CspClient, requester: Requester) -> None:
        self._settings = settings
        self._csp = csp
        self._requester = requester
        self._due = asyncio.Event()

    async def expire_overdue(self) -> None:
        """Ends every lease that is overdue by more than the grace period."""
        command = ExpireLeases(grace_sec=self._settings.grace_period_minutes * 60, limit=EXPIRY_PIECE)
        try:
            while True:
                reply = await self._ask(command)
                assert isinstance(reply, LeasesExpired)  # noqa: S101 (the contract of ExpireLeases)
                if len(reply.sandbox_ids) < EXPIRY_PIECE:
                    return
        except NoAnswer as error:
            log.warning("expiry.postponed", error=str(error))

    def wake(self) -> None:
        """There may be something to delete."""
        self._due.set()

    async def clean_up(self) -> None:
        """Deletes whatever is due, each time it is woken, for ever."""
        while True:
            await self._due.wait()
            self._due.clear()
            try:
                await self._delete_all_due()
            except NoAnswer as error:
                log.warning("cleanup.postponed", error=str(error))
            except CspUnauthorized as error:
                metrics.UNAUTHORIZED.set(1)
                log.error("cleanup.unauthorized", error=str(error))

    async def _delete_all_due(self) -> None:
        settings = self._settings
        one_after_another = -(-settings.cleanup_batch_size // settings.cleanup_concurrency)
        each_sec = CSP_TIMEOUT_SEC + REQUEST_TIMEOUT_SEC + settings.cleanup_per_sandbox_delay_sec
        command = ClaimDeletions(
            limit=settings.cleanup_batch_size,
            claim_sec=CLAIM_MARGIN_SEC + one_after_another * each_sec,
        )
        while True:
            claimed = await self._ask(command)
            assert isinstance(claimed, DeletionsClaimed)  # noqa: S101 (the contract of ClaimDeletions)
            if not claimed.deletions:
                return
            deletions = iter(claimed.deletions)
            workers = (self._work_off(deletions) for _ in range(settings.cleanup_concurrency))
            # Who stops does not stop the others half-way: each finishes and reports what it has begun.
            for result in await asyncio.gather(*workers, return_exceptions=True):
                if result is not None:
                    raise result
            await asyncio.sleep(settings.cleanup_batch_delay_sec)

    async def _work_off(self, deletions: Iterator[DueDeletion]) -> None:
        """Takes one after the other of what the workers share, until none is left or CSP refuses our token."""
        for deletion in deletions:
            try:
                await self._delete(deletion)
            except NoAnswer as error:  # it stays claimed, and is due again when the claim ends
                log.warning("deletion.not_recorded", sandbox_id=deletion.sandbox_id, error=str(error))
            await asyncio.sleep(self._settings.cleanup_per_sandbox_delay_sec)

    async def _delete(self, deletion: DueDeletion) -> None:
        """Deletes one account in CSP and tells the allocator how it went. Dying in between is harmless: the
        claim ends, and the next attempt finds the account gone. Raises NoAnswer and CspUnauthorized."""
        try:
            outcome = await self._csp.delete_account(deletion.external_id)
        except CspUnavailable as error:
            metrics.FAILED.inc()
            await self._postpone(deletion, str(error), error.retry_after)
        except ValueError as error:  # an external id that is none: no attempt can help
            metrics.FAILED.inc()
            await self._ask(_failure(deletion, str(error), None))
        else:
            metrics.DELETED.inc()
            metrics.UNAUTHORIZED.set(0)
            log.info("csp.deleted", sandbox_id=deletion.sandbox_id, outcome=outcome)
            await self._ask(RecordDeletion(sandbox_id=deletion.sandbox_id))

    async def _postpone(self, deletion: DueDeletion, error: str, retry_after_sec: float | None) -> None:
        delay = retry_in_sec(self._settings, deletion.attempts, retry_after_sec)
        log.warning("csp.delete_failed", sandbox_id=deletion.sandbox_id, error=error, retry_in_sec=delay)
        await self._ask(_failure(deletion, error, delay))
        if delay is not None:
            asyncio.get_running_loop().call_later(delay, self.wake)

    async def _ask(self, command: Command) -> Reply:
        try:
            reply = await self._requester.request(
                topology.ALLOCATOR_MAINTENANCE, command, timeout_sec=REQUEST_TIMEOUT_SEC
            )
        except (Disconnected, Unroutable, TimeoutError, ValueError) as error:  # ValueError: garbled
            raise NoAnswer(str(error)) from error
        if isinstance(reply, Refused):
            raise NoAnswer(reply.message)
        return reply


def _failure(deletion: DueDeletion, error: str, retry_in: float | None) -> RecordDeletionFailure:
    return RecordDeletionFailure(
        sandbox_id=deletion.sandbox_id,
        attempts=deletion.attempts,
        error=error[:MAX_ERROR],
        retry_in_sec=retry_in,
    )
