"""Read queries for named tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine

from gateway.api.schemas.tokens import HeldLease, TokenRecord
from gateway.queries.sandboxes import label_unix_seconds, read_connection
from sandbox_broker.database.schema import leases, policy_set, token_uses, tokens

MAX_LEASES = 500
"""Leases in the answer to a suspension."""


async def changed_tokens(engine: AsyncEngine, known_version: int) -> tuple[int, Sequence[Mapping[str, Any]] | None]:
    """Return the version of the tokens, and the valid ones, or None if `known_version` is the current one.

    A token of a later version may be among them. The next call then returns the tokens again. Raises ApiError
    DATABASE_UNAVAILABLE.
    """
    valid = select(
        tokens.c.key_id,
        tokens.c.name,
        tokens.c.role,
        tokens.c.tracks,
        tokens.c.prefixes,
        label_unix_seconds(tokens.c.expires_at),
        tokens.c.token_hash,
        tokens.c.pepper_id,
    ).where(tokens.c.revoked_at.is_(None), tokens.c.suspended_at.is_(None))
    async with read_connection(engine) as connection:
        version: int = (await connection.execute(select(policy_set.c.version))).scalar_one()
        if version == known_version:
            return version, None
        return version, [dict(row) for row in (await connection.execute(valid)).mappings()]


async def list_tokens(engine: AsyncEngine) -> list[TokenRecord]:
    """Return the tokens that are not revoked, by name. Raises ApiError DATABASE_UNAVAILABLE."""
    columns = ("name", "role", "tracks", "prefixes", "max_active", "max_new_per_hour", "max_rate", "issued_by")
    query = (
        select(
            *(tokens.c[name] for name in columns),
            label_unix_seconds(tokens.c.expires_at),
            label_unix_seconds(tokens.c.issued_at),
            label_unix_seconds(tokens.c.suspended_at),
            label_unix_seconds(token_uses.c.last_used_at),
        )
        .select_from(tokens.outerjoin(token_uses, token_uses.c.key_id == tokens.c.key_id))
        .where(tokens.c.revoked_at.is_(None))
        .order_by(tokens.c.name)
    )
    async with read_connection(engine) as connection:
        return [TokenRecord.model_validate(row) for row in (await connection.execute(query)).mappings()]


async def active_leases(engine: AsyncEngine, token: str) -> list[HeldLease]:
    """Return active leases that were made with the token, newest first, at most MAX_LEASES.

    Raises ApiError DATABASE_UNAVAILABLE.
    """
    query = (
        select(
            leases.c.sandbox_id,
            leases.c.holder,
            leases.c.track_name,
            label_unix_seconds(leases.c.allocated_at),
            label_unix_seconds(leases.c.expires_at),
        )
        .where(leases.c.token == token, leases.c.end_reason.is_(None))  # as in leases_by_expiry
        .order_by(leases.c.allocated_at.desc())
        .limit(MAX_LEASES)
    )
    async with read_connection(engine) as connection:
        return [HeldLease.model_validate(row) for row in (await connection.execute(query)).mappings()]
