"""Rules of the pool without a database: batching of commands, and the check of a listing."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import orjson

from allocator.waiting_line import are_nested
from sandbox_broker.contract.codec import InvalidCommand
from sandbox_broker.contract.commands import AllocateSandbox, Command

T = TypeVar("T")

DedupKey = tuple[str, str | None, str | None, int | None, str, str | None, str | None, str | None, str | None]

MAX_GROUP = 500
"""Allocations per statement. Larger statements gain little and hold many locks."""

MIN_GROWTH = 20
"""New accounts that a listing may have in any case, because a small pool grows by large fractions."""


class RedeliveredAllocation(AllocateSandbox):
    """Allocation from a redelivered message. It may have been completed, and its lease may have ended
    since. Running it again would then lease a second sandbox to an absent student."""


def mark_redelivered(entries: Sequence[Command | InvalidCommand]) -> list[Command | InvalidCommand]:
    """Return the entries with every allocation as RedeliveredAllocation."""
    return [
        RedeliveredAllocation(**entry.model_dump()) if isinstance(entry, AllocateSandbox) else entry
        for entry in entries
    ]


@dataclass(slots=True)
class _Group:
    """Allocations for one statement: no two of them compete for the same row."""

    commands: list[AllocateSandbox] = field(default_factory=list)
    _holders: set[str] = field(default_factory=set)
    _keys: set[str] = field(default_factory=set)
    _prefixes: set[str] = field(default_factory=set)

    def try_add(self, command: AllocateSandbox) -> bool:
        """Add the command if it conflicts with none of the group; return whether it was added.

        A repeated holder or key would violate a unique index. Two different prefixes, one of which begins with the
        other, could pick the same sandbox, because SKIP LOCKED does not skip locks of its own transaction.
        """
        prefix = command.name_prefix or ""
        if len(self.commands) == MAX_GROUP:
            return False
        if command.holder in self._holders or command.idempotency_key in self._keys:
            return False
        if any(other != prefix and are_nested(other, prefix) for other in self._prefixes):
            return False
        self.commands.append(command)
        self._holders.add(command.holder)
        self._prefixes.add(prefix)
        if command.idempotency_key is not None:
            self._keys.add(command.idempotency_key)
        return True


def conflict_free_groups(commands: Sequence[AllocateSandbox]) -> list[list[AllocateSandbox]]:
    """Split commands by first fit into groups for one statement each; one group in most cases.

    Longer prefixes come first: general requests must not take the sandboxes of specific ones.
    """
    groups: list[_Group] = []
    for command in sorted(commands, key=lambda command: -len(command.name_prefix or "")):
        if not any(group.try_add(command) for group in groups):
            groups.append(_Group())
            groups[-1].try_add(command)
    return [group.commands for group in groups]


def split_on_repeated(
    commands: Sequence[AllocateSandbox], key: Callable[[AllocateSandbox], str | None]
) -> list[list[AllocateSandbox]]:
    """Split commands wherever a key other than None repeats in a part, or the part has MAX_GROUP commands; one part
    in most cases."""
    parts: list[list[AllocateSandbox]] = [[]]
    seen: set[str] = set()
    for command in commands:
        value = key(command)
        if value in seen or len(parts[-1]) == MAX_GROUP:
            parts.append([])
            seen = set()
        if value is not None:
            seen.add(value)
        parts[-1].append(command)
    return parts


def split_on_conflict(entries: Sequence[T]) -> list[list[T]]:
    """Split a batch wherever a holder with one type of command sends another type; one part in most cases.

    A redelivered allocation must not run after the release behind it, or it would lease a second sandbox.
    """
    parts: list[list[T]] = [[]]
    type_of_holder: dict[str, type] = {}
    for entry in entries:
        holder: str | None = getattr(entry, "holder", None)
        if holder is not None and type_of_holder.setdefault(holder, type(entry)) is not type(entry):
            parts.append([])
            type_of_holder = {holder: type(entry)}
        parts[-1].append(entry)
    return parts


def dedup_key(command: AllocateSandbox) -> DedupKey:
    """Return the key of equal requests. They get the same reply."""
    return (
        command.holder,
        command.name_prefix,
        command.idempotency_key,
        command.wait_sec,
        command.mode,
        command.access,
        command.secret_hash,
        *((command.sender.key_id, command.track_name) if command.sender is not None else (None, None)),
    )


def raw_commands(body: bytes) -> Iterator[dict[str, Any]]:
    """Yield the commands of an envelope as JSON objects, or `body` itself as an event; skip all else."""
    try:
        message = orjson.loads(body)
    except ValueError:
        return
    commands = message.get("commands", [message]) if isinstance(message, dict) else []
    yield from (entry for entry in (commands if isinstance(commands, list) else []) if isinstance(entry, dict))


def find_loss_problem(listed: int, lost: int, pool: int, max_stale_fraction: float) -> str | None:
    """Return None if the listing may be applied, else the reason to hold it. This guards the pool against a faulty
    listing. The reason is stored, announced, and sent with the refusal.

    `lost` is the number of sandboxes in the pool that are missing in the listing or have another account there.
    """
    if listed == 0:
        return "CSP listed no sandbox at all"
    if lost > max_stale_fraction * pool:
        return (
            f"{lost} of {pool} sandboxes are missing from CSP's listing or have another account there, "
            f"more than the {max_stale_fraction:.0%} allowed"
        )
    return None


def find_growth_problem(discovered: int, usual: int, max_growth_fraction: float | None) -> str | None:
    """Return None if the listing may be applied, else the reason to hold it. This keeps the accounts of others out
    of the pool, for example after a change of the token.

    `usual` is the size of the largest listing or of the pool. An unused pool may be filled at once.
    """
    if max_growth_fraction is None or usual == 0 or discovered <= max(MIN_GROWTH, max_growth_fraction * usual):
        return None
    return (
        f"{discovered} accounts of CSP's listing are new, "
        f"more than the {max_growth_fraction:.0%} of {usual} that are allowed"
    )
