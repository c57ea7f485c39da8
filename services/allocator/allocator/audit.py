"""Audit of commands: an entry per command of an administrator, in the transaction of its effect.

A command that is delivered again runs again, finds its work done, and writes an entry with the outcome `unchanged`.
"""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from allocator.sql import audit
from allocator.sql.audit import Entry
from allocator.write_session import WriteSession
from sandbox_broker.contract.commands import (
    Command,
    EndLease,
    EndTokenLeases,
    ExtendLease,
    ForgetStudent,
    IssueToken,
    RecordJob,
    ReplaceSandbox,
)
from sandbox_broker.contract.replies import (
    LeaseExtended,
    LeaseGranted,
    PoliciesApplied,
    Recorded,
    Refused,
    Reply,
    SandboxReleased,
    StudentForgotten,
    TokenLeasesEnded,
)

C = TypeVar("C", bound=Command)

ACTIONS = {
    "AllocateSandbox": "lease.allocate",
    "ClaimLease": "lease.claim",
    "ReleaseSandbox": "lease.release",
    "ApplyPolicies": "policies.apply",
    "ConfirmRestore": "restore.confirm",
    "DeleteStale": "sandboxes.delete_stale",
    "DropDeadLetter": "dead_letter.drop",
    "EndLease": "lease.release",
    "EndTokenLeases": "lease.release",
    "ExtendLease": "lease.extend",
    "ForgetStudent": "student.forget",
    "IssueToken": "token.create",
    "PurgeRecords": "sandboxes.bulk_delete",
    "ReplaceSandbox": "lease.replace",
    "ReplayDeadLetter": "dead_letter.replay",
    "ResumeStock": "stock.resume",
    "RetryDeletion": "deletion.retry",
    "RevokeToken": "token.revoke",
    "RotateAccessKeys": "access.rotate_keys",
    "SuspendToken": "token.suspend",
}
"""Action of an audit entry, by the type of the command. Other commands are named by their type."""


async def run_audited(
    session: WriteSession, command: C, run: Callable[[WriteSession, C], Awaitable[Reply]]
) -> Reply:
    """Run the command. If an administrator sent it, record it in the same transaction."""
    if command.sender is None:
        return await run(session, command)
    async with session.connection.transaction():
        reply = await run(session, command)
        if entries := build_entries(command, reply):
            await audit.record(session, entries)
    return reply


def build_entries(command: Command, reply: Reply) -> list[Entry]:
    """Return the entries of the command: one, or one per ended lease."""
    objects: list[str | None] = [find_object(command)]
    if isinstance(reply, TokenLeasesEnded):
        objects = list(reply.sandbox_ids)
    elif isinstance(reply, StudentForgotten):
        objects = [reply.pseudonym]
    entries = [build_entry(command, name, _find_outcome(reply)) for name in objects]
    if isinstance(command, ForgetStudent) and isinstance(reply, StudentForgotten):
        return [_forget(entry, command.student, reply.pseudonym) for entry in entries]
    return entries


def build_entry(command: Command, name: str | None, outcome: str) -> Entry:
    """Return the entry of a command with a sender about the object of this name."""
    sender = command.sender
    if sender is None:
        raise ValueError("the command has no sender")
    return Entry(
        sender.actor,
        find_action(command),
        name,
        _find_reason(command) or sender.reason,
        command.request_id,
        sender.address,
        outcome,
    )


def _forget(entry: Entry, student: str, pseudonym: str) -> Entry:
    """Return the entry without the id of the student in its reason."""
    return entry if entry.reason is None else entry._replace(reason=entry.reason.replace(student, pseudonym))


def find_action(command: Command) -> str:
    if isinstance(command, RecordJob):
        return command.kind
    return ACTIONS.get(command.type, command.type)


def _find_reason(command: Command) -> str | None:
    if isinstance(command, EndLease | EndTokenLeases | ExtendLease):
        return command.note
    return command.reason if isinstance(command, ReplaceSandbox) else None


def find_object(command: Command) -> str | None:
    """Return the id or the name of the object: sandbox, dead letter, job, token, lab, or name prefix."""
    if isinstance(command, IssueToken):
        return command.grant.name
    for field in ("sandbox_id", "dead_letter_id", "job_id", "name", "track_name", "name_prefix", "status"):
        value = getattr(command, field, None)
        if value is not None:
            return str(value)
    return None


def _find_outcome(reply: Reply) -> str:
    if isinstance(reply, Refused):
        return reply.code
    changed = True
    if isinstance(reply, Recorded | LeaseExtended | SandboxReleased):
        changed = reply.changed
    elif isinstance(reply, LeaseGranted):
        changed = reply.new
    elif isinstance(reply, PoliciesApplied):
        changed = bool(reply.changes)
    return "done" if changed else "unchanged"
