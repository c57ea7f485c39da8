"""Listings of CSP: stage, assess, then apply or hold."""

import json

import structlog

from allocator import domain, metrics
from allocator.handlers import creations
from allocator.sql import listings
from allocator.write_session import ConcurrentUpdate, WriteSession
from sandbox_broker.contract import replies
from sandbox_broker.contract.commands import ApplyListing, BeginListing, RefreshSandboxes, StageListing
from sandbox_broker.contract.replies import Reply, refuse

log = structlog.get_logger()


async def begin_listing(session: WriteSession, _: BeginListing) -> Reply:
    return replies.ListingBegun(listing_id=await listings.begin_listing(session))


async def stage_listing(session: WriteSession, command: StageListing) -> Reply:
    staged = await listings.stage_listing(
        session, listing_id=command.listing_id, accounts=command.accounts, unreadable=command.unreadable
    )
    return replies.ListingStaged(staged=staged)


async def apply_listing(session: WriteSession, command: ApplyListing) -> Reply:
    """Apply or hold the listing; repeat the reply of an applied listing.

    A crash of the database empties the staged listing. Its number of accounts then differs from the command, and
    the listing is refused. Otherwise all leased sandboxes would look as if CSP lacked them.
    """
    listing_id = command.listing_id
    assessment = await listings.assess_listing(session, listing_id=listing_id)
    if assessment["outdated"] or assessment["listed"] != command.total:
        return refuse("LISTING_OUTDATED")
    if not assessment["applied"]:
        problem = domain.find_loss_problem(
            assessment["listed"],
            assessment["lacking"] + assessment["moving_in_pool"],
            assessment["pool"],
            command.max_stale_fraction,
        ) or domain.find_growth_problem(
            assessment["discovered"],
            max(assessment["largest"], assessment["pool"]),
            command.max_growth_fraction,
        )
        if problem and not command.force:
            await listings.hold_listing(session, listing_id=listing_id, reason=problem)
            log.warning("sync.held", listing_id=listing_id, reason=problem)
            return refuse("SYNC_HELD", reason=problem)
        if assessment["moving"]:
            await listings.move_accounts(session, listing_id=listing_id)
        row = await listings.apply_listing(session, listing_id=listing_id)
        if row["synced"] is None:
            raise ConcurrentUpdate
        metrics.REOPENED.inc(row["reopened"])
        for creation_sec in row["creation_secs"]:
            metrics.CREATION.observe(creation_sec)
    await creations.settle(session, listing_id)
    outcome = json.loads(await listings.flag_missing(session, listing_id=listing_id))
    log.info("sync.applied", listing_id=listing_id, **outcome)
    return replies.ListingApplied(**outcome)


async def refresh_sandboxes(session: WriteSession, command: RefreshSandboxes) -> Reply:
    last = await listings.refresh_sandboxes(
        session, listing_id=command.listing_id, after=command.after or "", limit=command.limit
    )
    return replies.SandboxesRefreshed(last=last)
