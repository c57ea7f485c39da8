"""Queries of the stock: levels with forecasts and intents in flight, and the history of creation intents."""

from collections import defaultdict
from typing import Any, Literal

from sqlalchemy import RowMapping, func, select
from sqlalchemy.ext.asyncio import AsyncEngine

from gateway.api.schemas.stock import (
    Creation,
    CreationPage,
    CreationTime,
    IntentInFlight,
    Stock,
    StockLevel,
)
from gateway.queries import cursors
from gateway.queries.sandboxes import read_connection, unix_seconds
from sandbox_broker.database.schema import creation_duty, creations, stock_forecasts, stock_levels

MAX_INTENTS = 50
"""Limit of intents in flight per prefix. Newer ones are left out."""
KEY_TYPES = (int,)
"""Types of the key of a cursor: the id of the intent."""


async def stock(engine: AsyncEngine) -> Stock:
    """Return the levels of all stock rules. Raises ApiError DATABASE_UNAVAILABLE."""
    levels = select(
        stock_levels,
        unix_seconds(stock_levels.c.last_error_at).label("last_error_sec"),
        unix_seconds(stock_levels.c.stopped_at).label("stopped_sec"),
    ).order_by(stock_levels.c.name_prefix)
    turn = func.row_number().over(partition_by=creations.c.name_prefix, order_by=creations.c.creation_id)
    in_flight = (
        select(
            creations.c.name_prefix,
            creations.c.creation_id,
            creations.c.name,
            creations.c.state,
            func.extract("epoch", func.now() - creations.c.granted_at).label("age_sec"),
            ((creations.c.state == "pending") & creations.c.claim.is_not(None)).label("claimed"),
            creations.c.attempts,
            creations.c.error,
            turn.label("turn"),
        )
        .where(creations.c.in_flight)
        .subquery()
    )
    oldest = select(in_flight).where(in_flight.c.turn <= MAX_INTENTS).order_by(in_flight.c.creation_id)
    async with read_connection(engine) as connection:
        rows = (await connection.execute(levels)).mappings().all()
        forecasts = {
            row["name_prefix"]: row for row in (await connection.execute(select(stock_forecasts))).mappings()
        }
        intents: dict[str, list[IntentInFlight]] = defaultdict(list)
        for row in (await connection.execute(oldest)).mappings():
            intents[row["name_prefix"]].append(IntentInFlight.model_validate(dict(row)))
        asked_at = await connection.scalar(select(unix_seconds(creation_duty.c.claimed_at)))
    return Stock(
        stock=[
            _level(row, forecasts[row["name_prefix"]], intents[row["name_prefix"]])
            for row in rows
            if row["name_prefix"] in forecasts  # an administrator may change the rules between both queries
        ],
        asked_at=asked_at,
    )


def _level(row: RowMapping, forecast: RowMapping, intents: list[IntentInFlight]) -> StockLevel:
    return StockLevel.model_validate(
        {
            **row,
            "state": _state(row),
            "last_error_at": row["last_error_sec"],
            "stopped_at": row["stopped_sec"],
            "exhaustion_sec": forecast["exhaustion_sec"],
            "recent_leases_per_hour": forecast["recent_leases_per_sec"] * 3600,
            "usual_leases_per_hour": forecast["usual_leases_per_sec"] * 3600,
            "creation": CreationTime(
                count=forecast["creations"],
                p50_sec=forecast["creation_p50_sec"],
                p90_sec=forecast["creation_p90_sec"],
            ),
            "intents": intents,
        }
    )


def _state(row: RowMapping) -> Literal["full", "filling", "limited", "stopped"]:
    if row["stopped_at"] is not None:
        return "stopped"
    if row["available"] >= row["target"]:
        return "full"
    return "filling" if row["creating"] or row["missing"] else "limited"


async def creations_page(engine: AsyncEngine, name_prefix: str | None, *, limit: int, cursor: str) -> CreationPage:
    """Return a page of creation intents, newest first, of all stock rules or of the rule with this prefix.

    Raises ApiError INVALID_CURSOR or DATABASE_UNAVAILABLE.
    """
    times = ("granted_at", "first_claimed_at", "created_at", "imported_at", "ended_at")
    query = select(
        creations.c.creation_id,
        creations.c.name,
        creations.c.name_prefix,
        creations.c.state,
        creations.c.in_flight,
        *(unix_seconds(creations.c[name]).label(name) for name in times),
        creations.c.attempts,
        creations.c.error,
        creations.c.external_id,
        creations.c.history,
    ).order_by(creations.c.creation_id.desc())
    if name_prefix is not None:
        query = query.where(creations.c.name_prefix == name_prefix)
    if cursor:
        (before,) = cursors.decode(cursor, KEY_TYPES, "creations", name_prefix)
        query = query.where(creations.c.creation_id < before)
    async with read_connection(engine) as connection:
        rows: list[Any] = list((await connection.execute(query.limit(limit + 1))).mappings())
    page = [Creation.model_validate(dict(row)) for row in rows[:limit]]
    next_cursor = None
    if len(rows) > limit:
        next_cursor = cursors.encode([page[-1].creation_id], "creations", name_prefix)
    return CreationPage(creations=page, count=len(page), cursor=next_cursor)
