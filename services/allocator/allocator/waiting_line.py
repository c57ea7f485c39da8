"""Waiting line for sandboxes: first come, first served, after replacements of broken ones.

The table `waiting` is the line. The lane for students keeps a copy of it in memory, so an allocation learns without
a query whether others wait for the same sandboxes. Only this lane writes the table, under its epoch. So a copy is
exact if it was loaded under the current epoch.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from sandbox_broker.contract.commands import AllocateSandbox, ReplaceSandbox

MIN_RETRY_SEC = 2
MAX_RETRY_SEC = 15
RETRIES_PER_TTL = 3
"""Repetitions of a student within the time-out of a place, so that one lost request does not lose the place."""
PLACES_PER_RETRY_SEC = 20
SHORT_LINE = 50
"""Places. A line up to this length is looked at with every request."""
LOOK_PERIOD_SEC = 0.1
"""Repeated requests in a longer line share a look for available sandboxes."""

WaitEnd = Literal["left", "timed_out", "refused", "play_ended"]
"""left: the student gave up or stopped repeating the request. timed_out: the longest wait is over. refused: the
student cannot get a sandbox with this request any more, for example because another lease used its key. play_ended:
Instruqt has ended the play of the student."""


@dataclass(frozen=True, slots=True)
class WaitingLimits:
    ttl_sec: float
    """Time without a repetition of the request after which a student loses the place."""
    max_places: int


@dataclass(slots=True)
class Place:
    """Place of one student in the line."""

    waiting_id: int
    """Order of the line."""
    waiting_since: int
    """Unix seconds."""
    prefix: str
    command: AllocateSandbox | ReplaceSandbox
    """Request of the student, carried out when the sandbox is there."""

    @property
    def is_replacement(self) -> bool:
        """True for a student with a broken sandbox."""
        return isinstance(self.command, ReplaceSandbox)


class WaitingLine:
    """Copy of the table `waiting`. Without a current epoch it is unknown and has to be loaded."""

    def __init__(self, limits: WaitingLimits) -> None:
        self.limits = limits
        self.epoch = 0
        """Epoch under which the copy is exact; 0 if unknown."""
        self.loaded_at = 0.0
        """Time of the event loop of the first load under this epoch."""
        self.expected: Sequence[tuple[float, str]] = ()
        """Sandboxes that are being created, with the seconds after `expected_at`: see `waiting_estimate`."""
        self.expected_at = float("-inf")
        """Time of the event loop."""
        self.served = 0
        """Places that ended with a sandbox, since the start."""
        self.places: dict[str, Place] = {}
        """Places by holder, in the order of the line."""
        self.looked_at = float("-inf")
        """Time of the event loop of the last look for available sandboxes."""
        self.asked_since: dict[str, AllocateSandbox] = {}
        """Repeated requests since the last look, by holder. The next look records them. All have a place."""
        self.timed_out: dict[str, float] = {}
        """Holders whose longest wait is over, until their next request, with the time of the event loop at which
        the entry ends. A restart of the allocator loses the entries, and such a student then waits anew."""

    def fill(self, places: Iterable[tuple[str, Place]], *, epoch: int, now: float) -> None:
        """Replace the copy."""
        if epoch != self.epoch:
            self.loaded_at = now
        self.epoch = epoch
        self.places = {}
        self.asked_since = {}
        self.add(places)

    def add(self, places: Iterable[tuple[str, Place]]) -> None:
        """Add the places of the holders to the copy, each in its order of service."""
        self.places |= dict(places)
        self.places = dict(
            sorted(self.places.items(), key=lambda item: (not item[1].is_replacement, item[1].waiting_id))
        )

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Forget the copy if the statement fails, because it may have been committed."""
        try:
            yield
        except BaseException:  # also after a cancellation, because PostgreSQL may have committed by then
            self.epoch = 0
            raise

    def split(self, commands: Sequence[AllocateSandbox]) -> tuple[Sequence[AllocateSandbox], list[AllocateSandbox]]:
        """Split allocations into those that no waiting student competes for, and those for the line."""
        if not self.places and not self.timed_out:
            return commands, []
        prefixes = {place.prefix for place in self.places.values()}
        has_rival: dict[str, bool] = {}
        direct: list[AllocateSandbox] = []
        queued: list[AllocateSandbox] = []
        for command in commands:
            prefix = command.name_prefix or ""
            if prefix not in has_rival:
                has_rival[prefix] = any(are_nested(other, prefix) for other in prefixes)
            is_known = command.holder in self.places or command.holder in self.timed_out
            (queued if has_rival[prefix] or is_known else direct).append(command)
        return direct, queued

    def shares_last_look(self, now: float) -> bool:
        """Return whether repeated requests need no look of their own: the line is long, and the last look was a
        moment ago. The students of a long line repeat their requests all the time, and each look is a transaction.
        """
        return len(self.places) > SHORT_LINE and now - self.looked_at < LOOK_PERIOD_SEC

    def remove(self, holders: Iterable[str]) -> None:
        for holder in holders:
            self.places.pop(holder, None)
            self.asked_since.pop(holder, None)

    def positions(self, holders: Iterable[str]) -> dict[str, int]:
        """Return the position of each holder among the places that a sandbox of the holder could also fit."""
        wanted = set(holders)
        ahead: dict[str, int] = {self.places[holder].prefix: 0 for holder in wanted}
        result: dict[str, int] = {}
        for holder, place in self.places.items():
            for prefix in ahead:
                if are_nested(place.prefix, prefix):
                    ahead[prefix] += 1
            if holder in wanted:
                result[holder] = ahead[place.prefix]
        return result


def are_nested(one: str, other: str) -> bool:
    """Return whether a sandbox name can start with both prefixes."""
    return one.startswith(other) or other.startswith(one)


def assign_sandboxes(prefixes: Sequence[str], available: Mapping[str, Sequence[str]]) -> list[str | None]:
    """Return a sandbox for each prefix, in this order, or None.

    `available` has the ids of available sandboxes for each distinct prefix, longest available first. It needs at
    most as many of them as there are prefixes. A sandbox is in the lists of all prefixes that it fits.
    """
    taken: set[str] = set()
    remaining = {prefix: iter(sandbox_ids) for prefix, sandbox_ids in available.items()}
    assigned: list[str | None] = []
    for prefix in prefixes:
        sandbox_id = next((found for found in remaining.get(prefix, iter(())) if found not in taken), None)
        if sandbox_id is not None:
            taken.add(sandbox_id)
        assigned.append(sandbox_id)
    return assigned


def retry_after_sec(position: int, ttl_sec: float) -> int:
    """Return the seconds until the student should repeat the request.

    The first students of the line ask often, because they are served next. The others ask rarely, so that a long
    line costs little.
    """
    wait_sec = min(MAX_RETRY_SEC, MIN_RETRY_SEC + position // PLACES_PER_RETRY_SEC)
    return max(1, min(wait_sec, int(ttl_sec / RETRIES_PER_TTL)))
