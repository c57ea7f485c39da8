"""The checker finds nothing in a history that keeps every promise, and each violation planted into it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import pytest

from tests.chaos import checker
from tests.chaos.evidence import (
    Covered,
    Deletion,
    Epoch,
    Event,
    Evidence,
    Lease,
    Operation,
    OperationKind,
    Outcome,
    Recovery,
    Sandbox,
    Stall,
)

T = TypeVar("T")

START = 1_764_000_000.0
LAB_SEC, GRACE_SEC = 100.0, 10.0


def operation(
    number: int,
    student: str,
    outcome: Outcome,
    sandbox_id: str | None = None,
    *,
    kind: OperationKind = "allocate",
    at: float,
    took: float = 1,
    **more: Any,
) -> Operation:
    return Operation(
        number=number,
        kind=kind,
        student=student,
        sandbox_id=sandbox_id,
        invoked_at=START + at,
        ended_at=START + at + took,
        outcome=outcome,
        **more,
    )


def granted(number: int, student: str, sandbox_id: str, status: int, *, at: float, since: float) -> Operation:
    answer = operation(number, student, "ok", sandbox_id, at=at, status=status)
    return replace(answer, allocated_at=int(START + since), expires_at=int(START + since + LAB_SEC))


def lease(
    lease_id: int,
    sandbox_id: str,
    holder: str,
    since: float,
    until: float | None = None,
    *,
    end_reason: str | None = None,
    idempotency_key: str | None = None,
) -> Lease:
    return Lease(
        lease_id=lease_id,
        sandbox_id=sandbox_id,
        holder=holder,
        idempotency_key=idempotency_key,
        allocated_at=START + since,
        expires_at=START + since + LAB_SEC,
        ended_at=None if until is None else START + until,
        end_reason=end_reason,
    )


def event(event_id: str, name: str, sandbox_id: str | None, at: float, **data: object) -> Event:
    return Event(event_id=event_id, type=name, sandbox_id=sandbox_id, occurred_at=START + at, data=data)


def sandbox(sandbox_id: str, status: str) -> Sandbox:
    return Sandbox(sandbox_id=sandbox_id, external_id=f"account-{sandbox_id}", status=status)


DISCOVERED = [event(f"found-{n}", "sandbox.discovered", str(n), 0) for n in range(1, 7)]

GOOD = Evidence(
    operations=[
        # Ada's first request was lost in a crash, the second repeats it and is answered; she asks once more, and
        # gives her sandbox back.
        operation(1, "ada", "unknown", at=1, took=5, status=504, idempotency_key="a"),
        replace(granted(2, "ada", "1", 200, at=7, since=2.5), idempotency_key="a"),
        granted(3, "ada", "1", 200, at=9, since=2.5),
        operation(4, "ada", "ok", "1", kind="release", at=20, status=200),
        # Bob never learns that he was given a sandbox; it expires.
        operation(5, "bob", "unknown", at=30, took=5),
        # Of Cyd's two requests one came to nothing; she is refused; then she gets one, and keeps it.
        operation(6, "cyd", "unknown", at=40),
        operation(7, "cyd", "refused", at=42, status=409, code="POOL_EXHAUSTED"),
        granted(8, "cyd", "3", 201, at=50, since=50.5),
        # Dan's release is answered to its repetition, when nothing is left to be ended.
        granted(9, "dan", "4", 201, at=60, since=60.5),
        operation(10, "dan", "unknown", "4", kind="release", at=70, took=10),
        operation(11, "dan", "ok", "4", kind="release", at=81, status=200),
        granted(12, "dan", "5", 201, at=90, since=90.5),
    ],
    leases=[
        lease(1, "1", "ada", 2.5, 20.5, end_reason="student", idempotency_key="a"),
        lease(2, "2", "bob", 31, 31 + LAB_SEC + GRACE_SEC + 1, end_reason="expired"),
        lease(3, "3", "cyd", 50.5),
        lease(4, "4", "dan", 60.5, 71, end_reason="student"),
        lease(5, "5", "dan", 90.5),
    ],
    sandboxes=[
        sandbox("1", "deleted"),
        sandbox("2", "deleted"),
        sandbox("3", "allocated"),
        sandbox("4", "deleted"),
        sandbox("5", "allocated"),
        sandbox("6", "available"),
    ],
    unpublished=[],
    events=[
        *DISCOVERED,
        event("sync", "sync.completed", None, 0),
        event("1-taken", "sandbox.allocated", "1", 2.5, holder="ada"),
        event("1-left", "sandbox.deletion_requested", "1", 20.5, reason="student"),
        event("1-taken", "sandbox.allocated", "1", 2.5, holder="ada"),  # the relay repeats what was not confirmed
        event("1-left", "sandbox.deletion_requested", "1", 20.5, reason="student"),
        event("2-taken", "sandbox.allocated", "2", 31, holder="bob"),
        event("1-gone", "sandbox.deleted", "1", 25),
        event("none", "pool.exhausted", None, 42),
        event("3-taken", "sandbox.allocated", "3", 50.5, holder="cyd"),
        event("4-taken", "sandbox.allocated", "4", 60.5, holder="dan"),
        event("4-left", "sandbox.deletion_requested", "4", 71, reason="student"),
        event("4-failed", "sandbox.deletion_failed", "4", 72),
        event("4-again", "sandbox.deletion_requested", "4", 73, reason="admin"),
        event("4-gone", "sandbox.deleted", "4", 74),
        event("4-there", "sandbox.deletion_requested", "4", 84, reason="student", reopened=True),
        event("4-gone-again", "sandbox.deleted", "4", 85),
        event("5-taken", "sandbox.allocated", "5", 90.5, holder="dan"),
        event("6-away", "sandbox.stale", "6", 91),
        event("6-back", "sandbox.restored", "6", 92),
        event("2-left", "sandbox.deletion_requested", "2", 142, reason="expired"),
        event("2-gone", "sandbox.deleted", "2", 143),
    ],
    deletions=[
        Deletion(external_id="account-1", began_at=START + 21, status=None),
        Deletion(external_id="account-1", began_at=START + 24, status=204),
        Deletion(external_id="account-4", began_at=START + 73, status=404),
        Deletion(external_id="account-2", began_at=START + 142, status=204),
    ],
    accounts=frozenset({"account-3", "account-5", "account-6"}),
    epochs=[
        Epoch(seen_at=START, queue="allocator.commands", epoch=1, backend_pid=11),
        Epoch(seen_at=START + 1, queue="allocator.commands", epoch=1, backend_pid=11),
        Epoch(seen_at=START, queue="allocator.maintenance", epoch=2, backend_pid=12),
        Epoch(seen_at=START + 2, queue="allocator.commands", epoch=3, backend_pid=13),
    ],
    recoveries=[Recovery(fault="allocator killed", since=START + 12, served_at=START + 21.9)],
    stats={"available": 1, "allocated": 2, "deleted": 3, "total": 6},
    grace_sec=GRACE_SEC,
    looked_at=START + 160,
    covered=[Covered(since=START + 6.5, until=START + 29.5)],
)


def test_nothing_is_found_in_a_history_that_keeps_every_promise() -> None:
    assert checker.check(GOOD) == []


def with_another(items: Any, item: T) -> list[T]:
    return [*items, item]


def changed(items: Any, place: int, **changes: Any) -> list[Any]:
    """A copy of the sequence in which one item is different."""
    return [replace(item, **changes) if number == place else item for number, item in enumerate(items)]


def without(items: Any, *event_ids: str) -> list[Any]:
    return [item for item in items if item.event_id not in event_ids]


Broken = dict[str, Any]
BROKEN: dict[str, tuple[Callable[..., Any], Broken, str]] = {
    "a sandbox is leased again after its first student": (
        checker.one_lease_per_sandbox,
        {"leases": with_another(GOOD.leases, lease(6, "1", "eve", 140))},
        "sandbox 1 was leased 2 times",
    ),
    "two students are told the same sandbox, whatever the database says": (
        checker.one_lease_per_sandbox,
        {"operations": with_another(GOOD.operations, granted(13, "eve", "3", 201, at=51, since=51.5))},
        "sandbox 3 was given to cyd and eve",
    ),
    "a student holds two sandboxes at once": (
        checker.one_active_lease_per_student,
        {"leases": changed(GOOD.leases, 4, allocated_at=START + 65)},
        "student dan held two sandboxes at once",
    ),
    "a student holds two sandboxes at once, the second for a while within the first": (
        checker.one_active_lease_per_student,
        {
            "leases": [
                lease(1, "1", "ada", 2, 50, end_reason="student"),
                lease(2, "2", "ada", 10, 11, end_reason="student"),
                lease(3, "3", "ada", 40, 60, end_reason="student"),
            ]
        },
        "lease 3 of 3 to ada",
    ),
    "an idempotency key gives two leases": (
        checker.one_lease_per_idempotency_key,
        {"leases": changed(GOOD.leases, 2, idempotency_key="a")},
        "the idempotency key a has 2 leases",
    ),
    "a 201 is no lease": (
        checker.every_answer_is_a_lease,
        {"leases": [item for item in GOOD.leases if item.holder != "cyd"]},
        "operation 8, cyd's allocate",
    ),
    "a 200 is no lease": (
        checker.every_answer_is_a_lease,
        {"leases": [item for item in GOOD.leases if item.holder != "ada"]},
        "operation 3, ada's allocate",
    ),
    "an answer tells another time than the lease": (
        checker.every_answer_is_a_lease,
        {"operations": changed(GOOD.operations, 7, expires_at=int(START))},
        "was told that its lease lasts",
    ),
    "a lease is told to be new twice": (
        checker.every_answer_is_a_lease,
        {"operations": with_another(GOOD.operations, granted(13, "cyd", "3", 201, at=50.2, since=50.5))},
        "both made lease 3",
    ),
    "an old lease is told to be new": (
        checker.every_answer_is_a_lease,
        {"operations": changed(GOOD.operations, 2, status=201)},
        "was told that its lease is new",
    ),
    "a student is given another sandbox while the lease lasts": (
        checker.the_same_sandbox_while_the_lease_lasts,
        {"operations": with_another(GOOD.operations, granted(13, "dan", "5", 200, at=65, since=90.5))},
        "lease 5 of 5 to dan",
    ),
    "a student is given a sandbox that was given back": (
        checker.the_same_sandbox_while_the_lease_lasts,
        {"operations": with_another(GOOD.operations, granted(13, "ada", "1", 200, at=30, since=2.5))},
        "did not hold at that time",
    ),
    "a release is confirmed and not done": (
        checker.releases_are_kept,
        {"leases": changed(GOOD.leases, 0, ended_at=None, end_reason=None)},
        "operation 4, ada's release of 1",
    ),
    "a release is confirmed before it is done": (
        checker.releases_are_kept,
        {"leases": changed(GOOD.leases, 0, ended_at=START + 30)},
        "the lease goes on",
    ),
    "a release is confirmed to somebody who had no lease": (
        checker.releases_are_kept,
        {
            "operations": with_another(
                GOOD.operations, operation(13, "eve", "ok", "1", kind="release", at=99, status=200)
            )
        },
        "there is no such lease",
    ),
    "a release is refused to the student who held the sandbox": (
        checker.releases_are_kept,
        {"operations": changed(GOOD.operations, 10, outcome="refused", status=403, code="NOT_SANDBOX_OWNER")},
        "was refused (NOT_SANDBOX_OWNER)",
    ),
    "a request takes effect twice": (
        checker.every_unknown_resolves_to_once_or_never,
        {"leases": with_another(GOOD.leases, lease(6, "6", "bob", 33))},
        "lease 6 of 6 to bob",
    ),
    "a request that was answered takes effect once more, after the release": (
        checker.every_unknown_resolves_to_once_or_never,
        {"leases": with_another(GOOD.leases, lease(6, "6", "ada", 22))},
        "lease 6 of 6 to ada",
    ),
    "a request that was answered takes effect once more, and the next is answered with that": (
        checker.every_unknown_resolves_to_once_or_never,
        {"operations": changed(GOOD.operations, 11, invoked_at=START + 95, ended_at=START + 96, status=200)},
        "lease 5 of 5 to dan",
    ),
    "a request that was refused takes effect": (
        checker.every_unknown_resolves_to_once_or_never,
        {"operations": changed(GOOD.operations, 4, outcome="refused", status=409)},
        "lease 2 of 2 to bob",
    ),
    "a request takes effect before it was made": (
        checker.every_unknown_resolves_to_once_or_never,
        {"operations": changed(GOOD.operations, 4, invoked_at=START + 32)},
        "lease 2 of 2 to bob",
    ),
    "a request takes effect long after its student has gone": (
        checker.every_unknown_resolves_to_once_or_never,
        {"operations": changed(GOOD.operations, 4, invoked_at=START - 900, ended_at=START - 890)},
        "lease 2 of 2 to bob",
    ),
    "a lease ends as if its student had asked": (
        checker.every_unknown_resolves_to_once_or_never,
        {"leases": changed(GOOD.leases, 2, ended_at=START + 55, end_reason="student")},
        "the student had not asked for the end of lease 3",
    ),
    "a lease expires before its time": (
        checker.every_unknown_resolves_to_once_or_never,
        {"leases": changed(GOOD.leases, 1, ended_at=START + 131.5)},
        "it was to last until",
    ),
    "a lease is never ended": (
        checker.every_unknown_resolves_to_once_or_never,
        {"looked_at": START + 1000},
        "nobody had ended lease 3",
    ),
    "an administrator ends a lease who was never there": (
        checker.every_unknown_resolves_to_once_or_never,
        {"leases": changed(GOOD.leases, 0, end_reason="admin")},
        "nobody had asked for the end of lease 1",
    ),
    "a deleted sandbox comes back": (
        checker.only_the_specs_transitions,
        {"events": with_another(GOOD.events, event("new", "sandbox.discovered", "1", 150))},
        "sandbox 1 was deleted when there came sandbox.discovered new",
    ),
    "a used sandbox is available again": (
        checker.only_the_specs_transitions,
        {"events": with_another(GOOD.events, event("new", "sandbox.restored", "3", 150))},
        "sandbox 3 was allocated when there came sandbox.restored",
    ),
    "a deletion that CSP has done is asked for again": (
        checker.only_the_specs_transitions,
        {"events": with_another(GOOD.events, event("new", "sandbox.deletion_requested", "1", 150))},
        "sandbox 1 was deleted when there came sandbox.deletion_requested",
    ),
    "a sandbox is in a state that no event has led to": (
        checker.only_the_specs_transitions,
        {"sandboxes": changed(GOOD.sandboxes, 5, status="stale")},
        "sandbox 6 is stale, and its events lead to available",
    ),
    "a sandbox appears without an event": (
        checker.only_the_specs_transitions,
        {"sandboxes": with_another(GOOD.sandboxes, sandbox("7", "available"))},
        "no event has told of sandbox 7",
    ),
    "an allocation is never published": (
        checker.every_event_is_published,
        {"events": without(GOOD.events, "3-taken")},
        "sandbox.allocated is missing for lease 3",
    ),
    "the end of a lease is never published": (
        checker.every_event_is_published,
        {"events": without(GOOD.events, "2-left")},
        "sandbox.deletion_requested is missing for lease 2",
    ),
    "a deletion is never published": (
        checker.every_event_is_published,
        {"events": without(GOOD.events, "1-gone")},
        "sandbox.deleted is missing for sandbox 1",
    ),
    "an event stays in the outbox": (
        checker.every_event_is_published,
        {"unpublished": ["late"]},
        "event late is still in the outbox",
    ),
    "the events of a sandbox come out of order": (
        checker.every_event_is_published,
        {"events": [*without(GOOD.events, "6-away"), event("6-away", "sandbox.stale", "6", 91)]},
        "of sandbox 6 sandbox.stale 6-away",
    ),
    "an epoch goes back": (
        checker.epochs_never_go_back,
        {
            "epochs": with_another(
                GOOD.epochs, Epoch(seen_at=START + 3, queue="allocator.commands", epoch=1, backend_pid=11)
            )
        },
        "the epoch of allocator.commands was 3",
    ),
    "two queues share an epoch": (
        checker.epochs_never_go_back,
        {"epochs": changed(GOOD.epochs, 2, epoch=1)},
        "epoch 1 belongs to allocator.commands and allocator.maintenance",
    ),
    "the gateway counts what is not there": (
        checker.counts_add_up,
        {"stats": {**GOOD.stats, "available": 2}},
        "the gateway counts 2 available sandboxes; there are 1",
    ),
    "the gateway counts more in all": (
        checker.counts_add_up,
        {"stats": {**GOOD.stats, "total": 7}},
        "the gateway counts 7 sandboxes in all; there are 6",
    ),
    "a sandbox is available while a student holds it": (
        checker.counts_add_up,
        {"sandboxes": changed(GOOD.sandboxes, 2, status="available")},
        "sandbox 3 is available, but there is lease 3",
    ),
    "a sandbox is allocated to nobody": (
        checker.counts_add_up,
        {"sandboxes": changed(GOOD.sandboxes, 5, status="allocated")},
        "sandbox 6 is allocated, and nobody ever leased it",
    ),
    "a released sandbox stays in CSP": (
        checker.released_sandboxes_are_deleted_in_csp,
        {"accounts": GOOD.accounts | {"account-1"}},
        "CSP still has account account-1",
    ),
    "a released sandbox is not recorded as deleted": (
        checker.released_sandboxes_are_deleted_in_csp,
        {"sandboxes": changed(GOOD.sandboxes, 0, status="deletion_failed")},
        "sandbox 1 is deletion_failed after lease 1",
    ),
    "an available sandbox is gone from CSP": (
        checker.released_sandboxes_are_deleted_in_csp,
        {"accounts": GOOD.accounts - {"account-6"}},
        "CSP has no account account-6",
    ),
    "a sandbox is deleted under its student": (
        checker.released_sandboxes_are_deleted_in_csp,
        {"deletions": changed(GOOD.deletions, 0, began_at=START + 10)},
        "to delete account account-1 of lease 1",
    ),
    "a sandbox is deleted that nobody had": (
        checker.released_sandboxes_are_deleted_in_csp,
        {
            "deletions": with_another(
                GOOD.deletions, Deletion(external_id="account-6", began_at=START + 9, status=500)
            )
        },
        "to delete account account-6, which nobody had leased",
    ),
    "students wait too long after a fault": (
        checker.students_are_served_again_in_time,
        {"recoveries": changed(GOOD.recoveries, 0, served_at=START + 22.1)},
        "a new student was given a sandbox 10.1 s later",
    ),
    "nobody is served after a fault": (
        checker.students_are_served_again_in_time,
        {"recoveries": changed(GOOD.recoveries, 0, served_at=None)},
        "no new student was given a sandbox",
    ),
    "a request comes to nothing though a standby is there": (
        checker.requests_are_answered_while_a_standby_is_there,
        {"operations": changed(GOOD.operations, 2, outcome="unknown", status=504, ended_at=START + 14)},
        "operation 3, ada's allocate",
    ),
    "a request gets no answer at all though a standby is there": (
        checker.requests_are_answered_while_a_standby_is_there,
        {
            "operations": changed(
                GOOD.operations, 3, outcome="unknown", status=None, code="TimeoutError", ended_at=START + 25
            )
        },
        "operation 4, ada's release of 1",
    ),
    "the broker answers with a fault of its own": (
        checker.nothing_goes_wrong_that_is_ours,
        {"operations": changed(GOOD.operations, 5, status=500, code="INTERNAL_ERROR")},
        "was answered 500 INTERNAL_ERROR",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_it_is_found_that(what: str) -> None:
    rule, changes, sentence = BROKEN[what]
    violations = list(rule(replace(GOOD, **changes)))
    assert any(sentence in violation for violation in violations), violations
    named = rule.__name__.replace("_", " ")
    assert any(violation.startswith(f"{named}: ") for violation in checker.check(replace(GOOD, **changes)))


def test_who_gives_up_at_once_has_not_waited_in_vain() -> None:
    operations = changed(GOOD.operations, 2, outcome="unknown", status=None, code="TimeoutError")
    assert list(checker.requests_are_answered_while_a_standby_is_there(replace(GOOD, operations=operations))) == []


SLOW: dict[str, Broken] = {
    "a student is served": {"recoveries": changed(GOOD.recoveries, 0, served_at=START + 22.5)},
    "a request is answered": {
        "operations": changed(GOOD.operations, 2, outcome="unknown", status=504, ended_at=START + 14)
    },
}
"""Both too late, by less than three seconds."""


@pytest.mark.parametrize("what", SLOW)
@pytest.mark.parametrize(
    ("stalls", "excused"),
    [
        ([Stall(since=START + 9, until=START + 10.5), Stall(since=START + 12.5, until=START + 13.5)], True),
        ([Stall(since=START + 1, until=START + 8.9), Stall(since=START + 12.4, until=START + 12.6)], False),
        ([Stall(since=START + 22.6, until=START + 29)], False),
    ],
)
def test_only_a_time_that_the_machine_had_not_for_us_is_no_fault_of_the_broker(
    what: str, stalls: list[Stall], excused: bool
) -> None:
    slow = replace(GOOD, **SLOW[what], stalls=stalls)
    violations = [
        *checker.students_are_served_again_in_time(slow),
        *checker.requests_are_answered_while_a_standby_is_there(slow),
    ]
    assert (violations == []) is excused


def test_every_rule_is_broken_once_at_least() -> None:
    assert {rule for rule, _, _ in BROKEN.values()} == set(checker.RULES)
