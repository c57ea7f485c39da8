"""Restore: an administrator confirms a database that lacks the newest lease."""

import structlog

from allocator.write_session import WriteSession
from sandbox_broker.contract.commands import ConfirmRestore
from sandbox_broker.contract.replies import Recorded, Reply

log = structlog.get_logger()


async def confirm_restore(session: WriteSession, _: ConfirmRestore) -> Reply:
    changed = session.newest_lease is not None and await session.newest_lease.forget()
    log.warning("restore.confirmed", changed=changed)
    return Recorded(changed=changed)
