"""Sync: fetch CSP's listing, stage it with the allocator in batches, and have the allocator apply it."""

import asyncio
import time
import uuid
from dataclasses import dataclass, field, replace

import structlog

from csp_syncer import metrics
from csp_syncer.chunking import split_listing
from csp_syncer.settings import Settings
from sandbox_broker.contract.commands import (
    UNREADABLE_ACCOUNT,
    ApplyListing,
    BeginListing,
    Command,
    R,
    RecordJob,
    RefreshSandboxes,
)
from sandbox_broker.contract.replies import ListingApplied, PoolSynced, Refused, refuse
from sandbox_broker.contract.types import JobState
from sandbox_broker.csp.client import CspClient, CspError, Listing
from sandbox_broker.messaging.maintenance_client import MaintenanceClient
from sandbox_broker.messaging.outcome import CommandNotDone, CommandRefused, ServiceUnavailable
from sandbox_broker.observability import log_context

LISTING_TIMEOUT_SEC = 60.0
APPLY_TIMEOUT_SEC = 90.0
"""Applying takes a few statements. The allocator ends each of them after 30 s."""
MAX_ATTEMPTS = 4
"""Limit of attempts to send a command of a sync, if its connection is lost each time."""
RETRY_SEC = 1.0
REFRESH_BATCH_SIZE = 500
"""Sandboxes that one command renames. Their rows are locked for the time of that command."""
JOB_REPORT_SEC = 5.0
"""Period of progress reports to the job that waits for a sync."""
JOB_REPORT_TIMEOUT_SEC = 5.0
MAX_LOGGED_REASONS = 20
"""Reasons for skipped records in one log line."""

MAX_LOGGED_NAMES = 5

log = structlog.get_logger()


@dataclass(slots=True, eq=False)
class _RunningSync:
    progress: dict[str, int] = field(default_factory=dict)
    request_id: str | None = field(default_factory=log_context.request_id)
    """The request that started this sync. Log lines and commands of the sync carry this id."""
    task: asyncio.Task[PoolSynced | Refused] = field(init=False)


class Syncer:
    """Runs one sync at a time. A request during a sync joins it."""

    def __init__(self, settings: Settings, csp: CspClient, allocator: MaintenanceClient) -> None:
        self._settings = settings
        self._csp = csp
        self._allocator = allocator
        self._running: dict[bool, _RunningSync] = {}
        """By `force`: a forced sync may apply a listing that an unforced one refuses, so the two never join."""
        self._lock = asyncio.Lock()

    async def sync_pool(self, *, force: bool, job_id: uuid.UUID | None = None) -> PoolSynced | Refused:
        """Run a sync, or join the running one with the same `force`; return its reply.

        With a `job_id`, also report progress and end to that job.
        """
        running = self._running.get(force)
        if running is None:
            running = self._running[force] = _RunningSync()
            running.task = asyncio.create_task(self._sync(running.progress, force=force))
            running.task.add_done_callback(lambda _: self._running.pop(force))
        else:
            log.info("sync.joined", begun_by=running.request_id)
        if job_id is None:
            return await asyncio.shield(running.task)
        while not (await asyncio.wait([running.task], timeout=JOB_REPORT_SEC))[0]:
            await self._report_job(RecordJob(job_id=job_id, kind="sync", progress=running.progress))
        reply = running.task.result()
        await self._report_job(_build_final_report(job_id, running.progress, reply))
        return reply

    async def stop(self) -> None:
        """Cancel the running syncs. The allocator applies a listing as a whole or not at all."""
        for running in list(self._running.values()):
            running.task.cancel()
            await asyncio.wait([running.task])

    async def _sync(self, progress: dict[str, int], *, force: bool) -> PoolSynced | Refused:
        async with self._lock:
            started = time.monotonic()
            try:
                applied = await self._fetch_and_apply(progress, force=force)
            except CommandNotDone as error:
                refusal = _build_refusal(error)
                log.warning("sync.refused", code=refusal.code, reason=refusal.message)
                metrics.SYNCS.labels(outcome=refusal.code.lower()).inc()
                return refusal
            duration_sec = time.monotonic() - started
            duration_ms = round(duration_sec * 1000)
            metrics.DURATION.observe(duration_sec)
            metrics.LAST_COMPLETED.set_to_current_time()
            log.info("sync.completed", duration_ms=duration_ms, **applied.model_dump(exclude={"type", "version"}))
            metrics.SYNCS.labels(outcome="completed").inc()
            return PoolSynced(
                synced=applied.synced,
                marked_stale=applied.marked_stale,
                restored=applied.restored,
                duration_ms=duration_ms,
            )

    async def _fetch_and_apply(self, progress: dict[str, int], *, force: bool) -> ListingApplied:
        # Begin before CSP is asked: the allocator then knows which deletions the listing cannot contain yet.
        begun = await self._request(BeginListing())
        log_context.bind(listing_id=begun.listing_id)
        listing = await self._fetch_listing()
        unreadable = _find_unreadable(listing)
        progress.update(listed=len(listing.accounts) + len(unreadable), staged=0)
        for command in split_listing(begun.listing_id, listing.accounts, unreadable):
            await self._request(command)
            progress["staged"] += len(command.accounts) + len(command.unreadable)
        apply = ApplyListing(
            listing_id=begun.listing_id,
            total=progress["listed"],
            max_stale_fraction=self._settings.sync_max_stale_fraction,
            max_growth_fraction=self._settings.sync_max_growth_fraction,
            force=force,
        )
        applied = await self._request(apply, timeout_sec=APPLY_TIMEOUT_SEC)
        try:
            await self._refresh_names(begun.listing_id)
        except CommandNotDone as error:  # the next sync corrects the remaining names
            log.warning("sync.names_postponed", reason=str(error))
        return applied

    async def _fetch_listing(self) -> Listing:
        try:
            listing = await self._csp.list_accounts()
        except CspError as error:
            refusal = refuse("CSP_UNAVAILABLE", cause="not_listed", problem=str(error))
            raise CommandRefused(refusal) from error
        if listing.skipped:
            metrics.SKIPPED.inc(len(listing.skipped))
            log.warning(
                "sync.records_skipped",
                skipped=len(listing.skipped),
                reasons=[skipped.reason for skipped in listing.skipped[:MAX_LOGGED_REASONS]],
            )
        return self._without_other_names(listing)

    def _without_other_names(self, listing: Listing) -> Listing:
        """Return the listing without accounts whose names are not allowed, as if CSP did not list them."""
        prefixes = self._settings.name_prefixes
        others = [account for account in listing.accounts if not account.name.startswith(prefixes)]
        metrics.NOT_ALLOWED.set(len(others))
        if not others:
            return listing
        examples = [account.name for account in others[:MAX_LOGGED_NAMES]]
        log.info("sync.names_not_allowed", accounts=len(others), examples=examples)
        allowed = tuple(account for account in listing.accounts if account.name.startswith(prefixes))
        return replace(listing, accounts=allowed)

    async def _refresh_names(self, listing_id: int) -> None:
        after: str | None = None
        while True:
            command = RefreshSandboxes(listing_id=listing_id, after=after, limit=REFRESH_BATCH_SIZE)
            reply = await self._request(command)
            if reply.last is None:
                return
            after = reply.last

    async def _request(self, command: Command[R], *, timeout_sec: float | None = None) -> R:
        """Send a command, and repeat it after the loss of a connection. Raises CommandNotDone.

        All commands of a sync are idempotent. Without repetition, a sync of many accounts would start from the
        beginning after each loss of a RabbitMQ node.
        """
        for _ in range(MAX_ATTEMPTS - 1):
            try:
                return await self._allocator.request(command, timeout_sec=timeout_sec)
            except ServiceUnavailable as error:
                log.info("sync.command_repeated", command=command.type, reason=str(error))
                await asyncio.sleep(RETRY_SEC)
        return await self._allocator.request(command, timeout_sec=timeout_sec)

    async def _report_job(self, command: RecordJob) -> None:
        """Report to the job. A lost report does not fail the sync: the gateway shows a silent job as failed."""
        try:
            await self._allocator.request(command, timeout_sec=JOB_REPORT_TIMEOUT_SEC)
        except CommandNotDone as error:
            log.warning("job.not_recorded", job_id=str(command.job_id), reason=str(error))


def _build_refusal(error: CommandNotDone) -> Refused:
    """Return the reply to the command of a failed sync."""
    if isinstance(error, CommandRefused):
        return error.refusal
    return refuse("ALLOCATOR_UNAVAILABLE", cause="no_reply", problem=str(error))


def _find_unreadable(listing: Listing) -> tuple[str, ...]:
    """Return the sandboxes whose records lack a required field, as StageListing names them. CSP lists these
    sandboxes, so they exist.

    A sandbox with another, complete record is left out.
    """
    readable = {key for account in listing.accounts for key in (account.sandbox_id, account.external_id)}
    skipped = (
        skipped.sandbox_id or f"{UNREADABLE_ACCOUNT}{skipped.external_id}"
        for skipped in listing.skipped
        if (key := skipped.sandbox_id or skipped.external_id) is not None and key not in readable
    )
    return tuple(dict.fromkeys(skipped))


def _build_final_report(job_id: uuid.UUID, progress: dict[str, int], reply: PoolSynced | Refused) -> RecordJob:
    result: dict[str, int | str]
    state: JobState
    if isinstance(reply, PoolSynced):
        state, result = "completed", reply.model_dump(exclude={"type", "version"})
    else:
        state = "held" if reply.code == "SYNC_HELD" else "failed"
        result = reply.to_job_result()
    return RecordJob(job_id=job_id, kind="sync", state=state, progress=progress, result=result)
