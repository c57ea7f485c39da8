"""Listings of CSP: staged, weighed, applied or held."""

import json

import structlog

from allocator import domain, listings, metrics, store
from allocator.writer import Overtaken, Writer
from sandbox_broker.contract import replies
from sandbox_broker.contract.commands import ApplyListing, BeginListing, RefreshSandboxes, StageListing
from sandbox_broker.contract.replies import Reply
from sandbox_broker.database.schema import PROOF_GRACE

log = structlog.get_logger()


async def begin_listing(writer: Writer, _: BeginListing) -> Reply:
    row = await store.one(writer.connection, listings.BEGIN_LISTING, writer.epoch)
    return replies.ListingBegun(listing_id=row["listing_id"])


async def stage_listing(writer: Writer, command: StageListing) -> Reply:
    staged = await listings.stage_listing(
        writer.connection, writer.epoch, command.listing_id, command.accounts, command.unreadable
    )
    return replies.ListingStaged(staged=staged)


async def apply_listing(writer: Writer, command: ApplyListing) -> Reply:
    """Weighs the listing, then applies it or not. A listing that has been applied gives its answer again, unless a
    crash of the database has emptied it: then all that students hold would look as if CSP lacked it."""
    listing_id = command.listing_id
    weight = await store.one(writer.connection, listings.WEIGH_LISTING, writer.epoch, listing_id)
    if weight["outdated"] or weight["listed"] != command.total:
        return domain.LISTING_OUTDATED
    if not weight["applied"]:
        refusal = domain.held(
            weight["listed"],
            weight["lacking"] + weight["moving_in_pool"],
            weight["pool"],
            command.max_stale_fraction,
        )
        if refusal and not command.force:
            await store.one(writer.connection, listings.HOLD_LISTING, writer.epoch, listing_id, refusal.message)
            log.warning("sync.held", listing_id=listing_id, reason=refusal.message)
            return refusal
        if weight["moving"]:
            await listings.move_accounts(writer.connection, writer.epoch, listing_id)
        row = await store.one(writer.connection, listings.APPLY_LISTING, writer.epoch, listing_id, PROOF_GRACE)
        if row["synced"] is None:
            raise Overtaken
        metrics.REOPENED.inc(row["reopened"])
    flagged = await store.one(writer.connection, listings.FLAG_MISSING, writer.epoch, listing_id, PROOF_GRACE)
    outcome = json.loads(flagged["outcome"])
    log.info("sync.applied", listing_id=listing_id, **outcome)
    return replies.ListingApplied(**outcome)


async def refresh_sandboxes(writer: Writer, command: RefreshSandboxes) -> Reply:
    row = await store.one(
        writer.connection,
        listings.REFRESH_SANDBOXES,
        writer.epoch,
        command.listing_id,
        command.after or "",
        command.limit,
    )
    return replies.SandboxesRefreshed(last=row["last"])
