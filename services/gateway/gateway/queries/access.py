"""Read query of the gateway for the login inside a sandbox."""

from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine

from gateway.queries.sandboxes import read_connection
from sandbox_broker.database.schema import accesses, leases, sandboxes


@dataclass(frozen=True, slots=True)
class Login:
    holder: str | None
    """Current or last holder of the sandbox. None: it was never leased."""
    has_ended: bool
    """Whether the lease has ended."""
    token: str | None
    """Named token that the lease was made with."""
    secret_hash: bytes | None
    """Hash of the lease secret."""
    state: str | None
    """None: the lease has no login."""
    email: str | None
    password: str | None
    """Encrypted."""
    user_id: str | None
    error: str | None


async def find_login(engine: AsyncEngine, sandbox_id: str) -> Login | None:
    """Return the login of the sandbox, or None if the id is unknown."""
    query = (
        select(
            leases.c.holder,
            leases.c.ended_at.is_not(None).label("has_ended"),
            leases.c.token,
            leases.c.secret_hash,
            accesses.c.state,
            accesses.c.email,
            accesses.c.password,
            accesses.c.user_id,
            accesses.c.error,
        )
        .select_from(
            sandboxes.outerjoin(leases, leases.c.sandbox_id == sandboxes.c.sandbox_id).outerjoin(
                accesses, accesses.c.sandbox_id == sandboxes.c.sandbox_id
            )
        )
        .where(sandboxes.c.sandbox_id == sandbox_id)
    )
    async with read_connection(engine) as connection:
        row = (await connection.execute(query)).mappings().one_or_none()
    return None if row is None else Login(**row)
