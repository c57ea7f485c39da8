"""Jobs started by an administrator, and their progress."""

import json

from allocator.sql import jobs
from allocator.write_session import WriteSession
from sandbox_broker.contract import replies
from sandbox_broker.contract.commands import RecordJob
from sandbox_broker.contract.replies import Reply


async def record_job(session: WriteSession, command: RecordJob) -> Reply:
    changed = await jobs.record_job(
        session,
        job_id=command.job_id,
        kind=command.kind,
        state=command.state,
        progress=json.dumps(command.progress),
        result=None if command.result is None else json.dumps(command.result),
    )
    return replies.Recorded(changed=changed)
