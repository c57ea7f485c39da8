"""A sync, from CSP's listing to the allocator's answer."""

import asyncio
import time
import uuid
from dataclasses import dataclass, field

import structlog

from csp_syncer import metrics
from csp_syncer.asking import Stopped, ask
from csp_syncer.plan import pieces
from csp_syncer.settings import Settings
from sandbox_broker import story
from sandbox_broker.bus import Requester
from sandbox_broker.csp import CspClient, CspError, Listing
from sandbox_broker.messages import (
    ApplyListing,
    BeginListing,
    JobState,
    ListingApplied,
    ListingBegun,
    PoolSynced,
    RecordJob,
    RefreshSandboxes,
    Refused,
    SandboxesRefreshed,
)

LISTING_TIMEOUT_SEC = 60.0
APPLY_TIMEOUT_SEC = 90.0
"""It is a few statements, each of which the allocator ends after 30 s."""
REFRESH_PIECE = 500
"""Sandboxes whose names one command corrects; they are locked for that long."""
REPORT_SEC = 5.0
"""How often a job that waits for a sync is told how far it is."""
RECORD_TIMEOUT_SEC = 5.0
MAX_REASONS = 20
"""Of skipped records, in one log line."""

log = structlog.get_logger()


@dataclass(slots=True, eq=False)
class _Running:
    progress: dict[str, int] = field(default_factory=dict)
    request_id: str | None = field(default_factory=story.request_id)
    """Of the request that has begun it; its lines and commands have this one."""
    task: asyncio.Task[PoolSynced | Refused] = field(init=False)


class Syncer:
    """Runs one sync at a time; who asks meanwhile joins it."""

    def __init__(self, settings: Settings, csp: CspClient, requester: Requester) -> None:
        self._settings = settings
        self._csp = csp
        self._requester = requester
        self._running: dict[bool, _Running] = {}
        self._one_at_a_time = asyncio.Lock()

    async def sync_pool(self, *, force: bool, job_id: uuid.UUID | None = None) -> PoolSynced | Refused:
        """A forced sync is not the same as the one that may be running, so it waits for its turn."""
        running = self._running.get(force)
        if running is None:
            running = self._running[force] = _Running()
            running.task = asyncio.create_task(self._sync(running.progress, force=force))
            running.task.add_done_callback(lambda _: self._running.pop(force))
        else:
            log.info("sync.joined", begun_by=running.request_id)
        if job_id is None:
            return await asyncio.shield(running.task)
        while not (await asyncio.wait([running.task], timeout=REPORT_SEC))[0]:
            await self._record(RecordJob(job_id=job_id, kind="sync", progress=running.progress))
        reply = running.task.result()
        await self._record(_ended(job_id, running.progress, reply))
        return reply

    async def stop(self) -> None:
        """Gives up what runs; a listing is applied as a whole or not at all."""
        for running in list(self._running.values()):
            running.task.cancel()
            await asyncio.wait([running.task])

    async def _sync(self, progress: dict[str, int], *, force: bool) -> PoolSynced | Refused:
        async with self._one_at_a_time:
            started = time.monotonic()
            try:
                applied = await self._list_and_apply(progress, force=force)
            except Stopped as stopped:
                log.warning("sync.refused", code=stopped.refusal.code, reason=stopped.refusal.message)
                metrics.SYNCS.labels(outcome=stopped.refusal.code.lower()).inc()
                return stopped.refusal
            took_sec = time.monotonic() - started
            duration_ms = round(took_sec * 1000)
            metrics.DURATION.observe(took_sec)
            metrics.LAST_COMPLETED.set_to_current_time()
            log.info("sync.completed", duration_ms=duration_ms, **applied.model_dump(exclude={"type", "version"}))
            metrics.SYNCS.labels(outcome="completed").inc()
            return PoolSynced(
                synced=applied.synced,
                marked_stale=applied.marked_stale,
                restored=applied.restored,
                duration_ms=duration_ms,
            )

    async def _list_and_apply(self, progress: dict[str, int], *, force: bool) -> ListingApplied:
        begun = await ask(self._requester, BeginListing())
        assert isinstance(begun, ListingBegun)  # noqa: S101 (the contract of BeginListing)
        story.bind(listing_id=begun.listing_id)
        listing = await self._list()
        unreadable = _unreadable(listing)
        progress.update(listed=len(listing.accounts) + len(unreadable), staged=0)
        for piece in pieces(begun.listing_id, listing.accounts, unreadable):
            await ask(self._requester, piece)
            progress["staged"] += len(piece.accounts) + len(piece.unreadable)
        command = ApplyListing(
            listing_id=begun.listing_id,
            total=progress["listed"],
            max_stale_fraction=self._settings.sync_max_stale_fraction,
            force=force,
        )
        applied = await ask(self._requester, command, timeout_sec=APPLY_TIMEOUT_SEC)
        assert isinstance(applied, ListingApplied)  # noqa: S101 (the contract of ApplyListing)
        try:
            await self._refresh(begun.listing_id)
        except Stopped as stopped:  # the next listing finds the names that are still old
            log.warning("sync.names_postponed", reason=stopped.refusal.message)
        return applied

    async def _list(self) -> Listing:
        try:
            listing = await self._csp.list_accounts()
        except CspError as error:
            message = f"CSP could not be listed, and nothing was changed: {error}"
            raise Stopped(Refused(code="CSP_UNAVAILABLE", message=message)) from error
        if listing.skipped:
            metrics.SKIPPED.inc(len(listing.skipped))
            log.warning(
                "sync.records_skipped",
                skipped=len(listing.skipped),
                reasons=[skipped.reason for skipped in listing.skipped[:MAX_REASONS]],
            )
        return listing

    async def _refresh(self, listing_id: int) -> None:
        after: str | None = None
        while True:
            command = RefreshSandboxes(listing_id=listing_id, after=after, limit=REFRESH_PIECE)
            reply = await ask(self._requester, command)
            assert isinstance(reply, SandboxesRefreshed)  # noqa: S101 (the contract of RefreshSandboxes)
            if reply.last is None:
                return
            after = reply.last

    async def _record(self, command: RecordJob) -> None:
        """A job that is not told of its end is shown as abandoned; the sync is none the worse for it."""
        try:
            await ask(self._requester, command, timeout_sec=RECORD_TIMEOUT_SEC)
        except Stopped as stopped:
            log.warning("job.not_recorded", job_id=str(command.job_id), reason=stopped.refusal.message)


def _unreadable(listing: Listing) -> tuple[str, ...]:
    """Sandboxes that are listed, though in records that lack what we need: they are not gone. One that is listed
    twice may be readable all the same."""
    readable = {account.sandbox_id for account in listing.accounts}
    skipped = (skipped.sandbox_id for skipped in listing.skipped if skipped.sandbox_id not in readable)
    return tuple(dict.fromkeys(sandbox_id for sandbox_id in skipped if sandbox_id is not None))


def _ended(job_id: uuid.UUID, progress: dict[str, int], reply: PoolSynced | Refused) -> RecordJob:
    result: dict[str, int | str]
    state: JobState
    if isinstance(reply, PoolSynced):
        state, result = "completed", reply.model_dump(exclude={"type", "version"})
    else:
        state = "held" if reply.code == "SYNC_HELD" else "failed"
        result = {"code": reply.code, "message": reply.message}
    return RecordJob(job_id=job_id, kind="sync", state=state, progress=progress, result=result)
