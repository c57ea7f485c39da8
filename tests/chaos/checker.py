"""Judges a round of faults: which of the broker's promises its evidence contradicts.

It asks nobody and waits for nothing. Each rule is a function that yields a sentence, with ids and times, for each
violation; RULES has them all. Where the evidence leaves room, a rule finds for the broker: what it reports is
certain.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from typing import TypeVar

from tests.chaos.evidence import Event, Evidence, Lease, Operation

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

SAME_MOMENT_SEC = 0.05
"""Times that differ by less may have been either way round: PostgreSQL's now() is when a transaction began, and
what it sees is a moment younger."""
LATEST_EFFECT_SEC = 60.0
"""How long after its client has given up a request may still be carried out. RabbitMQ drops it within seconds;
an allocator that had it in hand may be slow."""
OVERDUE_SEC = 60.0
"""How long after its time, the grace included, a lease must have ended."""
FAIL_OVER_SEC = 3.0
"""How long a request may wait for an answer when an allocator dies and another is there. Who gives up sooner, as
those do who try whether the broker is back, has not waited in vain."""

UNKNOWN, AVAILABLE, ALLOCATED, STALE = "unknown", "available", "allocated", "stale"
PENDING, FAILED, DELETED = "pending_deletion", "deletion_failed", "deleted"
STATUSES = (AVAILABLE, ALLOCATED, STALE, PENDING, FAILED, DELETED)
TRANSITIONS = {
    (UNKNOWN, "sandbox.discovered"): AVAILABLE,
    (AVAILABLE, "sandbox.allocated"): ALLOCATED,
    (AVAILABLE, "sandbox.stale"): STALE,
    (STALE, "sandbox.restored"): AVAILABLE,
    (STALE, "sandbox.deleted"): DELETED,
    (ALLOCATED, "sandbox.deletion_requested"): PENDING,
    (PENDING, "sandbox.deleted"): DELETED,
    (PENDING, "sandbox.deletion_failed"): FAILED,
    (FAILED, "sandbox.deletion_requested"): PENDING,
}
"""From a status, by an event, to the next."""
REOPENED = (DELETED, "sandbox.deletion_requested")
"""Only where the event says that CSP still listed it."""
LEADS_TO = {event: after for (_, event), after in TRANSITIONS.items()}


def check(evidence: Evidence) -> list[str]:
    """The violations of all rules, each a sentence that begins with the rule's name; none if the broker kept its
    promises."""
    return [f"{rule.__name__.replace('_', ' ')}: {violation}" for rule in RULES for violation in rule(evidence)]


def one_lease_per_sandbox(evidence: Evidence) -> Iterator[str]:
    """A used sandbox is never handed out again, so its leases are not merely apart: there is one."""
    for sandbox_id, leases in _grouped(evidence.leases, lambda lease: lease.sandbox_id).items():
        if len(leases) > 1:
            yield f"sandbox {sandbox_id} was leased {len(leases)} times: {_told(leases)}"
    for given, answers in _grouped(_granted(evidence), lambda answer: answer.sandbox_id).items():
        students = sorted({answer.student for answer in answers})
        if len(students) > 1:
            yield f"sandbox {given} was given to {' and '.join(students)}: {' '.join(map(_name, answers))}"


def one_active_lease_per_student(evidence: Evidence) -> Iterator[str]:
    for student, leases in _grouped(evidence.leases, lambda lease: lease.holder).items():
        leases.sort(key=lambda lease: lease.allocated_at)
        longest = leases[0]
        for lease in leases[1:]:
            if lease.allocated_at < _end(longest) - SAME_MOMENT_SEC:
                yield f"student {student} held two sandboxes at once: {_told([longest, lease])}"
            longest = max(longest, lease, key=_end)


def one_lease_per_idempotency_key(evidence: Evidence) -> Iterator[str]:
    for key, leases in _grouped(evidence.leases, lambda lease: lease.idempotency_key).items():
        if key is not None and len(leases) > 1:
            yield f"the idempotency key {key} has {len(leases)} leases: {_told(leases)}"


def every_answer_is_a_lease(evidence: Evidence) -> Iterator[str]:
    """And tells of it what is true; and a lease is new once."""
    leases = _leases(evidence)
    new: dict[int, Operation] = {}
    for answer in _granted(evidence):
        lease = leases.get((answer.sandbox_id, answer.student))
        if lease is None:
            yield f"{_name(answer)} was answered with sandbox {answer.sandbox_id}, and there is no such lease"
            continue
        if (answer.allocated_at, answer.expires_at) != (int(lease.allocated_at), int(lease.expires_at)):
            yield (
                f"{_name(answer)} was told that its lease lasts from {answer.allocated_at} to {answer.expires_at}; "
                f"it is {_told([lease])}, from {lease.allocated_at:.3f} to {lease.expires_at:.3f}"
            )
        if answer.status == 201:
            if lease.allocated_at < answer.invoked_at - SAME_MOMENT_SEC:
                yield f"{_name(answer)} was told that its lease is new; it is {_told([lease])}"
            if lease.lease_id in new:
                yield f"{_name(new[lease.lease_id])} and {_name(answer)} both made {_told([lease])}"
            new[lease.lease_id] = answer


def the_same_sandbox_while_the_lease_lasts(evidence: Evidence) -> Iterator[str]:
    """What a student is given they hold at some moment between the question and the answer. As nobody holds two at
    once, whoever holds one is given that one."""
    leases = _leases(evidence)
    for answer in _granted(evidence):
        lease = leases.get((answer.sandbox_id, answer.student))
        if lease is None:
            continue
        began_too_late = lease.allocated_at > answer.ended_at + SAME_MOMENT_SEC
        if began_too_late or _end(lease) < answer.invoked_at - SAME_MOMENT_SEC:
            yield f"{_name(answer)} was given what its student did not hold at that time: {_told([lease])}"


def releases_are_kept(evidence: Evidence) -> Iterator[str]:
    leases = _leases(evidence)
    for release in _of_kind(evidence, "release"):
        lease = leases.get((release.sandbox_id, release.student))
        if release.outcome == "ok" and lease is None:
            yield f"{_name(release)} was confirmed, and there is no such lease"
        elif release.outcome == "ok" and lease and _end(lease) > release.ended_at + SAME_MOMENT_SEC:
            yield f"{_name(release)} was confirmed, and the lease goes on: {_told([lease])}"
        elif release.status in (403, 404) and lease and lease.allocated_at <= release.invoked_at:
            yield f"{_name(release)} was refused ({release.code}) to the student who held it: {_told([lease])}"


def every_unknown_resolves_to_once_or_never(evidence: Evidence) -> Iterator[str]:
    """A lease is the effect of one request: of one that was answered with it, or else of one whose outcome its
    client does not know, and which made no other."""
    answers = _grouped(_granted(evidence), lambda answer: (answer.sandbox_id, answer.student))
    unknown = _grouped(
        (operation for operation in _of_kind(evidence, "allocate") if operation.outcome == "unknown"),
        lambda operation: operation.student,
    )
    for lease in sorted(evidence.leases, key=lambda lease: lease.allocated_at):
        if any(_may_have_made(answer, lease) for answer in answers.get((lease.sandbox_id, lease.holder), [])):
            continue
        may_have_made_it = [asked for asked in unknown.get(lease.holder, []) if _may_have_made(asked, lease)]
        if may_have_made_it:
            # The oldest: a younger one may be left for a later lease, and this one will not be.
            unknown[lease.holder].remove(min(may_have_made_it, key=lambda asked: asked.ended_at))
        else:
            yield f"no request that is left can have made {_told([lease])}"
    yield from _ends_without_cause(evidence)


def _may_have_made(asked: Operation, lease: Lease) -> bool:
    in_time = asked.invoked_at - SAME_MOMENT_SEC <= lease.allocated_at <= asked.ended_at + LATEST_EFFECT_SEC
    return in_time and asked.idempotency_key == lease.idempotency_key


def _ends_without_cause(evidence: Evidence) -> Iterator[str]:
    releases = _grouped(
        (operation for operation in _of_kind(evidence, "release") if operation.outcome != "refused"),
        lambda operation: (operation.sandbox_id, operation.student),
    )
    for lease in evidence.leases:
        asked = releases.get((lease.sandbox_id, lease.holder), [])
        may_stay_until = lease.expires_at + evidence.grace_sec
        if lease.ended_at is None:
            if evidence.looked_at > may_stay_until + OVERDUE_SEC:
                yield f"at {_clock(evidence.looked_at)} nobody had ended {_told([lease])}"
        elif lease.end_reason == "student":
            if not any(release.invoked_at - SAME_MOMENT_SEC <= lease.ended_at for release in asked):
                yield f"the student had not asked for the end of {_told([lease])}"
        elif lease.end_reason == "expired":
            if lease.ended_at < may_stay_until - SAME_MOMENT_SEC:
                yield f"it was to last until {_clock(may_stay_until)} at least: {_told([lease])}"
        else:
            yield f"nobody had asked for the end of {_told([lease])}"


def only_the_specs_transitions(evidence: Evidence) -> Iterator[str]:
    """In the order in which they happened, which is not that in which RabbitMQ has carried their events."""
    statuses = {sandbox.sandbox_id: sandbox.status for sandbox in evidence.sandboxes}
    histories = _histories(evidence)
    for sandbox_id, events in histories.items():
        status = UNKNOWN
        for event in sorted(events, key=lambda event: event.occurred_at):
            step = (status, event.type)
            if step not in TRANSITIONS and not (step == REOPENED and event.data.get("reopened")):
                yield f"sandbox {sandbox_id} was {status} when there came {_title(event)}"
            status = LEADS_TO.get(event.type, status)
        if statuses.get(sandbox_id, status) != status:
            yield f"sandbox {sandbox_id} is {statuses[sandbox_id]}, and its events lead to {status}"
    for sandbox_id in statuses.keys() - histories.keys():
        yield f"no event has told of sandbox {sandbox_id}, which is {statuses[sandbox_id]}"


def every_event_is_published(evidence: Evidence) -> Iterator[str]:
    """At least once, and whatever is repeated, its first copies come in order for each sandbox."""
    for event_id in evidence.unpublished:
        yield f"event {event_id} is still in the outbox"
    seen = {(event.type, event.sandbox_id, _party(event)) for event in evidence.events}
    for lease in evidence.leases:
        if ("sandbox.allocated", lease.sandbox_id, lease.holder) not in seen:
            yield f"sandbox.allocated is missing for {_told([lease])}"
        if lease.ended_at and ("sandbox.deletion_requested", lease.sandbox_id, lease.end_reason) not in seen:
            yield f"sandbox.deletion_requested is missing for {_told([lease])}"
    types = {(event.type, event.sandbox_id) for event in evidence.events}
    for sandbox in evidence.sandboxes:
        if sandbox.status == DELETED and ("sandbox.deleted", sandbox.sandbox_id) not in types:
            yield f"sandbox.deleted is missing for sandbox {sandbox.sandbox_id}"
    for sandbox_id, events in _histories(evidence).items():
        for before, after in pairwise(events):
            if after.occurred_at < before.occurred_at - SAME_MOMENT_SEC:
                yield f"of sandbox {sandbox_id} {_title(after)} came behind {_title(before)}"


def epochs_never_go_back(evidence: Evidence) -> Iterator[str]:
    for queue, looks in _grouped(evidence.epochs, lambda look: look.queue).items():
        for before, after in pairwise(sorted(looks, key=lambda look: look.seen_at)):
            if after.epoch < before.epoch:
                yield (
                    f"the epoch of {queue} was {before.epoch} at {_clock(before.seen_at)} "
                    f"and {after.epoch} at {_clock(after.seen_at)}"
                )
    for epoch, looks in _grouped(evidence.epochs, lambda look: look.epoch).items():
        queues = sorted({look.queue for look in looks})
        if len(queues) > 1:
            yield f"epoch {epoch} belongs to {' and '.join(queues)}"


def counts_add_up(evidence: Evidence) -> Iterator[str]:
    """Leases and statuses tell the same story, and so do the gateway's counts."""
    statuses = {sandbox.sandbox_id: sandbox.status for sandbox in evidence.sandboxes}
    counted = Counter(statuses.values())
    for status in STATUSES:
        told = evidence.stats.get(status, 0)
        if told != counted[status]:
            yield f"the gateway counts {told} {status} sandboxes; there are {counted[status]}"
    if evidence.stats.get("total") != len(statuses):
        yield f"the gateway counts {evidence.stats.get('total')} sandboxes in all; there are {len(statuses)}"
    leased: set[str] = set()
    for lease in evidence.leases:
        leased.add(lease.sandbox_id)
        its = statuses.get(lease.sandbox_id)
        fitting = (ALLOCATED,) if lease.ended_at is None else (PENDING, FAILED, DELETED, None)
        if its not in fitting:
            yield f"sandbox {lease.sandbox_id} is {its}, but there is {_told([lease])}"
    for sandbox_id, status in statuses.items():
        if status in (ALLOCATED, PENDING, FAILED) and sandbox_id not in leased:
            yield f"sandbox {sandbox_id} is {status}, and nobody ever leased it"


def released_sandboxes_are_deleted_in_csp(evidence: Evidence) -> Iterator[str]:
    """In the end all of them, and no other ever."""
    leases = {lease.sandbox_id: lease for lease in evidence.leases}
    by_account = {sandbox.external_id: sandbox for sandbox in evidence.sandboxes}
    for sandbox in evidence.sandboxes:
        lease = leases.get(sandbox.sandbox_id)
        is_there = sandbox.external_id in evidence.accounts
        if lease is not None and lease.ended_at is not None:
            if is_there:
                yield f"CSP still has account {sandbox.external_id} of {_told([lease])}"
            if sandbox.status != DELETED:
                yield f"sandbox {sandbox.sandbox_id} is {sandbox.status} after {_told([lease])}"
        elif not is_there and sandbox.status in (AVAILABLE, ALLOCATED):
            yield f"CSP has no account {sandbox.external_id}: sandbox {sandbox.sandbox_id} is {sandbox.status}"
    for deletion in evidence.deletions:
        owner = by_account.get(deletion.external_id)
        lease = leases.get(owner.sandbox_id) if owner else None
        when = f"CSP was asked at {_clock(deletion.began_at)} to delete account {deletion.external_id}"
        if lease is None:
            yield f"{when}, which nobody had leased"
        elif _end(lease) > deletion.began_at + SAME_MOMENT_SEC:
            yield f"{when} of {_told([lease])}"


def students_are_served_again_in_time(evidence: Evidence) -> Iterator[str]:
    for recovery in evidence.recoveries:
        fault = f"{recovery.fault}, {_clock(recovery.since)}"
        if recovery.served_at is None:
            yield f"after {fault}, no new student was given a sandbox"
        elif (took := _waited(evidence, recovery.since, recovery.served_at)) > recovery.within_sec:
            yield f"after {fault}, a new student was given a sandbox {took:.1f} s later"


def requests_are_answered_while_a_standby_is_there(evidence: Evidence) -> Iterator[str]:
    """Whichever allocator dies, what it had in hand is given to the other, which answers before the gateway gives
    up."""
    for operation in evidence.operations:
        asked_at, gave_up_at = operation.invoked_at, operation.ended_at
        unanswered = operation.outcome == "unknown" and operation.status in (None, 504)
        if (
            unanswered
            and any(time.since <= asked_at and gave_up_at <= time.until for time in evidence.covered)
            and _waited(evidence, asked_at, gave_up_at) > FAIL_OVER_SEC
        ):
            yield f"{_name(operation)} was not answered"


def nothing_goes_wrong_that_is_ours(evidence: Evidence) -> Iterator[str]:
    """A fault around the broker is answered with "not now", never with a fault of its own."""
    for operation in evidence.operations:
        if operation.status == 500:
            yield f"{_name(operation)} was answered {operation.status} {operation.code}"


RULES: Sequence[Callable[[Evidence], Iterator[str]]] = (
    one_lease_per_sandbox,
    one_active_lease_per_student,
    one_lease_per_idempotency_key,
    every_answer_is_a_lease,
    the_same_sandbox_while_the_lease_lasts,
    releases_are_kept,
    every_unknown_resolves_to_once_or_never,
    only_the_specs_transitions,
    every_event_is_published,
    epochs_never_go_back,
    counts_add_up,
    released_sandboxes_are_deleted_in_csp,
    students_are_served_again_in_time,
    requests_are_answered_while_a_standby_is_there,
    nothing_goes_wrong_that_is_ours,
)


def _of_kind(evidence: Evidence, kind: str) -> Iterator[Operation]:
    return (operation for operation in evidence.operations if operation.kind == kind)


def _granted(evidence: Evidence) -> Iterator[Operation]:
    return (operation for operation in _of_kind(evidence, "allocate") if operation.outcome == "ok")


def _leases(evidence: Evidence) -> dict[tuple[str | None, str], Lease]:
    """By sandbox and student."""
    return {(lease.sandbox_id, lease.holder): lease for lease in evidence.leases}


def _histories(evidence: Evidence) -> dict[str, list[Event]]:
    """For each sandbox its events without repetitions, as they first came."""
    first: dict[str, Event] = {}
    for event in evidence.events:
        if event.sandbox_id is not None:
            first.setdefault(event.event_id, event)
    return _grouped(first.values(), lambda event: event.sandbox_id or "")


def _party(event: Event) -> object:
    return event.data.get("reason" if event.type == "sandbox.deletion_requested" else "holder")


def _grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    groups: dict[K, list[T]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups


def _waited(evidence: Evidence, since: float, until: float) -> float:
    """How long that was, without the times in which the machine had no time for us."""
    stalled = (min(until, stall.until) - max(since, stall.since) for stall in evidence.stalls)
    return until - since - sum(sec for sec in stalled if sec > 0)


def _end(lease: Lease) -> float:
    return float("inf") if lease.ended_at is None else lease.ended_at


def _told(leases: Iterable[Lease]) -> str:
    return " and ".join(
        f"lease {lease.lease_id} of {lease.sandbox_id} to {lease.holder} "
        + (
            f"since {_clock(lease.allocated_at)}"
            if lease.ended_at is None
            else f"from {_clock(lease.allocated_at)} to {_clock(lease.ended_at)} ({lease.end_reason})"
        )
        for lease in leases
    )


def _name(operation: Operation) -> str:
    what = f"{operation.kind} of {operation.sandbox_id}" if operation.kind == "release" else operation.kind
    return (
        f"operation {operation.number}, {operation.student}'s {what} "
        f"from {_clock(operation.invoked_at)} to {_clock(operation.ended_at)},"
    )


def _title(event: Event) -> str:
    return f"{event.type} {event.event_id} of {_clock(event.occurred_at)}"


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%H:%M:%S.%f")[:-3]
