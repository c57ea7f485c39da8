"""Reference model of the broker's contract: status and holder of each sandbox, and the response to each request.

The model has no queue, no database and no concurrency. Background work (expiry of leases, deletions in CSP) is
complete when a method returns. Time is in minutes and only advances in `advance_time`.
"""

import contextlib
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

LEASE_MIN = 4 * 60
GRACE_MIN = 30
STANDBY_MIN = 24 * 60
LONGEST_WAIT_MIN = 30
MAX_EXTENSION_MIN = 4 * 60
MAX_REPLACEMENTS = 1
STALE_RETENTION_MIN = 24 * 60
LISTING_LAG_MIN = 5
"""Time after a deletion during which CSP may still list the account."""
MAX_MISSING_FRACTION = 0.25
TOKEN_TRACKS = ["exam"]
"""Scope of every named token."""


class CspState(Enum):
    WORKS = "works"
    FAILS_DELETIONS = "fails every deletion"
    REJECTS_TOKEN = "rejects the token"


class Refused(Exception):
    def __init__(self, status: int, code: str) -> None:
        super().__init__(status, code)
        self.status = status
        self.code = code


@dataclass(frozen=True)
class Policy:
    """Rules for the leases of a track."""

    max_active: int | None = None
    wait_min: int = LONGEST_WAIT_MIN


@dataclass
class Token:
    """Named token for the tracks in TOKEN_TRACKS."""

    name: str
    max_active: int | None
    state: Literal["active", "suspended", "revoked"] = "active"


@dataclass(frozen=True)
class Credentials:
    token: Token | None = None
    """None: a token of the settings."""
    secret: str | None = None
    """Secret of the lease."""


@dataclass(frozen=True)
class Request:
    """Allocation of a student."""

    student: str
    prefix: str | None = None
    key: str | None = None
    track: str | None = None
    standby: bool = False
    wait_min: int | None = None
    """Longest wait in line. 0 withdraws an earlier request, None neither joins the line nor leaves it."""
    credentials: Credentials = Credentials()


@dataclass
class Place:
    """Place in the waiting line."""

    request: Request
    since: int
    ends: int
    replaces: str | None = None
    """Broken sandbox of the student, who waits for a replacement."""

    def fits(self, name: str) -> bool:
        return name.startswith(self.request.prefix or "")


@dataclass(frozen=True)
class Waiting:
    """Answer to a student in the waiting line."""

    position: int


@dataclass
class Sandbox:
    """Record of a sandbox in the pool."""

    name: str
    status: str
    since: int
    sync: int = 0
    """Number of the sync that made it available. Older ones are leased first to the waiting line."""
    missing: bool = False
    """CSP no longer lists the sandbox of an active lease."""
    on_hold: bool = False
    """The sandbox was replaced and waits for an operator. Only `end_hold` ends the hold."""


@dataclass
class Lease:
    sandbox_id: str
    holder: str
    key: str | None
    begun: int
    expires: int
    prefix: str = ""
    standby: bool = False
    claimed: int | None = None
    first_holder: str | None = None
    extended: int = 0
    replacements: int = 0
    replaced_by: str | None = None
    track: str | None = None
    policy: str | None = None
    token: str | None = None
    """Name of the token that the lease was made with."""
    secret: str | None = None
    end_reason: str | None = None
    """None for an active lease."""


@dataclass
class Model:
    now: int = 0
    csp: CspState = CspState.WORKS
    listed: dict[str, str] = field(default_factory=dict)
    """Names of the sandboxes in CSP's listing, by sandbox id."""
    sandboxes: dict[str, Sandbox] = field(default_factory=dict)
    leases: dict[str, Lease] = field(default_factory=dict)
    """Leases by sandbox id: at most one each, kept after the purge of the sandbox record."""
    policies: dict[str, Policy] = field(default_factory=dict)
    """Policies by track."""
    line: list[Place] = field(default_factory=list)
    """Waiting line: replacements first, each kind in the order of arrival. It is served before each request."""
    timed_out: set[str] = field(default_factory=set)
    """Students whose longest wait is over. Their next request to wait is refused."""
    tokens: list[Token] = field(default_factory=list)
    """All tokens ever issued. A revoked one may have the name of a later one."""
    syncs: int = 0

    # Students

    def allocate(self, request: Request) -> Lease | set[str] | Waiting:
        """Return the student's lease, the ids of all sandboxes that fit, or the place in line. `grant` records the
        broker's choice."""
        student, key = request.student, request.key
        place = self.place_of(student)
        self._check_token(request.credentials)
        if request.credentials.token is not None and request.track not in TOKEN_TRACKS:
            raise Refused(403, "FORBIDDEN_SCOPE")
        replacing = place is not None and place.replaces is not None
        if place is not None and not replacing:
            self._check_place(request.credentials, place)
        held = self.held_by(student)
        keyed = next((lease for lease in self.leases.values() if key is not None and lease.key == key), None)
        if (
            place is not None
            and not replacing
            and (held or keyed or request.wait_min == 0 or request.prefix != place.request.prefix)
        ):
            self.line.remove(place)
            place = None
        if keyed is not None and keyed.holder != student:
            raise Refused(409, "IDEMPOTENCY_KEY_CONFLICT")
        if held is not None:
            self._check_reach(request.credentials, held.token, held.secret)
            return held
        if keyed is not None:  # the lease of this key has ended
            raise Refused(409, "IDEMPOTENCY_KEY_CONFLICT")
        if place is not None and not replacing:
            return self._repeat(place, request)
        if self._is_at_quota(request.track) or self._is_at_token_quota(request.credentials.token):
            raise Refused(409, "QUOTA_EXCEEDED")
        matching = self._find_matching(request.prefix)
        if matching or not (replacing and place is not None and request.wait_min):
            return matching or self._join(request)
        return Waiting(self._find_position(place))

    def _repeat(self, place: Place, request: Request) -> Lease | Waiting:
        """Take over another key, track or mode. It may end the wait, because another policy applies."""
        if request.wait_min is None:
            raise Refused(409, "POOL_EXHAUSTED")
        place.request = request
        self.serve_line()
        return self.held_by(request.student) or Waiting(self._find_position(place))

    def _join(self, request: Request, replaces: str | None = None) -> Waiting:
        policy = self.policies.get(request.track or "", Policy())
        wait_min = min(request.wait_min or 0, policy.wait_min)
        is_over = bool(request.wait_min) and request.student in self.timed_out
        if is_over:
            self.timed_out.remove(request.student)
        if wait_min == 0 or is_over:
            raise Refused(409, "POOL_EXHAUSTED")
        place = Place(request, self.now, self.now + wait_min, replaces)
        self.line.append(place)
        self.line.sort(key=lambda place: place.replaces is None)
        return Waiting(self._find_position(place))

    def place_of(self, student: str) -> Place | None:
        return next((place for place in self.line if place.request.student == student), None)

    def _find_position(self, place: Place) -> int:
        """Count the place and those before it that could receive the same sandbox."""
        prefix = place.request.prefix or ""
        before = self.line[: self.line.index(place) + 1]
        prefixes = [other.request.prefix or "" for other in before]
        return sum(prefix.startswith(other) or other.startswith(prefix) for other in prefixes)

    def serve_line(self) -> list[Lease]:
        """Lease the available sandboxes to the line, longest available first, and return the new leases.

        A student above a quota is passed over. A student loses the place whose key is used, whose token has ended,
        or who has a lease.
        A sandbox that they leave goes to the line once more.
        """
        granted: list[Lease] = []
        passed_over: set[str] = set()
        while True:
            free = sorted(self._with_status("available"), key=lambda id: (self.sandboxes[id].sync, id))
            chosen: list[tuple[Place, str]] = []
            for place in self.line:
                fitting = [id for id in free if place.fits(self.sandboxes[id].name)]
                if fitting and place.request.student not in passed_over:
                    chosen.append((place, fitting[0]))
                    free.remove(fitting[0])
            leases = [self._serve(place, sandbox_id, passed_over) for place, sandbox_id in chosen]
            granted += [lease for lease in leases if lease is not None]
            if None not in leases:
                return granted

    def _serve(self, place: Place, sandbox_id: str, passed_over: set[str]) -> Lease | None:
        request, token = place.request, place.request.credentials.token
        is_token_active = token is None or token.state == "active"
        if place.replaces is not None:
            return self._serve_replacement(place, place.replaces, sandbox_id, is_token_active=is_token_active)
        is_key_used = request.key is not None and any(lease.key == request.key for lease in self.leases.values())
        is_refused = is_key_used or self.held_by(request.student) is not None or not is_token_active
        if not is_refused and (self._is_at_quota(request.track) or self._is_at_token_quota(token)):
            passed_over.add(request.student)
            return None
        self.line.remove(place)
        return None if is_refused else self.grant(request, sandbox_id)

    def _serve_replacement(
        self, place: Place, broken: str, sandbox_id: str, *, is_token_active: bool
    ) -> Lease | None:
        self.line.remove(place)
        lease = self.leases[broken]
        is_allowed = (
            is_token_active
            and lease.holder == place.request.student
            and lease.replacements < MAX_REPLACEMENTS
            and not lease.end_reason
        )
        return self.grant_replacement(broken, sandbox_id) if is_allowed else None

    def _is_at_quota(self, track: str | None) -> bool:
        limit = self.policies.get(track or "", Policy()).max_active
        active = sum(not lease.end_reason and lease.policy == track for lease in self.leases.values())
        return limit is not None and active >= limit

    def _is_at_token_quota(self, token: Token | None) -> bool:
        if token is None or token.max_active is None:
            return False
        active = sum(not lease.end_reason and lease.token == token.name for lease in self.leases.values())
        return active >= token.max_active

    def authorize(self, credentials: Credentials, sandbox_id: str) -> None:
        """Check that a request may use the lease of a sandbox."""
        self._check_token(credentials)
        if (lease := self.leases.get(sandbox_id)) is not None:
            self._check_reach(credentials, lease.token, lease.secret)

    def _check_token(self, credentials: Credentials) -> None:
        if credentials.token is not None and credentials.token.state != "active":
            raise Refused(401, "UNAUTHORIZED")

    def _check_reach(self, credentials: Credentials, token: str | None, secret: str | None) -> None:
        """Check that a request may use a lease, or a place, of this token and secret."""
        if credentials.token is not None and credentials.token.name != token:
            raise Refused(403, "FORBIDDEN_SCOPE")
        if secret not in (None, credentials.secret):
            raise Refused(403, "NOT_SANDBOX_OWNER")

    def _check_place(self, credentials: Credentials, place: Place) -> None:
        """Check that a request may use a place in line."""
        token = place.request.credentials.token
        self._check_reach(credentials, None if token is None else token.name, place.request.credentials.secret)

    def _find_matching(self, prefix: str | None) -> set[str]:
        return {id for id in self._with_status("available") if self.sandboxes[id].name.startswith(prefix or "")}

    def grant(self, request: Request, sandbox_id: str) -> Lease:
        self.line = [place for place in self.line if place.request.student != request.student]
        lease = self._lease(sandbox_id, request.student, request.key, request.prefix or "", standby=request.standby)
        lease.track = request.track
        lease.policy = request.track if request.track in self.policies else None
        token = request.credentials.token
        lease.token = None if token is None else token.name
        lease.secret = request.credentials.secret
        return lease

    def _lease(self, sandbox_id: str, student: str, key: str | None, prefix: str, *, standby: bool) -> Lease:
        self._set_status(sandbox_id, "allocated")
        expires = self.now + (STANDBY_MIN if standby else LEASE_MIN)
        lease = self.leases[sandbox_id] = Lease(
            sandbox_id, student, key, self.now, expires, prefix, standby=standby
        )
        return lease

    def claim(self, student: str, sandbox_id: str, new_holder: str | None) -> Lease:
        lease = self.leases.get(sandbox_id)
        if lease is None or student not in (lease.holder, lease.first_holder):
            lease = self._lease_of(student, sandbox_id)
        self._require_active(lease)
        holder = new_holder or lease.holder
        if not lease.standby:
            if new_holder not in (None, lease.holder):
                raise Refused(409, "ALREADY_CLAIMED")
            return lease
        if holder != lease.holder:
            if self.held_by(holder) is not None:
                raise Refused(409, "NEW_HOLDER_HAS_LEASE")
            lease.first_holder, lease.holder = lease.holder, holder
        lease.standby, lease.claimed, lease.expires = False, self.now, self.now + LEASE_MIN
        return lease

    def extend(self, student: str | None, sandbox_id: str, minutes: int) -> Lease:
        """Extend a lease, by an administrator without `student`."""
        lease = self._changeable_lease(student, sandbox_id)
        if student is not None:
            if lease.standby:
                raise Refused(409, "NOT_CLAIMED")
            if lease.extended + minutes > MAX_EXTENSION_MIN:
                raise Refused(409, "EXTENSION_LIMIT")
            lease.extended += minutes
        lease.expires += minutes
        return lease

    def replace(
        self,
        student: str | None,
        sandbox_id: str,
        wait_min: int | None = None,
        credentials: Credentials = Credentials(),
    ) -> Lease | set[str] | Waiting:
        """Return the lease of an earlier replacement, the ids of all sandboxes that fit, or the place in line.
        `grant_replacement` records the broker's choice."""
        lease = self._lease_to_change(student, sandbox_id)
        if lease.replaced_by is not None:
            new = self.leases[lease.replaced_by]
            if new.end_reason is None and student in (None, new.holder):
                return new
        self._require_active(lease)
        if student is not None and lease.replacements >= MAX_REPLACEMENTS:
            raise Refused(409, "REPLACEMENT_LIMIT")
        return self._find_matching(lease.prefix) or self._wait_for_replacement(lease, wait_min, credentials)

    def _wait_for_replacement(self, lease: Lease, wait_min: int | None, credentials: Credentials) -> Waiting:
        place = self.place_of(lease.holder)
        is_other_wish = place is not None and (place.replaces == lease.sandbox_id) == (wait_min == 0)
        if place is not None and wait_min is not None and is_other_wish:
            self.line.remove(place)
            place = None
        if not wait_min:
            raise Refused(409, "POOL_EXHAUSTED")
        request = Request(
            lease.holder, lease.prefix or None, track=lease.track, wait_min=wait_min, credentials=credentials
        )
        if place is not None:
            # The lease permits the request. The place keeps the token that may reach it.
            with contextlib.suppress(Refused):
                self._check_place(credentials, place)
                place.request = request
            return Waiting(self._find_position(place))
        return self._join(request, lease.sandbox_id)

    def grant_replacement(self, sandbox_id: str, new_sandbox_id: str) -> Lease:
        old = self.leases[sandbox_id]
        self.line = [place for place in self.line if not place.replaces or place.request.student != old.holder]
        new = self._lease(new_sandbox_id, old.holder, None, old.prefix, standby=old.standby)
        new.track, new.policy = old.track, old.policy
        new.token, new.secret = old.token, old.secret
        new.expires = max(old.expires, new.expires)
        new.claimed, new.first_holder, new.extended = old.claimed, old.first_holder, old.extended
        new.replacements = old.replacements + 1
        old.replaced_by = new_sandbox_id
        self.sandboxes[sandbox_id].on_hold = True
        self._finish_lease(old, "broken")
        return new

    def _lease_to_change(self, student: str | None, sandbox_id: str) -> Lease:
        if student is not None:
            return self._lease_of(student, sandbox_id)
        if sandbox_id not in self.sandboxes and sandbox_id not in self.leases:
            raise Refused(404, "SANDBOX_NOT_FOUND")
        if sandbox_id not in self.leases:
            raise Refused(409, "NOT_ALLOCATED")
        return self.leases[sandbox_id]

    def _changeable_lease(self, student: str | None, sandbox_id: str) -> Lease:
        lease = self._lease_to_change(student, sandbox_id)
        self._require_active(lease)
        return lease

    def _require_active(self, lease: Lease) -> None:
        if lease.end_reason is not None:
            raise Refused(409, "LEASE_ENDED")

    def end_play(self, student: str, ended: int) -> str:
        """Return the outcome of Instruqt's event about the end of a play."""
        lease, place = self.held_by(student), self.place_of(student)
        stops_waiting = place is not None and place.since <= ended
        self.line = [other for other in self.line if other is not place or not stops_waiting]
        if lease is None:
            return "stopped_waiting" if stops_waiting else "no_lease"
        if lease.begun > ended:
            return "newer_lease"
        self._finish_lease(lease, "play_ended")
        return "released"

    def release(self, student: str, sandbox_id: str) -> str:
        """Return the status in the response."""
        lease = self._lease_of(student, sandbox_id)
        if lease.end_reason is not None:  # late or repeated releases succeed
            return self.sandboxes[sandbox_id].status if sandbox_id in self.sandboxes else "deleted"
        self._finish_lease(lease, "student")
        return "pending_deletion"

    def read_sandbox(self, student: str, sandbox_id: str) -> tuple[Sandbox, Lease]:
        if sandbox_id not in self.sandboxes:
            raise Refused(404, "SANDBOX_NOT_FOUND")
        return self.sandboxes[sandbox_id], self._lease_of(student, sandbox_id)

    # Administrators

    def issue_token(self, name: str, max_active: int | None) -> None:
        if self._find_token(name) is not None:
            raise Refused(409, "TOKEN_EXISTS")
        self.tokens.append(Token(name, max_active))

    def revoke_token(self, name: str) -> None:
        if (token := self._find_token(name)) is not None:
            token.state = "revoked"
        elif all(token.name != name for token in self.tokens):
            raise Refused(404, "TOKEN_NOT_FOUND")

    def suspend_token(self, name: str, *, suspended: bool) -> None:
        token = self._find_token(name)
        if token is None:
            raise Refused(404, "TOKEN_NOT_FOUND")
        token.state = "suspended" if suspended else "active"

    def _find_token(self, name: str) -> Token | None:
        return next((token for token in self.tokens if token.name == name and token.state != "revoked"), None)

    def end_lease(self, sandbox_id: str) -> str:
        if sandbox_id not in self.sandboxes:
            raise Refused(404, "SANDBOX_NOT_FOUND")
        if sandbox_id not in self.leases:
            raise Refused(409, "NOT_ALLOCATED")
        if self.leases[sandbox_id].end_reason is not None:
            return self.sandboxes[sandbox_id].status
        self._finish_lease(self.leases[sandbox_id], "admin")
        return "pending_deletion"

    def retry_deletion(self, sandbox_id: str, *, end_hold: bool = False) -> str:
        if sandbox_id not in self.sandboxes:
            raise Refused(404, "SANDBOX_NOT_FOUND")
        sandbox = self.sandboxes[sandbox_id]
        if sandbox.status != "deletion_failed" and not (sandbox.on_hold and end_hold):
            raise Refused(409, "NOT_DELETION_FAILED")
        sandbox.on_hold = False
        self._set_status(sandbox_id, "pending_deletion")
        self._clean_up()
        return "pending_deletion"

    def bulk_delete(self, status: str) -> int:
        purged = self._with_status(status)
        for sandbox_id in purged:
            del self.sandboxes[sandbox_id]
        return len(purged)

    def delete_stale(self, for_minutes: int) -> int:
        due = {id for id in self._with_status("stale") if self.now - self.sandboxes[id].since >= for_minutes}
        for sandbox_id in due:
            self._set_status(sandbox_id, "deleted")
        return len(due)

    def sync(self, *, force: bool) -> Counter[str]:
        """Return the counts in the response."""
        self.syncs += 1
        if self.csp is CspState.REJECTS_TOKEN:
            raise Refused(502, "CSP_UNAVAILABLE")
        pool = self._with_status("available") | self._with_status("allocated")
        missing_ids = {id for id in pool - self.listed.keys() if not self.sandboxes[id].missing}
        if not force and (not self.listed or len(missing_ids) > MAX_MISSING_FRACTION * len(pool)):
            raise Refused(409, "SYNC_HELD")
        counts = Counter(synced=len(self.listed))
        for sandbox_id in self._with_status("available") - self.listed.keys():
            self._set_status(sandbox_id, "stale")
            counts["marked_stale"] += 1
        for sandbox_id in self._with_status("allocated") - self.listed.keys():
            self.sandboxes[sandbox_id].missing = True
        for sandbox_id, name in self.listed.items():
            counts += self._apply_record(sandbox_id, name)
        self._clean_up()
        return counts

    def _apply_record(self, sandbox_id: str, name: str) -> Counter[str]:
        sandbox = self.sandboxes.get(sandbox_id)
        if sandbox is None:
            if sandbox_id not in self.leases:  # used sandboxes are never allocated again
                self.sandboxes[sandbox_id] = Sandbox(name, "available", self.now, sync=self.syncs)
            return Counter()
        sandbox.missing = False
        if sandbox.status in ("available", "allocated", "stale"):
            sandbox.name = name
        if sandbox.status == "stale":
            self._set_status(sandbox_id, "available")
            sandbox.sync = self.syncs
            return Counter(restored=1)
        if (
            sandbox.status == "deleted"
            and sandbox_id in self.leases
            and self.now - sandbox.since >= LISTING_LAG_MIN
        ):
            self._set_status(sandbox_id, "pending_deletion")
        return Counter()

    # Time and CSP

    def advance_time(self, minutes: int) -> int:
        """Advance the time. Returns the number of deleted sandboxes, which were stale for a day."""
        self.now += minutes
        self.timed_out |= {place.request.student for place in self.line if place.ends <= self.now}
        self.line = [place for place in self.line if place.ends > self.now]
        for lease in list(self.leases.values()):
            if lease.end_reason is None:
                if lease.standby and self.now >= lease.expires:
                    self._finish_lease(lease, "unclaimed")
                elif not lease.standby and self.now >= lease.expires + GRACE_MIN:
                    self._finish_lease(lease, "expired")
        return self.delete_stale(STALE_RETENTION_MIN)

    def set_csp_state(self, csp: CspState) -> None:
        self.csp = csp
        self._clean_up()

    def _clean_up(self) -> None:
        for sandbox_id in self._with_status("pending_deletion"):
            if self.sandboxes[sandbox_id].on_hold:
                continue
            if self.sandboxes[sandbox_id].missing:  # without a request to CSP
                self._set_status(sandbox_id, "deleted")
            elif self.csp is CspState.WORKS:
                self._set_status(sandbox_id, "deleted")
                self.listed.pop(sandbox_id, None)
            elif self.csp is CspState.FAILS_DELETIONS:
                self._set_status(sandbox_id, "deletion_failed")

    def held_by(self, student: str) -> Lease | None:
        return next(
            (lease for lease in self.leases.values() if lease.holder == student and not lease.end_reason), None
        )

    def _lease_of(self, student: str, sandbox_id: str) -> Lease:
        lease = self.leases.get(sandbox_id)
        if lease is None and sandbox_id not in self.sandboxes:
            raise Refused(404, "SANDBOX_NOT_FOUND")
        if lease is None or lease.holder != student:
            raise Refused(403, "NOT_SANDBOX_OWNER")
        return lease

    def _finish_lease(self, lease: Lease, reason: str) -> None:
        lease.end_reason = reason
        self._set_status(lease.sandbox_id, "pending_deletion")
        self._clean_up()

    def _set_status(self, sandbox_id: str, status: str) -> None:
        self.sandboxes[sandbox_id].status = status
        self.sandboxes[sandbox_id].since = self.now

    def _with_status(self, status: str) -> set[str]:
        return {id for id, sandbox in self.sandboxes.items() if sandbox.status == status}
