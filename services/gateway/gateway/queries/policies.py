"""Read query for the policies."""

from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine

from gateway.queries.sandboxes import read_connection
from sandbox_broker.database.schema import policies


async def read_policies(engine: AsyncEngine) -> list[dict[str, Any]]:
    """Return the documents of all policies, by name. Raises ApiError DATABASE_UNAVAILABLE."""
    async with read_connection(engine) as connection:
        documents = await connection.scalars(select(policies.c.document).order_by(policies.c.name))
        return [dict(document) for document in documents]
