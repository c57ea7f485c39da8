"""The two lanes of commands, and who handles what comes to each: students do not wait for maintenance."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from allocator import store
from allocator.handlers import dead_letters, deletions, jobs, leases, listings, purge, students
from allocator.writer import Writer
from sandbox_broker.contract import topology
from sandbox_broker.contract.commands import (
    AllocateSandbox,
    ApplyListing,
    BeginListing,
    ClaimDeletions,
    Command,
    DeleteStale,
    DropDeadLetter,
    EndCleanup,
    EndLease,
    ExpireLeases,
    HurryDeletions,
    PurgeRecords,
    RecordDeletion,
    RecordDeletionFailure,
    RecordJob,
    RefreshSandboxes,
    ReleaseSandbox,
    ReplayDeadLetter,
    RetryDeletion,
    StageListing,
)
from sandbox_broker.contract.replies import Reply

Handler = Callable[[Writer, Sequence[Any]], Awaitable[list[Reply]]]


def _one_by_one(handle: Callable[[Writer, Any], Awaitable[Reply]]) -> Handler:
    async def handle_one(writer: Writer, commands: Sequence[Command]) -> list[Reply]:
        (command,) = commands
        return [await handle(writer, command)]

    return handle_one


@dataclass(frozen=True, slots=True)
class Lane:
    """One queue of commands, with a consumer and a database connection of its own."""

    queue: topology.Queue
    handlers: Mapping[type[Command], Handler]
    max_batch: int
    """Envelopes; each holds up to messages.MAX_ENVELOPE commands."""
    together: bool
    """Whether the handlers take all commands of their kind in a batch at once, in the order of `handlers`. Else
    they get one: what is repeated after a failure is then that command alone, and no claim that its neighbour
    was given is given away."""
    statement_timeout_sec: float
    plans: str
    """How its statements are planned: see store.connect."""
    gives_way: bool
    """Whether it rests after each batch for twice as long as that took, so that others mostly find the machine
    free."""


# What ends leases comes before what asks for them, so that nobody is told of a lease that the same batch ends.
# A student's statement has less time than the gateway waits for us.
STUDENTS = Lane(
    topology.ALLOCATOR_COMMANDS,
    {ReleaseSandbox: students.release_sandbox, AllocateSandbox: students.allocate_sandbox},
    max_batch=20,
    together=True,
    statement_timeout_sec=2,
    plans=store.LOOK_UPS,
    gives_way=False,
)
MAINTENANCE = Lane(
    topology.ALLOCATOR_MAINTENANCE,
    {
        ExpireLeases: _one_by_one(leases.expire_leases),
        EndLease: _one_by_one(leases.end_lease),
        ClaimDeletions: _one_by_one(deletions.claim_deletions),
        HurryDeletions: _one_by_one(deletions.hurry_deletions),
        EndCleanup: _one_by_one(deletions.end_cleanup),
        RecordDeletion: _one_by_one(deletions.record_deletion),
        RecordDeletionFailure: _one_by_one(deletions.record_deletion_failure),
        RetryDeletion: _one_by_one(deletions.retry_deletion),
        BeginListing: _one_by_one(listings.begin_listing),
        StageListing: _one_by_one(listings.stage_listing),
        ApplyListing: _one_by_one(listings.apply_listing),
        RefreshSandboxes: _one_by_one(listings.refresh_sandboxes),
        DeleteStale: _one_by_one(purge.delete_stale),
        PurgeRecords: _one_by_one(purge.purge_records),
        RecordJob: _one_by_one(jobs.record_job),
        ReplayDeadLetter: _one_by_one(dead_letters.replay_dead_letter),
        DropDeadLetter: _one_by_one(dead_letters.drop_dead_letter),
    },
    max_batch=1,
    together=False,
    statement_timeout_sec=30,
    plans=store.SCANS,
    gives_way=True,
)
