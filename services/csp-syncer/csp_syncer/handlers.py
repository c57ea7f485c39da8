"""A sync, from CSP's listing to the allocator's answer."""

import asyncio
import time

import structlog

from csp_syncer import metrics
from csp_syncer.plan import pieces
from csp_syncer.settings import Settings
from sandbox_broker import topology
from sandbox_broker.bus import Disconnected, Requester, Unroutable
from sandbox_broker.csp import CspClient, CspError
from sandbox_broker.messages import (
    ApplyListing,
    BeginListing,
    Command,
    ListingApplied,
    ListingBegun,
    PoolSynced,
    Refused,
    Reply,
)

REQUEST_TIMEOUT_SEC = 30.0
MAX_REASONS = 20
"""Of skipped records, in one log line."""

log = structlog.get_logger()


class _Stopped(Exception):
    """A step of the sync was refused; the refusal is the answer to all of it."""

    def __init__(self, refusal: Refused) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


class Syncer:
    """Runs one sync at a time; who asks meanwhile joins it."""

    def __init__(self, settings: Settings, csp: CspClient, requester: Requester) -> None:
        self._settings = settings
        self._csp = csp
        self._requester = requester
        self._running: dict[bool, asyncio.Task[PoolSynced | Refused]] = {}
        self._one_at_a_time = asyncio.Lock()

    async def sync_pool(self, *, force: bool) -> PoolSynced | Refused:
        """A forced sync is not the same as the one that may be running, so it waits for its turn."""
        task = self._running.get(force)
        if task is None:
            task = self._running[force] = asyncio.create_task(self._sync(force=force))
            task.add_done_callback(lambda _: self._running.pop(force))
        return await asyncio.shield(task)

    async def stop(self) -> None:
        """Gives up what runs; a listing is applied as a whole or not at all."""
        for task in list(self._running.values()):
            task.cancel()
            await asyncio.wait([task])

    async def _sync(self, *, force: bool) -> PoolSynced | Refused:
        async with self._one_at_a_time:
            started = time.monotonic()
            try:
                applied = await self._list_and_apply(force=force)
            except _Stopped as stopped:
                log.warning("sync.refused", code=stopped.refusal.code, reason=stopped.refusal.message)
                metrics.SYNCS.labels(outcome=stopped.refusal.code.lower()).inc()
                if stopped.refusal.code == "SYNC_HELD":
                    metrics.HELD.set(1)
                return stopped.refusal
            duration_ms = round((time.monotonic() - started) * 1000)
            log.info("sync.completed", duration_ms=duration_ms, **applied.model_dump(exclude={"type", "version"}))
            metrics.SYNCS.labels(outcome="completed").inc()
            metrics.HELD.set(0)
            return PoolSynced(
                synced=applied.synced,
                marked_stale=applied.marked_stale,
                restored=applied.restored,
                duration_ms=duration_ms,
            )

    async def _list_and_apply(self, *, force: bool) -> ListingApplied:
        begun = await self._ask(BeginListing())
        assert isinstance(begun, ListingBegun)  # noqa: S101 (the contract of BeginListing)
        try:
            listing = await self._csp.list_accounts()
        except CspError as error:
            raise _Stopped(
                Refused(
                    code="CSP_UNAVAILABLE",
                    message=f"CSP could not be listed, and nothing was changed: {error}",
                )
            ) from error
        if listing.skipped:
            metrics.SKIPPED.inc(len(listing.skipped))
            log.warning(
                "sync.records_skipped",
                listing_id=begun.listing_id,
                skipped=len(listing.skipped),
                reasons=listing.skipped[:MAX_REASONS],
            )
        for piece in pieces(begun.listing_id, listing.accounts):
            await self._ask(piece)
        applied = await self._ask(
            ApplyListing(
                listing_id=begun.listing_id,
                total=len(listing.accounts),
                max_stale_fraction=self._settings.sync_max_stale_fraction,
                force=force,
            )
        )
        assert isinstance(applied, ListingApplied)  # noqa: S101 (the contract of ApplyListing)
        return applied

    async def _ask(self, command: Command) -> Reply:
        try:
            reply = await self._requester.request(
                topology.ALLOCATOR_MAINTENANCE, command, timeout_sec=REQUEST_TIMEOUT_SEC
            )
        except (Disconnected, Unroutable, TimeoutError, ValueError) as error:  # ValueError: garbled
            raise _Stopped(
                Refused(code="ALLOCATOR_UNAVAILABLE", message=f"The allocator did not answer: {error}")
            ) from error
        if isinstance(reply, Refused):
            raise _Stopped(reply)
        return reply
