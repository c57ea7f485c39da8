"""Checker of the evidence of a round. It reports every contradiction to a guarantee of the broker.

The checker sends no request. Each rule in RULES is a function that yields one sentence, with ids and times, per
violation. In doubt a rule assumes correct behaviour, so every reported violation is certain.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise, permutations
from typing import TypeVar

from tests.chaos.evidence import Event, Evidence, Lease, Operation

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

SAME_MOMENT_SEC = 0.05
"""Times closer than this have no certain order, because PostgreSQL's now() is the start of the transaction, and
its snapshot is slightly later.
"""
LATEST_EFFECT_SEC = 60.0
"""Longest time from a client's time-out to the effect of its request. RabbitMQ drops the message within seconds,
but an allocator that has received it may be slow. A student who waits and leaves silently keeps the place for
WAITING_TTL_SEC.
"""
OVERDUE_SEC = 60.0
"""Longest time from the expiry of a lease, including the grace period, to its end."""
LOCK_SEC = 1.0
"""Longest wait of a statement for a locked row. An event carries the start of its statement, so the event of a
change may seem to come after the end of the lease that waited for it.
"""
FLIGHT_SEC = 150.0
"""Longest time from the grant of a creation intent to the import of its account, with kills and errors."""
TOKEN_END_SEC = 5.0
"""Longest time from the end of a token to its last lease."""
FAILOVER_SEC = 3.0
"""Longest wait for a reply when an allocator dies and a standby is ready. A client with a shorter time-out, such as
a probe, does not count as unanswered.
"""

UNKNOWN, AVAILABLE, ALLOCATED, STALE = "unknown", "available", "allocated", "stale"
PENDING, FAILED, DELETED = "pending_deletion", "deletion_failed", "deleted"
STATUSES = (AVAILABLE, ALLOCATED, STALE, PENDING, FAILED, DELETED)
TRANSITIONS = {
    (UNKNOWN, "sandbox.discovered"): AVAILABLE,
    (AVAILABLE, "sandbox.allocated"): ALLOCATED,
    (AVAILABLE, "sandbox.stale"): STALE,
    (STALE, "sandbox.restored"): AVAILABLE,
    (STALE, "sandbox.deleted"): DELETED,
    (ALLOCATED, "lease.claimed"): ALLOCATED,
    (ALLOCATED, "lease.extended"): ALLOCATED,
    (ALLOCATED, "sandbox.deletion_requested"): PENDING,
    (PENDING, "sandbox.replaced"): PENDING,
    (PENDING, "sandbox.deleted"): DELETED,
    (PENDING, "sandbox.deletion_failed"): FAILED,
    (FAILED, "sandbox.deletion_requested"): PENDING,
}
"""Next status by current status and event."""
REOPENED = (DELETED, "sandbox.deletion_requested")
"""Allowed only if the event says that CSP still lists the account."""
STATUS_AFTER_EVENT = {event: after for (_, event), after in TRANSITIONS.items()}


def check(evidence: Evidence) -> list[str]:
    """Return the violations of all rules. Each sentence begins with the name of its rule."""
    return [f"{rule.__name__.replace('_', ' ')}: {violation}" for rule in RULES for violation in rule(evidence)]


def one_lease_per_sandbox(evidence: Evidence) -> Iterator[str]:
    """Require at most one lease per sandbox for ever, because used sandboxes are never leased again."""
    for sandbox_id, leases in _group_by(evidence.leases, lambda lease: lease.sandbox_id).items():
        if len(leases) > 1:
            yield f"sandbox {sandbox_id} was leased {len(leases)} times: {_format_leases(leases)}"
    for granted_id, answers in _group_by(_select_granted(evidence), lambda answer: answer.sandbox_id).items():
        students = sorted({answer.student for answer in answers})
        if len(students) > 1:
            operations = " ".join(map(_format_operation, answers))
            yield f"sandbox {granted_id} was given to {' and '.join(students)}: {operations}"


def one_active_lease_per_student(evidence: Evidence) -> Iterator[str]:
    for student, leases in _group_by(evidence.leases, lambda lease: lease.holder).items():
        leases.sort(key=lambda lease: lease.allocated_at)
        longest = leases[0]
        for lease in leases[1:]:
            if lease.allocated_at < _get_end(longest) - SAME_MOMENT_SEC:
                yield f"student {student} held two sandboxes at once: {_format_leases([longest, lease])}"
            longest = max(longest, lease, key=_get_end)


def one_lease_per_idempotency_key(evidence: Evidence) -> Iterator[str]:
    for key, leases in _group_by(evidence.leases, lambda lease: lease.idempotency_key).items():
        if key is not None and len(leases) > 1:
            yield f"the idempotency key {key} has {len(leases)} leases: {_format_leases(leases)}"


def no_policy_exceeds_its_quota(evidence: Evidence) -> Iterator[str]:
    """Require at most `max_active` active leases of a policy whenever one of its leases begins."""
    for policy, leases in _group_by(evidence.leases, lambda lease: lease.policy).items():
        limit = evidence.quotas.get(policy or "")
        if limit is not None:
            yield from _find_over_quota(f"the policy {policy}", leases, limit)


def no_token_exceeds_its_quota(evidence: Evidence) -> Iterator[str]:
    """Require at most `max_active` active leases of a token whenever one of its leases begins."""
    limits = {token.name: token.max_active for token in evidence.tokens}
    for token, leases in _group_by(evidence.leases, lambda lease: lease.token).items():
        if token is not None:
            yield from _find_over_quota(f"the token {token}", leases, limits[token])


def _find_over_quota(owner: str, leases: Sequence[Lease], limit: int) -> Iterator[str]:
    for new in leases:
        active = [
            lease
            for lease in leases
            if lease.allocated_at <= new.allocated_at and _get_end(lease) > new.allocated_at + SAME_MOMENT_SEC
        ]
        if len(active) > limit:
            yield f"{owner} allows {limit} leases, but had {len(active)}: {_format_leases(active)}"


def tokens_stay_in_their_scope(evidence: Evidence) -> Iterator[str]:
    """Require that a token leases only for its labs and name prefixes, and reaches only its own leases."""
    tokens = {token.name: token for token in evidence.tokens}
    for lease in evidence.leases:
        if lease.token is None:
            continue
        token = tokens[lease.token]
        has_prefix = not token.prefixes or (lease.name_prefix or "").startswith(tuple(token.prefixes))
        if lease.track_name not in token.tracks or not has_prefix:
            lab = f"{lease.track_name} with the prefix {lease.name_prefix}"
            yield f"the token {lease.token} leased for {lab}: {_format_leases([lease])}"
    leases = {lease.sandbox_id: lease for lease in evidence.leases}
    for operation in evidence.operations:
        used = tokens.get(operation.token or "") if operation.outcome in ("ok", "waiting") else None
        if used is not None and operation.kind == "allocate" and operation.track_name not in used.tracks:
            yield f"{_format_operation(operation)} with the token {used.name} succeeded for {operation.track_name}"
        reached = leases.get(operation.sandbox_id or "") if operation.outcome == "ok" else None
        if reached is not None and not _is_reached_by_token(reached, operation):
            leased = f"a lease of {reached.token}: {_format_leases([reached])}"
            yield f"{_format_operation(operation)} with the token {operation.token} succeeded for {leased}"


def ended_tokens_have_no_effect(evidence: Evidence) -> Iterator[str]:
    """Forbid leases of a revoked or suspended token, later than TOKEN_END_SEC after its end, and confirmed requests
    and places in line too."""
    changes = _group_by(
        {event.event_id: event for event in evidence.events if event.type == "token.changed"}.values(),
        lambda event: event.data["name"],
    )

    def find_end(token: str | None, before: float) -> Event | None:
        """Return the event of the end, if the token has ended and was not resumed."""
        known = [event for event in changes.get(token, []) if event.occurred_at < before]
        last = max(known, key=lambda event: event.occurred_at, default=None)
        return last if last is not None and last.data["change"] in ("revoked", "suspended") else None

    for lease in evidence.leases:
        end = find_end(lease.token, lease.allocated_at)
        if end is not None and lease.allocated_at > end.occurred_at + TOKEN_END_SEC:
            ended = f"{end.data['change']} at {_format_time(end.occurred_at)}"
            yield f"the token {lease.token} was {ended}, but leased later: {_format_leases([lease])}"
    for operation in evidence.operations:
        end = find_end(operation.token, operation.ended_at)
        is_confirmed = operation.outcome in ("ok", "waiting")
        if end is not None and is_confirmed and operation.invoked_at > end.occurred_at + TOKEN_END_SEC:
            ended = f"{end.data['change']} at {_format_time(end.occurred_at)}"
            yield f"the token {operation.token} was {ended}, but {_format_operation(operation)} was confirmed"


def places_need_their_secret(evidence: Evidence) -> Iterator[str]:
    """Require that no request keeps or takes over a place in line that was confirmed to another secret."""
    places = _group_by(_list_places(evidence), lambda place: place.holder)
    allocations = _group_by(_select_kind(evidence, "allocate"), lambda operation: operation.student)
    for student, operations in allocations.items():
        confirmed = [operation for operation in operations if operation.outcome == "waiting"]
        for own, other in permutations(confirmed, 2):
            if own.secret in (None, other.secret) or own.ended_at > other.invoked_at:
                continue
            since = [place.since for place in places.get(student, []) if place.until > own.invoked_at]
            until = [place.until for place in places.get(student, []) if place.until > own.invoked_at]
            # Only one place existed during both requests, so both are about this one.
            if len(since) == 1 and since[0] < own.ended_at and until[0] > other.ended_at + SAME_MOMENT_SEC:
                yield f"{_format_operation(other)} kept the place of {_format_operation(own)} without its secret"


@dataclass(frozen=True, slots=True)
class _Place:
    """Place in the waiting line."""

    number: object
    holder: object
    prefix: str
    since: float
    until: float
    """Infinite for a student that still waits."""


def _list_places(evidence: Evidence) -> Iterator[_Place]:
    first = {event.event_id: event for event in reversed(evidence.events)}
    by_type = _group_by(first.values(), lambda event: event.type)
    ended_at = {
        event.data["place"]: event.occurred_at
        for event in (*by_type.get("waiting.served", []), *by_type.get("waiting.ended", []))
    }
    for event in by_type.get("waiting.started", []):
        number = event.data["place"]
        prefix = str(event.data["name_prefix"] or "")
        until = ended_at.get(number, float("inf"))
        yield _Place(number, event.data["holder"], prefix, event.occurred_at, until)


def leases_need_their_secret(evidence: Evidence) -> Iterator[str]:
    """Require that no request succeeds for a lease with a secret, unless it has this secret."""
    leases = {lease.sandbox_id: lease for lease in evidence.leases}
    for operation in evidence.operations:
        lease = leases.get(operation.sandbox_id or "") if operation.outcome == "ok" else None
        if lease is not None and operation.kind != "end_play" and not _has_secret(lease, operation):
            yield f"{_format_operation(operation)} succeeded without the secret of {_format_leases([lease])}"


def _is_reached_by_token(lease: Lease, operation: Operation) -> bool:
    """Return whether the token of the request reaches the lease. All named tokens have a scope."""
    return operation.token in (None, lease.token)


def _has_secret(lease: Lease, operation: Operation) -> bool:
    given = hashlib.sha256((operation.secret or "").encode()).hexdigest()
    return lease.secret_hash in (None, given)


def _may_change(lease: Lease, operation: Operation) -> bool:
    return _is_reached_by_token(lease, operation) and _has_secret(lease, operation)


def every_answer_is_a_lease(evidence: Evidence) -> Iterator[str]:
    """Require a lease for every granted allocation, and at most one response with 201 per lease."""
    leases, ends = _index_leases(evidence), _index_announced_ends(evidence)
    new: dict[int, Operation] = {}
    for answer in _select_granted(evidence):
        lease = leases.get((answer.sandbox_id, answer.student))
        if lease is None:
            yield f"{_format_operation(answer)} got sandbox {answer.sandbox_id}, but this lease does not exist"
            continue
        answered_ends = {int(lease.expires_at), *ends.get(lease.sandbox_id, ())}
        if answer.allocated_at != int(lease.allocated_at) or answer.expires_at not in answered_ends:
            yield (
                f"{_format_operation(answer)} got a lease from {answer.allocated_at} to {answer.expires_at}, but "
                f"it is {_format_leases([lease])}, from {lease.allocated_at:.3f} to {lease.expires_at:.3f}"
            )
        if answer.status == 201:
            if lease.allocated_at < answer.invoked_at - SAME_MOMENT_SEC:
                yield f"{_format_operation(answer)} got 201 for an older lease: {_format_leases([lease])}"
            if lease.lease_id in new:
                operations = f"{_format_operation(new[lease.lease_id])} and {_format_operation(answer)}"
                yield f"{operations} both got 201 for {_format_leases([lease])}"
            new[lease.lease_id] = answer


def the_same_sandbox_while_the_lease_lasts(evidence: Evidence) -> Iterator[str]:
    """Require that a granted sandbox was leased to its student at some moment between request and response.

    A student never holds two sandboxes, so during an active lease every response must contain its sandbox.
    """
    leases = _index_leases(evidence)
    for answer in _select_granted(evidence):
        lease = leases.get((answer.sandbox_id, answer.student))
        if lease is None:
            continue
        starts_too_late = lease.allocated_at > answer.ended_at + SAME_MOMENT_SEC
        if starts_too_late or _get_end(lease) < answer.invoked_at - SAME_MOMENT_SEC:
            yield f"{_format_operation(answer)} got a sandbox not leased at that time: {_format_leases([lease])}"


def releases_are_kept(evidence: Evidence) -> Iterator[str]:
    leases = _index_leases(evidence)
    for release in _select_kind(evidence, "release"):
        lease = leases.get((release.sandbox_id, release.student))
        if release.outcome == "ok" and lease is None:
            yield f"{_format_operation(release)} was confirmed, but this lease does not exist"
        elif release.outcome == "ok" and lease and _get_end(lease) > release.ended_at + SAME_MOMENT_SEC:
            yield f"{_format_operation(release)} was confirmed, but the lease continues: {_format_leases([lease])}"
        elif (
            release.status in (403, 404)
            and lease
            and _may_change(lease, release)
            and lease.allocated_at <= release.invoked_at
        ):
            refusal = f"{_format_operation(release)} was refused ({release.code}) to its holder"
            yield f"{refusal}: {_format_leases([lease])}"


def reads_show_answered_leases(evidence: Evidence) -> Iterator[str]:
    """Require that a student who reads a sandbox after its allocation was answered is its holder, for ever.

    A gateway that reads from a former primary of PostgreSQL answers 403 or 404.
    """
    leases = _index_leases(evidence)
    granted_at: dict[tuple[str | None, str], float] = {}
    for answer in _select_granted(evidence):
        key = (answer.sandbox_id, answer.student)
        granted_at[key] = min(answer.ended_at, granted_at.get(key, answer.ended_at))
    for read in _select_kind(evidence, "read"):
        since = granted_at.get((read.sandbox_id, read.student))
        lease = leases.get((read.sandbox_id, read.student))
        if lease is not None and not _may_change(lease, read):
            continue
        if read.status in (403, 404) and since is not None and since < read.invoked_at:
            yield f"{_format_operation(read)} got {read.code}, but the lease was answered at {_format_time(since)}"


def every_unknown_resolves_to_once_or_never(evidence: Evidence) -> Iterator[str]:
    """Require a request for every lease: a granted allocation with this sandbox, or one with an unknown outcome, or
    one that waits in line.

    Each request without a lease in its response explains at most one lease.
    """
    answers = _group_by(_select_granted(evidence), lambda answer: (answer.sandbox_id, answer.student))
    unknown = _group_by(
        (
            operation
            for operation in evidence.operations
            if operation.kind in ("allocate", "replace") and operation.outcome in ("unknown", "waiting")
        ),
        lambda operation: operation.student,
    )
    for lease in sorted(evidence.leases, key=lambda lease: lease.allocated_at):
        if any(_can_have_caused(answer, lease) for answer in answers.get((lease.sandbox_id, lease.holder), [])):
            continue
        candidates = [request for request in unknown.get(lease.holder, []) if _can_have_caused(request, lease)]
        if candidates:
            # Use the oldest request, because only younger ones can explain later leases.
            unknown[lease.holder].remove(min(candidates, key=lambda request: request.ended_at))
        else:
            yield f"no request explains {_format_leases([lease])}"
    yield from _find_unexplained_ends(evidence)


def _can_have_caused(request: Operation, lease: Lease) -> bool:
    in_time = request.invoked_at - SAME_MOMENT_SEC <= lease.allocated_at <= request.ended_at + LATEST_EFFECT_SEC
    return in_time and request.idempotency_key == lease.idempotency_key


def _find_unexplained_ends(evidence: Evidence) -> Iterator[str]:
    releases = _group_by(
        (operation for operation in _select_kind(evidence, "release") if operation.outcome != "refused"),
        lambda operation: (operation.sandbox_id, operation.student),
    )
    replacements = _group_by(
        (operation for operation in _select_kind(evidence, "replace") if operation.outcome != "refused"),
        lambda operation: (operation.sandbox_id, operation.student),
    )
    ended_plays = _group_by(
        (operation for operation in _select_kind(evidence, "end_play") if operation.outcome != "refused"),
        lambda operation: operation.student,
    )
    for lease in evidence.leases:
        lease_releases = releases.get((lease.sandbox_id, lease.holder), [])
        earliest_expiry = lease.expires_at + (evidence.grace_sec if lease.mode == "active" else 0)
        if lease.ended_at is None:
            if evidence.collected_at > earliest_expiry + OVERDUE_SEC:
                yield f"overdue at {_format_time(evidence.collected_at)}: {_format_leases([lease])}"
        elif lease.end_reason == "student":
            if not any(release.invoked_at - SAME_MOMENT_SEC <= lease.ended_at for release in lease_releases):
                yield f"no release request of the student explains the end of {_format_leases([lease])}"
        elif lease.end_reason == "broken":
            requests = replacements.get((lease.sandbox_id, lease.holder), [])
            if not any(request.invoked_at - SAME_MOMENT_SEC <= lease.ended_at for request in requests):
                yield f"no replacement request explains the end of {_format_leases([lease])}"
        elif lease.end_reason == "play_ended":
            if not any(
                event.invoked_at - SAME_MOMENT_SEC <= lease.ended_at and _is_of_play(lease, event)
                for event in ended_plays.get(lease.holder, [])
            ):
                yield f"no end of a play explains the end of {_format_leases([lease])}"
        elif lease.end_reason == ("unclaimed" if lease.mode == "standby" else "expired"):
            if lease.ended_at < earliest_expiry - SAME_MOMENT_SEC:
                yield f"expired before {_format_time(earliest_expiry)}: {_format_leases([lease])}"
        else:
            yield f"unknown reason for the end of {_format_leases([lease])}"


def ended_plays_leave_nothing(evidence: Evidence) -> Iterator[str]:
    """Require that a confirmed end of a play ended each lease and each wait of its student that began before."""
    leases = _group_by(evidence.leases, lambda lease: lease.holder)
    places = [*_list_places(evidence)]
    for play in _select_kind(evidence, "end_play"):
        if play.outcome != "ok" or play.play_ended_at is None:
            continue
        for lease in leases.get(play.student, []):
            if _is_of_play(lease, play) and _get_end(lease) > play.ended_at + SAME_MOMENT_SEC:
                yield f"{_format_operation(play)} was confirmed, but the lease continues: {_format_leases([lease])}"
        for place in places:
            is_of_play = place.holder == play.student and int(place.since) <= play.play_ended_at
            if is_of_play and place.until > play.ended_at + SAME_MOMENT_SEC:
                since = _format_time(place.since)
                yield f"{_format_operation(play)} was confirmed, but the student has waited since {since}"


def _is_of_play(lease: Lease, play: Operation) -> bool:
    """Return whether the lease began before the end of the play, which is known to the second."""
    return play.play_ended_at is not None and int(lease.allocated_at) <= play.play_ended_at


def lease_changes_are_kept(evidence: Evidence) -> Iterator[str]:
    """Require that a confirmed claim or extension has its effect and event, and that each extension counts once.

    An extended lease does not expire early: `every_unknown_resolves_to_once_or_never` compares the expiry with the
    stored end of the lease.
    """
    leases, ends = _index_leases(evidence), _index_announced_ends(evidence)
    for change in evidence.operations:
        if change.kind not in ("claim", "extend") or change.outcome != "ok":
            continue
        lease = leases.get((change.sandbox_id, change.student))
        if lease is None:
            yield f"{_format_operation(change)} was confirmed, but this lease does not exist"
        elif change.expires_at is None or int(lease.expires_at) < change.expires_at:
            yield f"{_format_operation(change)} was confirmed, but is not kept in {_format_leases([lease])}"
        elif change.kind == "extend" and change.expires_at not in ends.get(lease.sandbox_id, ()):
            yield f"{_format_operation(change)} was confirmed, but has no event"
    requested = _group_by(
        (change for change in _select_kind(evidence, "extend") if change.outcome != "refused"),
        lambda change: change.sandbox_id,
    )
    for sandbox_id, events in _group_events_by_sandbox(evidence).items():
        counts = Counter(event.type for event in events)
        keys = {change.idempotency_key for change in requested.get(sandbox_id, [])}
        if counts["lease.extended"] > len(keys):
            yield f"sandbox {sandbox_id} was extended {counts['lease.extended']} times for {len(keys)} requests"
        if counts["lease.claimed"] > 1:
            yield f"sandbox {sandbox_id} was claimed {counts['lease.claimed']} times"


def only_the_specs_transitions(evidence: Evidence) -> Iterator[str]:
    """Allow only the transitions of TRANSITIONS. Events count in the order of `occurred_at`, not of delivery."""
    statuses = {sandbox.sandbox_id: sandbox.status for sandbox in evidence.sandboxes}
    histories = _group_events_by_sandbox(evidence)
    for sandbox_id, events in histories.items():
        status, since = UNKNOWN, 0.0
        for event in sorted(events, key=lambda event: event.occurred_at):
            step = (status, event.type)
            if status == PENDING and event.type.startswith("lease.") and event.occurred_at < since + LOCK_SEC:
                continue
            if step not in TRANSITIONS and not (step == REOPENED and event.data.get("reopened")):
                yield f"sandbox {sandbox_id} was {status} before {_format_event(event)}"
            status, since = STATUS_AFTER_EVENT.get(event.type, status), event.occurred_at
        if statuses.get(sandbox_id, status) != status:
            yield f"sandbox {sandbox_id} is {statuses[sandbox_id]}, but its events lead to {status}"
    for sandbox_id in statuses.keys() - histories.keys():
        yield f"sandbox {sandbox_id} is {statuses[sandbox_id]}, but has no event"


def every_event_is_published(evidence: Evidence) -> Iterator[str]:
    """Require every event at least once. Without duplicates, the events of a sandbox must be in order."""
    for event_id in evidence.unpublished:
        yield f"event {event_id} is still in the outbox"
    seen = {(event.type, event.sandbox_id, _get_holder_or_reason(event)) for event in evidence.events}
    for lease in evidence.leases:
        if ("sandbox.allocated", lease.sandbox_id, lease.holder) not in seen:
            yield f"sandbox.allocated is missing for {_format_leases([lease])}"
        if lease.ended_at and ("sandbox.deletion_requested", lease.sandbox_id, lease.end_reason) not in seen:
            yield f"sandbox.deletion_requested is missing for {_format_leases([lease])}"
    types = {(event.type, event.sandbox_id) for event in evidence.events}
    for sandbox in evidence.sandboxes:
        if sandbox.status == DELETED and ("sandbox.deleted", sandbox.sandbox_id) not in types:
            yield f"sandbox.deleted is missing for sandbox {sandbox.sandbox_id}"
    for sandbox_id, events in _group_events_by_sandbox(evidence).items():
        for before, after in pairwise(events):
            if after.occurred_at < before.occurred_at - SAME_MOMENT_SEC:
                yield f"sandbox {sandbox_id}: {_format_event(after)} was delivered after {_format_event(before)}"


def no_waiting_student_is_overtaken(evidence: Evidence) -> Iterator[str]:
    """Require that a sandbox is leased to the first student in the waiting line whom it fits.

    A replacement goes before the line, because its student is at work in a lab that broke. A student whose token is
    at its quota is passed over, and so is one whose request is refused, for example because its token has ended.
    """
    first = {event.event_id: event for event in reversed(evidence.events)}
    by_type = _group_by(first.values(), lambda event: event.type)
    refused = {
        event.data["place"] for event in by_type.get("waiting.ended", []) if event.data["reason"] == "refused"
    }
    numbers = {event.data["sandbox_id"]: event.data["place"] for event in by_type.get("waiting.served", [])}
    places = [place for place in _list_places(evidence) if place.number not in refused]
    for allocated in by_type.get("sandbox.allocated", []):
        if "replaces" in allocated.data:
            continue
        own_number = numbers.get(allocated.sandbox_id)
        for place in places:
            was_waiting = (
                place.since < allocated.occurred_at - SAME_MOMENT_SEC
                and place.until > allocated.occurred_at + SAME_MOMENT_SEC
            )
            is_ahead = own_number is None or place.number < own_number  # type: ignore[operator]
            if (
                was_waiting
                and is_ahead
                and str(allocated.data.get("name")).startswith(place.prefix)
                and not _may_be_at_token_quota(evidence, place.holder, allocated.occurred_at)
            ):
                yield (
                    f"sandbox {allocated.sandbox_id} went to {allocated.data['holder']} at "
                    f"{_format_time(allocated.occurred_at)}, but {place.holder} has waited since "
                    f"{_format_time(place.since)}"
                )


def _may_be_at_token_quota(evidence: Evidence, student: object, at: float) -> bool:
    """Return whether a token that the student used allowed no other lease at this moment."""
    tokens = {operation.token for operation in _select_kind(evidence, "allocate") if operation.student == student}
    active = Counter(
        lease.token
        for lease in evidence.leases
        if lease.allocated_at <= at + SAME_MOMENT_SEC and _get_end(lease) >= at - SAME_MOMENT_SEC
    )
    return any(token.name in tokens and active[token.name] >= token.max_active for token in evidence.tokens)


def epochs_never_go_back(evidence: Evidence) -> Iterator[str]:
    for queue, observations in _group_by(evidence.epochs, lambda observation: observation.queue).items():
        for before, after in pairwise(sorted(observations, key=lambda observation: observation.seen_at)):
            if after.epoch < before.epoch:
                yield (
                    f"the epoch of {queue} was {before.epoch} at {_format_time(before.seen_at)} "
                    f"and {after.epoch} at {_format_time(after.seen_at)}"
                )
    for epoch, observations in _group_by(evidence.epochs, lambda observation: observation.epoch).items():
        queues = sorted({observation.queue for observation in observations})
        if len(queues) > 1:
            yield f"epoch {epoch} belongs to {' and '.join(queues)}"


def counts_add_up(evidence: Evidence) -> Iterator[str]:
    """Require that leases, statuses and the gateway's counts agree."""
    statuses = {sandbox.sandbox_id: sandbox.status for sandbox in evidence.sandboxes}
    counted = Counter(statuses.values())
    for status in STATUSES:
        reported = evidence.stats.get(status, 0)
        if reported != counted[status]:
            yield f"the gateway counts {reported} {status} sandboxes; there are {counted[status]}"
    if evidence.stats.get("total") != len(statuses):
        yield f"the gateway counts {evidence.stats.get('total')} sandboxes in total; there are {len(statuses)}"
    leased: set[str] = set()
    for lease in evidence.leases:
        leased.add(lease.sandbox_id)
        lease_status = statuses.get(lease.sandbox_id)
        expected = (ALLOCATED,) if lease.ended_at is None else (PENDING, FAILED, DELETED, None)
        if lease_status not in expected:
            yield f"sandbox {lease.sandbox_id} is {lease_status}, but there is {_format_leases([lease])}"
    for sandbox_id, status in statuses.items():
        if status in (ALLOCATED, PENDING, FAILED) and sandbox_id not in leased:
            yield f"sandbox {sandbox_id} is {status}, but has no lease"


def released_sandboxes_are_deleted_in_csp(evidence: Evidence) -> Iterator[str]:
    """Require that CSP has deleted all released sandboxes, and was never asked to delete another one."""
    leases = {lease.sandbox_id: lease for lease in evidence.leases}
    by_account = {sandbox.external_id: sandbox for sandbox in evidence.sandboxes}
    for sandbox in evidence.sandboxes:
        lease = leases.get(sandbox.sandbox_id)
        is_in_csp = sandbox.external_id in evidence.accounts
        if lease is not None and lease.ended_at is not None:
            if is_in_csp:
                yield f"CSP still has account {sandbox.external_id} of {_format_leases([lease])}"
            if sandbox.status != DELETED:
                yield f"sandbox {sandbox.sandbox_id} is {sandbox.status} after {_format_leases([lease])}"
        elif not is_in_csp and sandbox.status in (AVAILABLE, ALLOCATED):
            yield f"CSP has no account {sandbox.external_id}: sandbox {sandbox.sandbox_id} is {sandbox.status}"
    for deletion in evidence.deletions:
        owner = by_account.get(deletion.external_id)
        lease = leases.get(owner.sandbox_id) if owner else None
        request = f"CSP was asked at {_format_time(deletion.began_at)} to delete account {deletion.external_id}"
        if lease is None:
            yield f"{request}, which has no lease"
        elif _get_end(lease) > deletion.began_at + SAME_MOMENT_SEC:
            yield f"{request} of {_format_leases([lease])}"
        elif (
            lease.end_reason == "broken"
            and deletion.began_at < _get_end(lease) + evidence.hold_sec - SAME_MOMENT_SEC
        ):
            yield f"{request} before the end of its hold: {_format_leases([lease])}"


def no_stock_exceeds_its_max(evidence: Evidence) -> Iterator[str]:
    """Require at most `max` sandboxes and creation intents in flight, whenever the allocator grants an intent.

    Accounts made by hand may exceed `max`, so other times do not count.
    """
    periods = [
        *_list_periods_in_stock(evidence),
        *((intent.name, intent.granted_at, intent.flight_ended_at) for intent in evidence.creations),
    ]
    for prefix, limit in evidence.stock_limits.items():
        of_prefix = [(since, until) for name, since, until in periods if name.startswith(prefix)]
        for granted_at in sorted({one.granted_at for one in evidence.creations if one.name.startswith(prefix)}):
            number = sum(
                since <= granted_at and (until is None or until > granted_at + SAME_MOMENT_SEC)
                for since, until in of_prefix
            )
            if number > limit:
                yield f"the stock of {prefix} has a max of {limit}, but had {number} at {_format_time(granted_at)}"


def _list_periods_in_stock(evidence: Evidence) -> Iterator[tuple[str, float, float | None]]:
    """Yield the name of each sandbox with the times from and until which it is available or allocated."""
    for events in _group_events_by_sandbox(evidence).values():
        since: float | None = None
        name = str(events[0].data.get("name"))
        for event in sorted(events, key=lambda event: event.occurred_at):
            is_in_stock = STATUS_AFTER_EVENT.get(event.type) in (AVAILABLE, ALLOCATED)
            if is_in_stock and since is None:
                since = event.occurred_at
            elif not is_in_stock and since is not None:
                yield name, since, event.occurred_at
                since = None
        if since is not None:
            yield name, since, None


def one_account_per_intent_or_none(evidence: Evidence) -> Iterator[str]:
    """Require that each creation intent has one account in CSP or none, and that the pool agrees.

    Also an account counts that was deleted after its lease: its discovery shows that it existed.
    """
    accounts = _group_by(evidence.accounts, lambda external_id: evidence.accounts[external_id])
    discovered = _group_by(
        (event for event in evidence.events if event.type == "sandbox.discovered"),
        lambda event: event.data.get("name"),
    )
    in_pool = {sandbox.external_id for sandbox in evidence.sandboxes if sandbox.status != DELETED}
    for intent in evidence.creations:
        in_csp = accounts.get(intent.name, [])
        existed = {*in_csp, *(str(event.data.get("external_id")) for event in discovered.get(intent.name, []))}
        if len(existed) > 1:
            yield f"{intent.name} has {len(existed)} accounts: {' '.join(sorted(existed))}"
        if intent.flight_ended_at is None:
            if evidence.collected_at > intent.granted_at + FLIGHT_SEC:
                yield f"{intent.name} is in flight since {_format_time(intent.granted_at)}"
            continue
        recorded = set() if intent.external_id is None else {intent.external_id}
        if existed != recorded:
            accounts_in_csp = " and ".join(sorted(existed)) or "none"
            yield f"{intent.name} is {intent.state} with {intent.external_id}, but CSP had {accounts_in_csp}"
        for external_id in in_csp:
            if external_id not in in_pool:
                yield f"CSP has account {external_id} of {intent.name}, but the pool lacks it"


def students_are_served_again_in_time(evidence: Evidence) -> Iterator[str]:
    for recovery in evidence.recoveries:
        fault = f"{recovery.fault}, {_format_time(recovery.since)}"
        if recovery.served_at is None:
            yield f"after {fault}, no new student was given a sandbox"
        elif (wait_sec := _measure_wait(evidence, recovery.since, recovery.served_at)) > recovery.within_sec:
            yield f"after {fault}, a new student was given a sandbox {wait_sec:.1f} s later"


def requests_are_answered_while_a_standby_is_there(evidence: Evidence) -> Iterator[str]:
    """Require a reply when one allocator dies, because RabbitMQ redelivers its commands to the standby in time."""
    for operation in evidence.operations:
        invoked_at, ended_at = operation.invoked_at, operation.ended_at
        unanswered = operation.outcome == "unknown" and operation.status in (None, 504)
        if (
            unanswered
            and any(period.since <= invoked_at and ended_at <= period.until for period in evidence.failover_periods)
            and _measure_wait(evidence, invoked_at, ended_at) > FAILOVER_SEC
        ):
            yield f"{_format_operation(operation)} was not answered"


def nothing_goes_wrong_that_is_ours(evidence: Evidence) -> Iterator[str]:
    """Forbid status 500. During a fault of a server the broker must answer 503 or 504."""
    for operation in evidence.operations:
        if operation.status == 500:
            yield f"{_format_operation(operation)} was answered {operation.status} {operation.code}"


RULES: Sequence[Callable[[Evidence], Iterator[str]]] = (
    one_lease_per_sandbox,
    one_active_lease_per_student,
    one_lease_per_idempotency_key,
    no_policy_exceeds_its_quota,
    no_token_exceeds_its_quota,
    tokens_stay_in_their_scope,
    ended_tokens_have_no_effect,
    places_need_their_secret,
    leases_need_their_secret,
    every_answer_is_a_lease,
    the_same_sandbox_while_the_lease_lasts,
    releases_are_kept,
    reads_show_answered_leases,
    every_unknown_resolves_to_once_or_never,
    ended_plays_leave_nothing,
    lease_changes_are_kept,
    only_the_specs_transitions,
    every_event_is_published,
    no_waiting_student_is_overtaken,
    epochs_never_go_back,
    counts_add_up,
    released_sandboxes_are_deleted_in_csp,
    no_stock_exceeds_its_max,
    one_account_per_intent_or_none,
    students_are_served_again_in_time,
    requests_are_answered_while_a_standby_is_there,
    nothing_goes_wrong_that_is_ours,
)


def _select_kind(evidence: Evidence, kind: str) -> Iterator[Operation]:
    return (operation for operation in evidence.operations if operation.kind == kind)


def _select_granted(evidence: Evidence) -> Iterator[Operation]:
    """Yield the operations whose response contains a lease, with the sandbox of this lease."""
    for operation in evidence.operations:
        if operation.outcome == "ok" and operation.kind == "allocate":
            yield operation
        elif operation.outcome == "ok" and operation.kind == "replace":
            yield replace(operation, sandbox_id=operation.new_sandbox_id)


def _index_announced_ends(evidence: Evidence) -> dict[str, set[object]]:
    """Return the ends of each sandbox's lease, in Unix seconds, as its events announced them."""
    return {
        sandbox_id: {event.data["expires_at"] for event in events if "expires_at" in event.data}
        for sandbox_id, events in _group_events_by_sandbox(evidence).items()
    }


def _index_leases(evidence: Evidence) -> dict[tuple[str | None, str], Lease]:
    """Index the leases by sandbox and student."""
    return {(lease.sandbox_id, lease.holder): lease for lease in evidence.leases}


def _group_events_by_sandbox(evidence: Evidence) -> dict[str, list[Event]]:
    """Group the events by sandbox, in order of their first delivery, without duplicates."""
    first: dict[str, Event] = {}
    for event in evidence.events:
        if event.sandbox_id is not None:
            first.setdefault(event.event_id, event)
    return _group_by(first.values(), lambda event: event.sandbox_id or "")


def _get_holder_or_reason(event: Event) -> object:
    return event.data.get("reason" if event.type == "sandbox.deletion_requested" else "holder")


def _group_by(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    groups: dict[K, list[T]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups


def _measure_wait(evidence: Evidence, since: float, until: float) -> float:
    """Return the duration without the stalls of the machine."""
    stalled = (min(until, stall.until) - max(since, stall.since) for stall in evidence.stalls)
    return until - since - sum(sec for sec in stalled if sec > 0)


def _get_end(lease: Lease) -> float:
    return float("inf") if lease.ended_at is None else lease.ended_at


def _format_leases(leases: Iterable[Lease]) -> str:
    return " and ".join(
        f"lease {lease.lease_id} of {lease.sandbox_id} to {lease.holder} "
        + (
            f"since {_format_time(lease.allocated_at)}"
            if lease.ended_at is None
            else f"from {_format_time(lease.allocated_at)} to {_format_time(lease.ended_at)} ({lease.end_reason})"
        )
        for lease in leases
    )


def _format_operation(operation: Operation) -> str:
    request = (
        operation.kind
        if operation.kind in ("allocate", "end_play")
        else f"{operation.kind} of {operation.sandbox_id}"
    )
    return (
        f"operation {operation.number}, {operation.student}'s {request} "
        f"from {_format_time(operation.invoked_at)} to {_format_time(operation.ended_at)},"
    )


def _format_event(event: Event) -> str:
    return f"{event.type} {event.event_id} of {_format_time(event.occurred_at)}"


def _format_time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%H:%M:%S.%f")[:-3]
