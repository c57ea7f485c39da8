"""What the pool's rules say, without a database: which requests may share a statement, and what to answer."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from sandbox_broker.contract.codec import InvalidCommand
from sandbox_broker.contract.commands import AllocateSandbox, Command
from sandbox_broker.contract.replies import Refused

T = TypeVar("T")


MAX_ROUND = 500
"""Requests that one statement takes; above it the gain is small and the locks are many."""


class AllocateAgain(AllocateSandbox):
    """One that RabbitMQ has delivered before. It may have been done then, and its lease may have ended since; to do
    it now would take a second sandbox, for a student who has left."""


def delivered_again(entries: Sequence[Command | InvalidCommand]) -> list[Command | InvalidCommand]:
    return [
        AllocateAgain(**entry.model_dump()) if isinstance(entry, AllocateSandbox) else entry for entry in entries
    ]


@dataclass(slots=True)
class Round:
    """Requests that one statement can answer: nobody in it competes with anybody for the same thing."""

    commands: list[AllocateSandbox] = field(default_factory=list)
    _holders: set[str] = field(default_factory=set)
    _keys: set[str] = field(default_factory=set)
    _prefixes: set[str] = field(default_factory=set)

    def takes(self, command: AllocateSandbox) -> bool:
        """A holder or key twice would break a unique index. Of two prefixes where one begins with the other,
        both could pick the same sandbox: SKIP LOCKED does not skip what its own transaction has locked."""
        prefix = command.name_prefix or ""
        if len(self.commands) == MAX_ROUND:
            return False
        if command.holder in self._holders or command.idempotency_key in self._keys:
            return False
        if any(other != prefix and _nested(other, prefix) for other in self._prefixes):
            return False
        self.commands.append(command)
        self._holders.add(command.holder)
        self._prefixes.add(prefix)
        if command.idempotency_key is not None:
            self._keys.add(command.idempotency_key)
        return True


def _nested(one: str, other: str) -> bool:
    return one.startswith(other) or other.startswith(one)


def rounds(commands: Sequence[AllocateSandbox]) -> list[list[AllocateSandbox]]:
    """Splits a batch into the fewest statements that first fit finds; mostly it is one. The most specific
    prefixes go first, so that they are not robbed by the general ones."""
    found: list[Round] = []
    for command in sorted(commands, key=lambda command: -len(command.name_prefix or "")):
        if not any(round_.takes(command) for round_ in found):
            found.append(Round())
            found[-1].takes(command)
    return [round_.commands for round_ in found]


def segments(entries: Sequence[T]) -> list[list[T]]:
    """Cuts a batch where a student who has asked for one thing in it asks for another. Mostly that is nowhere.
    An allocation that is delivered again, its reply long read, must not be done after the release behind it: it
    would take a second sandbox."""
    found: list[list[T]] = [[]]
    asked: dict[str, type] = {}
    for entry in entries:
        holder: str | None = getattr(entry, "holder", None)
        if holder is not None and asked.setdefault(holder, type(entry)) is not type(entry):
            found.append([])
            asked = {holder: type(entry)}
        found[-1].append(entry)
    return found


def same_request(command: AllocateSandbox) -> tuple[str, str | None, str | None]:
    """Requests that are alike in this get one and the same answer."""
    return command.holder, command.name_prefix, command.idempotency_key


def exhausted(command: AllocateSandbox) -> Refused:
    where = f" with the name prefix '{command.name_prefix}'" if command.name_prefix else ""
    return Refused(
        code="POOL_EXHAUSTED",
        message=f"No available sandboxes in pool{where}. Try again later, or ask the operator for more.",
    )


def key_conflict(*, own: bool) -> Refused:
    whose = "a lease of yours that has ended" if own else "another student's lease"
    return Refused(
        code="IDEMPOTENCY_KEY_CONFLICT",
        message=f"This Idempotency-Key belongs to {whose}. Send a new key, or none.",
    )


def not_found(sandbox_id: str) -> Refused:
    return Refused(
        code="SANDBOX_NOT_FOUND",
        message=f"There is no sandbox '{sandbox_id}'. Use the sandbox_id that the allocation returned.",
    )


def not_owner(sandbox_id: str) -> Refused:
    return Refused(
        code="NOT_SANDBOX_OWNER",
        message=f"Sandbox '{sandbox_id}' is not leased to this student. "
        "Send the X-Instruqt-Sandbox-ID that it was allocated with.",
    )


def not_allocated(sandbox_id: str, status: str) -> Refused:
    return Refused(
        code="NOT_ALLOCATED", message=f"Nobody ever held sandbox '{sandbox_id}' (it is {status}): nothing to end."
    )


def not_deletion_failed(sandbox_id: str, status: str) -> Refused:
    return Refused(
        code="NOT_DELETION_FAILED",
        message=f"Sandbox '{sandbox_id}' is {status}: only a deletion_failed one can be sent back.",
    )


def no_such_dead_letter(dead_letter_id: uuid.UUID) -> Refused:
    return Refused(
        code="DEAD_LETTER_NOT_FOUND",
        message=f"There is no dead letter {dead_letter_id}: it was replayed or dropped, or never was one.",
    )


def not_replayable(queue: str) -> Refused:
    return Refused(
        code="NOT_REPLAYABLE", message=f"It says that it died in '{queue}', which is no queue of commands. Drop it."
    )


def sent_by_service_only() -> Refused:
    return Refused(
        code="NOT_REPLAYABLE",
        message="Only the reaper or the csp-syncer may send the commands in it. These services repeat what is "
        "still to be done. Drop the dead letter.",
    )


def not_replayed(reason: str) -> Refused:
    return Refused(
        code="ALLOCATOR_UNAVAILABLE",
        message=f"RabbitMQ did not take it, and it is kept: {reason}. Try again shortly.",
    )


DONE_BEFORE = Refused(
    code="ALLOCATOR_UNAVAILABLE",
    message="This request may have been carried out before, and its lease has ended since. Ask again for another.",
)
LISTING_OUTDATED = Refused(
    code="LISTING_OUTDATED",
    message="A newer listing has come meanwhile, or a piece of this one is missing. Fetch it again.",
)


def held(listed: int, lost: int, pool: int, max_stale_fraction: float) -> Refused | None:
    """The guard against a listing that would wipe the pool: None if it may be applied. `lost` are sandboxes of the
    pool that it lacks, or that have another account in it."""
    if listed == 0:
        found = "CSP listed no sandbox at all"
    elif lost > max_stale_fraction * pool:
        found = (
            f"{lost} of {pool} sandboxes are missing from CSP's listing or have another account there, "
            f"more than the {max_stale_fraction:.0%} allowed"
        )
    else:
        return None
    return Refused(
        code="SYNC_HELD",
        message=f"{found}; nothing was changed. GET /v1/admin/sync shows what would change. If CSP is right, "
        "repeat the sync with force=true.",
    )
