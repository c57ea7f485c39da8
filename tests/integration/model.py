"""What the broker promises, small enough to be read beside the contract: which state a sandbox is in, who holds it,
what each request answers. There is no queue here, no database, and no second request at the same time.

Whatever goes on by itself (the expiry of leases, deletions in CSP) has been done when a function returns. Time is
in minutes, and stands still but for `later`.
"""

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum

LAB_AND_GRACE = 4 * 60 + 30
STALE_FOR_GOOD = 24 * 60
PROOF_GRACE = 5
"""So long after a deletion CSP may still list what it has deleted."""
MAX_LACKING = 0.25


class Csp(Enum):
    """How CSP is disposed."""

    WORKS = "works"
    REFUSES = "refuses every deletion"
    LOCKED = "does not know our token"


class Refused(Exception):
    def __init__(self, status: int, code: str) -> None:
        super().__init__(status, code)
        self.status = status
        self.code = code


@dataclass
class Sandbox:
    """Our record of one."""

    name: str
    status: str
    since: int
    missing: bool = False
    """A student holds it, and CSP no longer lists it."""


@dataclass
class Lease:
    sandbox_id: str
    holder: str
    key: str | None
    begun: int
    ended: str | None = None
    """Why."""


@dataclass
class Model:
    now: int = 0
    csp: Csp = Csp.WORKS
    listed: dict[str, str] = field(default_factory=dict)
    """The sandboxes that CSP lists, and their names there."""
    sandboxes: dict[str, Sandbox] = field(default_factory=dict)
    leases: dict[str, Lease] = field(default_factory=dict)
    """By sandbox: it has one for good. They outlive its record."""

    # Students

    def allocate(self, student: str, prefix: str | None, key: str | None) -> Lease | set[str]:
        """The lease the student has, or the sandboxes of which one will do for a new one: see `grant`."""
        keyed = next((lease for lease in self.leases.values() if key is not None and lease.key == key), None)
        if keyed is not None and keyed.holder != student:
            raise Refused(409, "IDEMPOTENCY_KEY_CONFLICT")
        if held := self.held_by(student):
            return held
        if keyed is not None:  # the same key gives the same lease, and that has ended
            raise Refused(409, "IDEMPOTENCY_KEY_CONFLICT")
        fitting = {id for id in self._in_state("available") if self.sandboxes[id].name.startswith(prefix or "")}
        if not fitting:
            raise Refused(409, "POOL_EXHAUSTED")
        return fitting

    def grant(self, student: str, sandbox_id: str, key: str | None) -> Lease:
        self._move(sandbox_id, "allocated")
        lease = self.leases[sandbox_id] = Lease(sandbox_id, student, key, self.now)
        return lease

    def release(self, student: str, sandbox_id: str) -> str:
        """The status that the answer tells of."""
        lease = self._lease_of(student, sandbox_id)
        if lease.ended is not None:  # late, or once more: success
            return self.sandboxes[sandbox_id].status if sandbox_id in self.sandboxes else "deleted"
        self._end(lease, "student")
        return "pending_deletion"

    def look(self, student: str, sandbox_id: str) -> tuple[Sandbox, Lease]:
        if sandbox_id not in self.sandboxes:
            raise Refused(404, "SANDBOX_NOT_FOUND")
        return self.sandboxes[sandbox_id], self._lease_of(student, sandbox_id)

    # Administrators

    def end_lease(self, sandbox_id: str) -> str:
        if sandbox_id not in self.sandboxes:
            raise Refused(404, "SANDBOX_NOT_FOUND")
        if sandbox_id not in self.leases:
            raise Refused(409, "NOT_ALLOCATED")
        if self.leases[sandbox_id].ended is not None:
            return self.sandboxes[sandbox_id].status
        self._end(self.leases[sandbox_id], "admin")
        return "pending_deletion"

    def retry_deletion(self, sandbox_id: str) -> str:
        if sandbox_id not in self.sandboxes:
            raise Refused(404, "SANDBOX_NOT_FOUND")
        if self.sandboxes[sandbox_id].status != "deletion_failed":
            raise Refused(409, "NOT_DELETION_FAILED")
        self._move(sandbox_id, "pending_deletion")
        self._clean_up()
        return "pending_deletion"

    def bulk_delete(self, status: str) -> int:
        forgotten = self._in_state(status)
        for sandbox_id in forgotten:
            del self.sandboxes[sandbox_id]
        return len(forgotten)

    def delete_stale(self, for_minutes: int) -> int:
        over = {id for id in self._in_state("stale") if self.now - self.sandboxes[id].since >= for_minutes}
        for sandbox_id in over:
            self._move(sandbox_id, "deleted")
        return len(over)

    def sync(self, *, force: bool) -> Counter[str]:
        """What the answer counts."""
        if self.csp is Csp.LOCKED:
            raise Refused(502, "CSP_UNAVAILABLE")
        pool = self._in_state("available") | self._in_state("allocated")
        lacking = {id for id in pool - self.listed.keys() if not self.sandboxes[id].missing}
        if not force and (not self.listed or len(lacking) > MAX_LACKING * len(pool)):
            raise Refused(409, "SYNC_HELD")
        done = Counter(synced=len(self.listed))
        for sandbox_id in self._in_state("available") - self.listed.keys():
            self._move(sandbox_id, "stale")
            done["marked_stale"] += 1
        for sandbox_id in self._in_state("allocated") - self.listed.keys():
            self.sandboxes[sandbox_id].missing = True
        for sandbox_id, name in self.listed.items():
            done += self._listed(sandbox_id, name)
        self._clean_up()
        return done

    def _listed(self, sandbox_id: str, name: str) -> Counter[str]:
        known = self.sandboxes.get(sandbox_id)
        if known is None:
            if sandbox_id not in self.leases:  # what was used is never handed out again
                self.sandboxes[sandbox_id] = Sandbox(name, "available", self.now)
            return Counter()
        known.missing = False
        if known.status in ("available", "allocated", "stale"):
            known.name = name
        if known.status == "stale":
            self._move(sandbox_id, "available")
            return Counter(restored=1)
        if known.status == "deleted" and sandbox_id in self.leases and self.now - known.since >= PROOF_GRACE:
            self._move(sandbox_id, "pending_deletion")
        return Counter()

    # What happens by itself

    def later(self, minutes: int) -> int:
        """How many are deleted that have been stale for a day."""
        self.now += minutes
        for lease in list(self.leases.values()):
            if lease.ended is None and self.now - lease.begun >= LAB_AND_GRACE:
                self._end(lease, "expired")
        return self.delete_stale(STALE_FOR_GOOD)

    def csp_becomes(self, csp: Csp) -> None:
        self.csp = csp
        self._clean_up()

    def _clean_up(self) -> None:
        for sandbox_id in self._in_state("pending_deletion"):
            if self.sandboxes[sandbox_id].missing:  # CSP is not asked
                self._move(sandbox_id, "deleted")
            elif self.csp is Csp.WORKS:
                self._move(sandbox_id, "deleted")
                self.listed.pop(sandbox_id, None)
            elif self.csp is Csp.REFUSES:
                self._move(sandbox_id, "deletion_failed")

    def held_by(self, student: str) -> Lease | None:
        return next((lease for lease in self.leases.values() if lease.holder == student and not lease.ended), None)

    def _lease_of(self, student: str, sandbox_id: str) -> Lease:
        lease = self.leases.get(sandbox_id)
        if lease is None and sandbox_id not in self.sandboxes:
            raise Refused(404, "SANDBOX_NOT_FOUND")
        if lease is None or lease.holder != student:
            raise Refused(403, "NOT_SANDBOX_OWNER")
        return lease

    def _end(self, lease: Lease, why: str) -> None:
        lease.ended = why
        self._move(lease.sandbox_id, "pending_deletion")
        self._clean_up()

    def _move(self, sandbox_id: str, status: str) -> None:
        self.sandboxes[sandbox_id].status = status
        self.sandboxes[sandbox_id].since = self.now

    def _in_state(self, status: str) -> set[str]:
        return {id for id, sandbox in self.sandboxes.items() if sandbox.status == status}
