"""Creation intents of the stock: grant and claim them, record their results, resume a stopped name prefix."""

import json
from datetime import timedelta

import structlog

from allocator import metrics
from allocator.sql import creations
from allocator.write_session import WriteSession
from sandbox_broker.contract import replies
from sandbox_broker.contract.commands import (
    ClaimCreations,
    EndCreations,
    RecordCreation,
    RecordCreationFailure,
    ResumeStock,
)
from sandbox_broker.contract.replies import Reply, refuse

log = structlog.get_logger()


async def claim_creations(session: WriteSession, command: ClaimCreations) -> Reply:
    if command.dry_run:
        return _to_reply(await creations.preview_creations(session, limit=command.limit))
    claim = timedelta(seconds=command.claim_sec)
    await creations.add_prefixes(session)
    if abandoned := await creations.abandon_surplus(session, run_id=command.run_id, claim=claim):
        _note_abandoned(abandoned, reason="not needed")
    granted = await creations.grant_creations(
        session,
        run_id=command.run_id,
        claim=claim,
        request_id=command.request_id,
        traceparent=command.traceparent,
    )
    for name_prefix, number in granted.items():
        log.info("stock.creations_granted", name_prefix=name_prefix, number=number)
    return _to_reply(
        await creations.claim_creations(
            session, run_id=command.run_id, claim=claim, limit=command.limit, received=command.received
        )
    )


def _to_reply(rows: list[creations.ClaimRow]) -> Reply:
    claimed = tuple(
        replies.DueCreation(
            creation_id=row["creation_id"],
            name=row["name"],
            name_prefix=row["name_prefix"],
            admin_user=None if row["admin_user"] is None else json.loads(row["admin_user"]),
            attempts=row["attempts"],
            claimed_before=row["claimed_before"],
            request_id=row["request_id"],
            traceparent=row["traceparent"],
        )
        for row in rows
        if row["creation_id"] is not None
    )
    first = rows[0]
    return replies.CreationsClaimed(
        creations=claimed,
        on_duty=first["on_duty"],
        next_in_sec=None if claimed else first["next_in_sec"],
        awaited=first["awaited"],
        awaited_sec=first["awaited_sec"],
    )


async def end_creations(session: WriteSession, command: EndCreations) -> Reply:
    return replies.Recorded(changed=await creations.end_creations(session, run_id=command.run_id))


async def record_creation(session: WriteSession, command: RecordCreation) -> Reply:
    created = await creations.record_creation(
        session, creation_id=command.creation_id, external_id=command.external_id
    )
    if created is not None:
        name, name_prefix = created
        metrics.CREATIONS.labels(name_prefix, "created").inc()
        log.info("stock.created", creation_id=command.creation_id, name=name, external_id=command.external_id)
    return replies.Recorded(changed=created is not None)


async def record_creation_failure(session: WriteSession, command: RecordCreationFailure) -> Reply:
    retry_in = None if command.retry_in_sec is None else timedelta(seconds=command.retry_in_sec)
    row = await creations.record_creation_failure(
        session,
        run_id=command.run_id,
        creation_id=command.creation_id,
        attempts=command.attempts,
        error=command.error,
        retry_in=retry_in,
        refused=command.refused,
        max_failures=command.max_failures,
    )
    if row["name"] is not None:
        metrics.CREATIONS.labels(row["name_prefix"], "failed" if retry_in is None else "postponed").inc()
        log.warning(
            "stock.creation_failed" if retry_in is None else "stock.creation_postponed",
            creation_id=command.creation_id,
            name=row["name"],
            attempts=command.attempts + 1,
            error=command.error,
            retry_in_sec=command.retry_in_sec,
        )
    if row["has_stopped"]:
        log.error(
            "stock.stopped",
            name_prefix=row["name_prefix"],
            failures=row["failures"],
            refused=command.refused,
            error=command.error,
            action=f"No account is created for this prefix until brokerctl stock resume {row['name_prefix']}.",
        )
    return replies.Recorded(changed=row["name"] is not None)


async def resume_stock(session: WriteSession, command: ResumeStock) -> Reply:
    row = await creations.resume_stock(session, name_prefix=command.name_prefix)
    if not row["exists"]:
        return refuse("STOCK_RULE_NOT_FOUND", name_prefix=command.name_prefix)
    if row["changed"]:
        log.info("stock.resumed", name_prefix=command.name_prefix)
    return replies.Recorded(changed=row["changed"])


async def settle(session: WriteSession, listing_id: int) -> None:
    """End the flight of intents without an account in the applied listing."""
    if abandoned := await creations.settle(session, listing_id=listing_id):
        _note_abandoned(abandoned, reason="not listed by CSP")


def _note_abandoned(names: list[str], *, reason: str) -> None:
    log.info("stock.creations_abandoned", number=len(names), names=names[:10], reason=reason)
