"""Routing: the handler of each command, in one lane for students and one for maintenance.

Each lane has a queue, a consumer and a database connection of its own, so students do not wait for maintenance.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from allocator.audit import run_audited
from allocator.handlers import (
    creations,
    dead_letters,
    deletions,
    jobs,
    lease_changes,
    leases,
    listings,
    logins,
    personal_data,
    policies,
    purge,
    restore,
    tokens,
    waiting,
)
from allocator.write_session import CUSTOM_PLANS, GENERIC_PLANS, WriteSession
from sandbox_broker.contract import topology
from sandbox_broker.contract.commands import (
    AllocateSandbox,
    ApplyListing,
    ApplyPolicies,
    BeginListing,
    ClaimAccess,
    ClaimCreations,
    ClaimDeletions,
    ClaimLease,
    Command,
    ConfirmRestore,
    DeleteStale,
    DropDeadLetter,
    EndCleanup,
    EndCreations,
    EndLease,
    EndPlay,
    EndTokenLeases,
    ExpireLeases,
    ExtendLease,
    ForgetStudent,
    HurryDeletions,
    IssueToken,
    PurgeAudit,
    PurgePersonalData,
    PurgeRecords,
    RecordAccess,
    RecordAccessFailure,
    RecordAccessRemoval,
    RecordCreation,
    RecordCreationFailure,
    RecordDeletion,
    RecordDeletionFailure,
    RecordJob,
    RecordTokenUses,
    RefreshSandboxes,
    ReleaseSandbox,
    ReplaceSandbox,
    ReplayDeadLetter,
    ResumeStock,
    RetryDeletion,
    RevokeToken,
    RotateAccessKeys,
    ServeWaiting,
    StageListing,
    SuspendToken,
)
from sandbox_broker.contract.replies import Reply

Handler = Callable[[WriteSession, Sequence[Any]], Awaitable[list[Reply]]]


def _unbatched(handle: Callable[[WriteSession, Any], Awaitable[Reply]]) -> Handler:
    async def handle_one(session: WriteSession, commands: Sequence[Command]) -> list[Reply]:
        (command,) = commands
        return [await run_audited(session, command, handle)]

    return handle_one


@dataclass(frozen=True, slots=True)
class Lane:
    """Command queue, its handlers, and their execution."""

    queue: topology.Queue
    handlers: Mapping[type[Command], Handler]
    max_batch: int
    """Envelopes per batch. An envelope holds up to codec.MAX_ENVELOPE commands."""
    batched: bool
    """True: a handler gets all commands of its type in a batch, in the order of `handlers`. False: commands run one
    at a time, so a retry repeats only the failed command and never loses the claim of another."""
    statement_timeout_sec: float
    planner_settings: str
    """write_session.GENERIC_PLANS or CUSTOM_PLANS."""
    low_priority: bool
    """True: the consumer pauses after each batch for twice its duration and leaves the processor mostly to other
    work."""
    grants_leases: bool
    """True: the lane needs a database with all leases (see newest_lease)."""


# Releases run before allocations. A student must not get a lease and lose it by a release in the same batch. A
# claim runs before the allocations of its new holder, who then gets the claimed lease. Replacements run before
# allocations, because their students are at work.
# The statement timeout is shorter than the reply timeout of the gateway.
STUDENTS = Lane(
    topology.ALLOCATOR_COMMANDS,
    {
        ReleaseSandbox: leases.release_sandbox,
        EndPlay: leases.end_play,
        ClaimLease: lease_changes.claim_lease,
        ExtendLease: lease_changes.extend_lease,
        ReplaceSandbox: lease_changes.replace_sandbox,
        AllocateSandbox: leases.allocate_sandbox,
        ServeWaiting: waiting.serve_waiting,
    },
    max_batch=20,
    batched=True,
    statement_timeout_sec=2,
    planner_settings=GENERIC_PLANS,
    low_priority=False,
    grants_leases=True,
)
MAINTENANCE = Lane(
    topology.ALLOCATOR_MAINTENANCE,
    {
        ExpireLeases: _unbatched(leases.expire_leases),
        EndLease: _unbatched(leases.end_lease),
        ClaimDeletions: _unbatched(deletions.claim_deletions),
        HurryDeletions: _unbatched(deletions.hurry_deletions),
        EndCleanup: _unbatched(deletions.end_cleanup),
        RecordDeletion: _unbatched(deletions.record_deletion),
        RecordDeletionFailure: _unbatched(deletions.record_deletion_failure),
        RetryDeletion: _unbatched(deletions.retry_deletion),
        ClaimCreations: _unbatched(creations.claim_creations),
        EndCreations: _unbatched(creations.end_creations),
        RecordCreation: _unbatched(creations.record_creation),
        RecordCreationFailure: _unbatched(creations.record_creation_failure),
        ResumeStock: _unbatched(creations.resume_stock),
        ClaimAccess: _unbatched(logins.claim_access),
        RecordAccess: _unbatched(logins.record_access),
        RecordAccessFailure: _unbatched(logins.record_access_failure),
        RecordAccessRemoval: _unbatched(logins.record_access_removal),
        RotateAccessKeys: _unbatched(logins.rotate_access_keys),
        BeginListing: _unbatched(listings.begin_listing),
        StageListing: _unbatched(listings.stage_listing),
        ApplyListing: _unbatched(listings.apply_listing),
        RefreshSandboxes: _unbatched(listings.refresh_sandboxes),
        DeleteStale: _unbatched(purge.delete_stale),
        PurgeRecords: _unbatched(purge.purge_records),
        RecordJob: _unbatched(jobs.record_job),
        ReplayDeadLetter: _unbatched(dead_letters.replay_dead_letter),
        DropDeadLetter: _unbatched(dead_letters.drop_dead_letter),
        ConfirmRestore: _unbatched(restore.confirm_restore),
        ApplyPolicies: _unbatched(policies.apply_policies),
        IssueToken: _unbatched(tokens.issue_token),
        RevokeToken: _unbatched(tokens.revoke_token),
        SuspendToken: _unbatched(tokens.suspend_token),
        EndTokenLeases: _unbatched(tokens.end_token_leases),
        RecordTokenUses: _unbatched(tokens.record_token_uses),
        ForgetStudent: _unbatched(personal_data.forget_student),
        PurgeAudit: _unbatched(personal_data.purge_audit),
        PurgePersonalData: _unbatched(personal_data.purge_personal_data),
    },
    max_batch=1,
    batched=False,
    statement_timeout_sec=30,
    planner_settings=CUSTOM_PLANS,
    low_priority=True,
    grants_leases=False,
)
