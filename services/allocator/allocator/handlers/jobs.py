"""What an administrator has started, and how it goes."""

import json

from allocator import jobs, store
from allocator.writer import Writer
from sandbox_broker.contract import replies
from sandbox_broker.contract.commands import RecordJob
from sandbox_broker.contract.replies import Reply


async def record_job(writer: Writer, command: RecordJob) -> Reply:
    row = await store.one(
        writer.connection,
        jobs.RECORD_JOB,
        writer.epoch,
        command.job_id,
        command.kind,
        command.state,
        json.dumps(command.progress),
        None if command.result is None else json.dumps(command.result),
    )
    return replies.Recorded(changed=row["changed"])
