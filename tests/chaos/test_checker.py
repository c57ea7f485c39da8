"""Checker: it accepts a correct history and reports every violation planted into a copy of it."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import pytest

from tests.chaos import checker
from tests.chaos.evidence import (
    Creation,
    Deletion,
    EpochObservation,
    Event,
    Evidence,
    FailoverPeriod,
    Lease,
    Operation,
    OperationKind,
    Outcome,
    Recovery,
    Sandbox,
    Stall,
    Token,
)

T = TypeVar("T")

START = 1_764_000_000.0
LAB_SEC, GRACE_SEC = 100.0, 10.0


def build_operation(
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


def build_granted(number: int, student: str, sandbox_id: str, status: int, *, at: float, since: float) -> Operation:
    operation = build_operation(number, student, "ok", sandbox_id, at=at, status=status)
    return replace(operation, allocated_at=int(START + since), expires_at=int(START + since + LAB_SEC))


def build_lease(
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


def build_event(event_id: str, name: str, sandbox_id: str | None, at: float, /, **data: object) -> Event:
    return Event(event_id=event_id, type=name, sandbox_id=sandbox_id, occurred_at=START + at, data=data)


def build_sandbox(sandbox_id: str, status: str) -> Sandbox:
    return Sandbox(sandbox_id=sandbox_id, external_id=f"account-{sandbox_id}", status=status)


def build_creation(number: int, *, at: float, until: float | None = None, state: str = "created") -> Creation:
    """Return the intent of the account `account-NUMBER`, or of no account if it is abandoned."""
    return Creation(
        name=f"lab-{number}",
        state=state,
        external_id=f"account-{number}" if state == "created" else None,
        granted_at=START + at,
        flight_ended_at=None if until is None else START + until,
    )


def build_discovery(number: int, *, at: float) -> Event:
    data = {"name": f"lab-{number}", "external_id": f"account-{number}"}
    return build_event(f"found-{number}", "sandbox.discovered", str(number), at, **data)


DISCOVERED = [build_event(f"found-{n}", "sandbox.discovered", str(n), 0) for n in range(1, 7)]

CORRECT = Evidence(
    operations=[
        # Ada's first request is lost in a crash. Its retry and a third request succeed. She releases the sandbox.
        build_operation(1, "ada", "unknown", at=1, took=5, status=504, idempotency_key="a"),
        replace(build_granted(2, "ada", "1", 200, at=7, since=2.5), idempotency_key="a"),
        build_granted(3, "ada", "1", 200, at=9, since=2.5),
        build_operation(4, "ada", "ok", "1", kind="release", at=20, status=200),
        # The response to Bob's allocation is lost. His lease expires.
        build_operation(5, "bob", "unknown", at=30, took=5),
        # Cyd's first request has no effect, her second is refused, and her third succeeds. She keeps the sandbox.
        build_operation(6, "cyd", "unknown", at=40),
        build_operation(7, "cyd", "refused", at=42, status=409, code="POOL_EXHAUSTED"),
        build_granted(8, "cyd", "3", 201, at=50, since=50.5),
        # The response to Dan's release is lost. Its retry succeeds after the lease has ended.
        build_granted(9, "dan", "4", 201, at=60, since=60.5),
        build_operation(10, "dan", "unknown", "4", kind="release", at=70, took=10),
        build_operation(11, "dan", "ok", "4", kind="release", at=81, status=200),
        build_granted(12, "dan", "5", 201, at=90, since=90.5),
        replace(build_granted(16, "eve", "7", 201, at=10.5, since=11), token="own", secret="eve", track_name="lab"),
        build_operation(17, "eve", "ok", "7", kind="release", at=11.5, status=200, token="own", secret="eve"),
        # Dan reads his sandbox before the response to his allocation, and after it.
        build_operation(14, "dan", "refused", "5", kind="read", at=90.1, status=404, code="SANDBOX_NOT_FOUND"),
        build_operation(15, "dan", "ok", "5", kind="read", at=92, status=200),
        # Eve releases her sandbox too early, without its secret and with another token.
        build_operation(18, "eve", "refused", "7", kind="release", at=11.1, status=403, secret="wrong"),
        build_operation(19, "eve", "refused", "7", kind="read", at=11.6, status=403, token="other", secret="eve"),
        # Fay has a place in line. Another client asks under her name.
        build_operation(22, "fay", "waiting", at=44.5, status=202, secret="fay"),
        build_operation(23, "fay", "refused", at=47, status=403),
    ],
    leases=[
        build_lease(1, "1", "ada", 2.5, 20.5, end_reason="student", idempotency_key="a"),
        build_lease(2, "2", "bob", 31, 31 + LAB_SEC + GRACE_SEC + 1, end_reason="expired"),
        build_lease(3, "3", "cyd", 50.5),
        replace(build_lease(4, "4", "dan", 60.5, 71, end_reason="student"), policy="lab"),
        replace(build_lease(5, "5", "dan", 90.5), policy="lab"),
        replace(
            build_lease(7, "7", "eve", 11, 12, end_reason="student"),
            track_name="lab",
            name_prefix="lab-",
            token="own",
            secret_hash=hashlib.sha256(b"eve").hexdigest(),
        ),
    ],
    sandboxes=[
        build_sandbox("1", "deleted"),
        build_sandbox("2", "deleted"),
        build_sandbox("3", "allocated"),
        build_sandbox("4", "deleted"),
        build_sandbox("5", "allocated"),
        build_sandbox("6", "available"),
        build_sandbox("7", "deleted"),
        build_sandbox("8", "available"),
    ],
    unpublished=[],
    events=[
        *DISCOVERED,
        build_event("sync", "sync.completed", None, 0),
        build_event("own-issued", "token.changed", None, 1, name="own", change="issued"),
        build_event("own-suspended", "token.changed", None, 2, name="own", change="suspended"),
        build_event("own-resumed", "token.changed", None, 8, name="own", change="resumed"),
        build_event("own-revoked", "token.changed", None, 10, name="own", change="revoked"),
        build_event("1-taken", "sandbox.allocated", "1", 2.5, holder="ada"),
        build_event("1-left", "sandbox.deletion_requested", "1", 20.5, reason="student"),
        build_event(
            "1-taken", "sandbox.allocated", "1", 2.5, holder="ada"
        ),  # the outbox relay repeats unconfirmed events
        build_event("1-left", "sandbox.deletion_requested", "1", 20.5, reason="student"),
        build_event("2-taken", "sandbox.allocated", "2", 31, holder="bob"),
        build_event("1-gone", "sandbox.deleted", "1", 25),
        build_event("none", "pool.exhausted", None, 42),
        # Cyd waits before Fay. Eve waits for other sandboxes.
        build_event("w1", "waiting.started", None, 43, place=1, holder="eve", name_prefix="lab-"),
        build_event("w2", "waiting.started", None, 44, place=2, holder="cyd", name_prefix=None),
        build_event("w3", "waiting.started", None, 45, place=3, holder="fay", name_prefix="sandbox-"),
        build_event("w2-served", "waiting.served", None, 50.5, place=2, holder="cyd", sandbox_id="3"),
        build_event("w3-left", "waiting.ended", None, 55, place=3, holder="fay", reason="left"),
        build_event("3-taken", "sandbox.allocated", "3", 50.5, holder="cyd", name="sandbox-3"),
        build_event("4-taken", "sandbox.allocated", "4", 60.5, holder="dan"),
        build_event("4-left", "sandbox.deletion_requested", "4", 71, reason="student"),
        build_event("4-failed", "sandbox.deletion_failed", "4", 72),
        build_event("4-again", "sandbox.deletion_requested", "4", 73, reason="admin"),
        build_event("4-gone", "sandbox.deleted", "4", 74),
        build_event("4-there", "sandbox.deletion_requested", "4", 84, reason="student", reopened=True),
        build_event("4-gone-again", "sandbox.deleted", "4", 85),
        build_event("5-taken", "sandbox.allocated", "5", 90.5, holder="dan"),
        build_event("6-away", "sandbox.stale", "6", 91),
        build_event("6-back", "sandbox.restored", "6", 92),
        build_event("2-left", "sandbox.deletion_requested", "2", 142, reason="expired"),
        build_event("2-gone", "sandbox.deleted", "2", 143),
        # The stock holds up to two sandboxes. Eve's leaves it, so a third one is created.
        build_discovery(7, at=10),
        build_event("7-taken", "sandbox.allocated", "7", 11, holder="eve", name="lab-7"),
        build_event("7-left", "sandbox.deletion_requested", "7", 12, reason="student"),
        build_event("7-gone", "sandbox.deleted", "7", 13),
        build_discovery(8, at=14),
    ],
    deletions=[
        Deletion(external_id="account-1", began_at=START + 21, status=None),
        Deletion(external_id="account-1", began_at=START + 24, status=204),
        Deletion(external_id="account-4", began_at=START + 73, status=404),
        Deletion(external_id="account-2", began_at=START + 142, status=204),
        Deletion(external_id="account-7", began_at=START + 12.5, status=204),
    ],
    accounts={**{f"account-{n}": f"sandbox-{n}" for n in (3, 5, 6)}, "account-8": "lab-8", "account-9": "lab-9"},
    epochs=[
        EpochObservation(seen_at=START, queue="allocator.commands", epoch=1, backend_pid=11),
        EpochObservation(seen_at=START + 1, queue="allocator.commands", epoch=1, backend_pid=11),
        EpochObservation(seen_at=START, queue="allocator.maintenance", epoch=2, backend_pid=12),
        EpochObservation(seen_at=START + 2, queue="allocator.commands", epoch=3, backend_pid=13),
    ],
    recoveries=[Recovery(fault="allocator killed", since=START + 12, served_at=START + 21.9)],
    stats={"available": 2, "allocated": 2, "deleted": 4, "total": 8},
    grace_sec=GRACE_SEC,
    collected_at=START + 160,
    failover_periods=[FailoverPeriod(since=START + 6.5, until=START + 29.5)],
    quotas={"lab": 1},
    tokens=[Token(name="own", tracks=["lab"], prefixes=["lab-"], max_active=1)],
    creations=[
        build_creation(7, at=5, until=10),
        build_creation(8, at=5, until=14),
        build_creation(9, at=12.1),
        build_creation(10, at=15, until=15, state="abandoned"),
    ],
    stock_limits={"lab-": 2},
)


def test_correct_history_has_no_violations() -> None:
    assert checker.check(CORRECT) == []


def test_a_replacement_goes_before_the_waiting_line() -> None:
    events = remove_events(CORRECT.events, "w2", "w2-served", "3-taken")
    allocated = build_event("3-taken", "sandbox.allocated", "3", 50.5, holder="cyd", name="sandbox-3", replaces="9")
    assert [*checker.no_waiting_student_is_overtaken(replace(CORRECT, events=[*events, allocated]))] == []


def test_a_student_whose_request_is_refused_is_passed_over() -> None:
    waiting = build_event("w1", "waiting.started", None, 43, place=1, holder="eve", name_prefix="sandbox-")
    left = build_event("w1-left", "waiting.ended", None, 55, place=1, holder="eve", reason="left")
    refused = build_event("w1-left", "waiting.ended", None, 55, place=1, holder="eve", reason="refused")
    events = [*remove_events(CORRECT.events, "w1"), waiting]
    assert [*checker.no_waiting_student_is_overtaken(replace(CORRECT, events=[*events, left]))]
    assert [*checker.no_waiting_student_is_overtaken(replace(CORRECT, events=[*events, refused]))] == []


def test_a_student_whose_token_is_at_its_quota_is_passed_over() -> None:
    waiting = build_event("w1", "waiting.started", None, 43, place=1, holder="eve", name_prefix="sandbox-")
    lease = replace(build_lease(8, "9", "gus", 40), token="own")
    evidence = replace(CORRECT, events=[*remove_events(CORRECT.events, "w1"), waiting])
    assert [*checker.no_waiting_student_is_overtaken(evidence)]
    evidence = replace(evidence, leases=[*CORRECT.leases, lease])
    assert [*checker.no_waiting_student_is_overtaken(evidence)] == []


def test_the_end_of_a_play_explains_the_end_of_its_lease_only() -> None:
    play = build_end_of_play("ada", at=20, ended=19)
    later = build_end_of_play("dan", at=89, ended=88)
    leases = change_item(CORRECT.leases, 0, end_reason="play_ended")
    evidence = replace(CORRECT, leases=leases, operations=[*CORRECT.operations, play, later])
    assert [*checker.every_unknown_resolves_to_once_or_never(evidence)] == []
    assert [*checker.ended_plays_leave_nothing(evidence)] == []


def test_a_place_in_line_explains_a_lease() -> None:
    operations = change_item(CORRECT.operations, 4, outcome="waiting", status=202)
    assert checker.check(replace(CORRECT, operations=operations)) == []


def build_extension(*, at: float, until: float) -> Operation:
    """Return Cyd's confirmed extension of her lease, which ends at START + 150.5."""
    operation = build_operation(20, "cyd", "ok", "3", kind="extend", at=at, status=200, idempotency_key="e")
    return replace(operation, expires_at=int(until))


def build_end_of_play(student: str, *, at: float, ended: float) -> Operation:
    """Return a confirmed event of Instruqt."""
    return build_operation(21, student, "ok", kind="end_play", at=at, status=200, play_ended_at=int(START + ended))


def change_operation(number: int, **changes: Any) -> list[Operation]:
    """Copy the operations and change the one with this number."""
    return [replace(one, **changes) if one.number == number else one for one in CORRECT.operations]


def append_item(items: Any, item: T) -> list[T]:
    return [*items, item]


def change_item(items: Any, index: int, **changes: Any) -> list[Any]:
    """Copy the sequence and change one item."""
    return [replace(item, **changes) if number == index else item for number, item in enumerate(items)]


def remove_account(external_id: str) -> dict[str, str]:
    return {other: name for other, name in CORRECT.accounts.items() if other != external_id}


def remove_events(items: Any, *event_ids: str) -> list[Any]:
    return [item for item in items if item.event_id not in event_ids]


Changes = dict[str, Any]
VIOLATIONS: dict[str, tuple[Callable[..., Any], Changes, str]] = {
    "a sandbox is leased again after its first student": (
        checker.one_lease_per_sandbox,
        {"leases": append_item(CORRECT.leases, build_lease(6, "1", "eve", 140))},
        "sandbox 1 was leased 2 times",
    ),
    "two students get the same sandbox, against the database": (
        checker.one_lease_per_sandbox,
        {"operations": append_item(CORRECT.operations, build_granted(13, "eve", "3", 201, at=51, since=51.5))},
        "sandbox 3 was given to cyd and eve",
    ),
    "a request overtakes a waiting student": (
        checker.no_waiting_student_is_overtaken,
        {"events": remove_events(CORRECT.events, "w2", "w2-served")},
        "sandbox 3 went to cyd at",
    ),
    "a student in line overtakes another": (
        checker.no_waiting_student_is_overtaken,
        {
            "events": [
                *remove_events(CORRECT.events, "w1"),
                build_event("w1", "waiting.started", None, 43, place=1, holder="eve", name_prefix="sandbox-"),
            ]
        },
        "but eve has waited since",
    ),
    "a student holds two sandboxes at once": (
        checker.one_active_lease_per_student,
        {"leases": change_item(CORRECT.leases, 4, allocated_at=START + 65)},
        "student dan held two sandboxes at once",
    ),
    "a student holds two sandboxes at once, after a shorter overlap": (
        checker.one_active_lease_per_student,
        {
            "leases": [
                build_lease(1, "1", "ada", 2, 50, end_reason="student"),
                build_lease(2, "2", "ada", 10, 11, end_reason="student"),
                build_lease(3, "3", "ada", 40, 60, end_reason="student"),
            ]
        },
        "lease 3 of 3 to ada",
    ),
    "an idempotency key gives two leases": (
        checker.one_lease_per_idempotency_key,
        {"leases": change_item(CORRECT.leases, 2, idempotency_key="a")},
        "the idempotency key a has 2 leases",
    ),
    "a policy has more active leases than its quota": (
        checker.no_policy_exceeds_its_quota,
        {"leases": change_item(CORRECT.leases, 2, policy="lab")},
        "the policy lab allows 1 leases, but had 2: lease 3 of 3 to cyd",
    ),
    "a token has more active leases than its quota": (
        checker.no_token_exceeds_its_quota,
        {"tokens": [Token(name="own", tracks=["lab"], prefixes=["lab-"], max_active=0)]},
        "the token own allows 0 leases, but had 1: lease 7 of 7 to eve",
    ),
    "a token leases for another lab": (
        checker.tokens_stay_in_their_scope,
        {"tokens": [Token(name="own", tracks=["exam"], prefixes=["lab-"], max_active=1)]},
        "the token own leased for lab with the prefix lab-: lease 7",
    ),
    "a token leases with another name prefix": (
        checker.tokens_stay_in_their_scope,
        {"tokens": [Token(name="own", tracks=["lab"], prefixes=["lab-x"], max_active=1)]},
        "the token own leased for lab with the prefix lab-: lease 7",
    ),
    "a token reaches a lease of another token": (
        checker.tokens_stay_in_their_scope,
        {"operations": change_operation(19, outcome="ok")},
        "operation 19, eve's read of 7",
    ),
    "a revoked token leases": (
        checker.ended_tokens_have_no_effect,
        {"events": remove_events(CORRECT.events, "own-resumed", "own-revoked")},
        "the token own was suspended at 16:00:02.000, but leased later",
    ),
    "a request of a suspended token succeeds": (
        checker.ended_tokens_have_no_effect,
        {"events": remove_events(CORRECT.events, "own-resumed", "own-revoked"), "leases": []},
        "the token own was suspended at 16:00:02.000, but operation 16",
    ),
    "a token waits for another lab": (
        checker.tokens_stay_in_their_scope,
        {"operations": change_operation(16, outcome="waiting", track_name="exam")},
        "operation 16, eve's allocate from 16:00:10.500 to 16:00:11.500, with the token own succeeded for exam",
    ),
    "another request keeps the place of a student": (
        checker.places_need_their_secret,
        {"operations": change_operation(23, outcome="waiting")},
        "operation 23, fay's allocate",
    ),
    "a request succeeds without the secret of the lease": (
        checker.leases_need_their_secret,
        {"operations": change_operation(18, outcome="ok")},
        "operation 18, eve's release of 7",
    ),
    "a 201 has no lease": (
        checker.every_answer_is_a_lease,
        {"leases": [item for item in CORRECT.leases if item.holder != "cyd"]},
        "operation 8, cyd's allocate",
    ),
    "a 200 has no lease": (
        checker.every_answer_is_a_lease,
        {"leases": [item for item in CORRECT.leases if item.holder != "ada"]},
        "operation 3, ada's allocate",
    ),
    "a response has other times than its lease": (
        checker.every_answer_is_a_lease,
        {"operations": change_item(CORRECT.operations, 7, expires_at=int(START))},
        "got a lease from",
    ),
    "a lease gets two 201 responses": (
        checker.every_answer_is_a_lease,
        {"operations": append_item(CORRECT.operations, build_granted(13, "cyd", "3", 201, at=50.2, since=50.5))},
        "both got 201 for lease 3",
    ),
    "an old lease gets a 201 response": (
        checker.every_answer_is_a_lease,
        {"operations": change_item(CORRECT.operations, 2, status=201)},
        "got 201 for an older lease",
    ),
    "a confirmed extension is not kept": (
        checker.lease_changes_are_kept,
        {"operations": append_item(CORRECT.operations, build_extension(at=100, until=START + 200))},
        "is not kept in lease 3 of 3 to cyd",
    ),
    "a confirmed extension has no event": (
        checker.lease_changes_are_kept,
        {"operations": append_item(CORRECT.operations, build_extension(at=100, until=START + 150))},
        "was confirmed, but has no event",
    ),
    "an extension is granted twice": (
        checker.lease_changes_are_kept,
        {
            "operations": append_item(CORRECT.operations, build_extension(at=100, until=START + 150)),
            "events": [
                *CORRECT.events,
                build_event("3-longer", "lease.extended", "3", 100, expires_at=int(START + 150)),
                build_event("3-longer-again", "lease.extended", "3", 101, expires_at=int(START + 150)),
            ],
        },
        "sandbox 3 was extended 2 times for 1 requests",
    ),
    "a standby lease is claimed twice": (
        checker.lease_changes_are_kept,
        {
            "events": [
                *CORRECT.events,
                build_event("3-claimed", "lease.claimed", "3", 100),
                build_event("3-claimed-again", "lease.claimed", "3", 101),
            ]
        },
        "sandbox 3 was claimed 2 times",
    ),
    "a sandbox was replaced without a request": (
        checker.every_unknown_resolves_to_once_or_never,
        {"leases": change_item(CORRECT.leases, 0, end_reason="broken")},
        "no replacement request explains the end of lease 1",
    ),
    "a lease was ended without the end of its play": (
        checker.every_unknown_resolves_to_once_or_never,
        {
            "leases": change_item(CORRECT.leases, 0, end_reason="play_ended"),
            "operations": append_item(CORRECT.operations, build_end_of_play("ada", at=19, ended=1)),
        },
        "no end of a play explains the end of lease 1",
    ),
    "a lease continues after the end of its play": (
        checker.ended_plays_leave_nothing,
        {"operations": append_item(CORRECT.operations, build_end_of_play("cyd", at=100, ended=100))},
        "operation 21, cyd's end_play from 16:01:40.000 to 16:01:41.000, was confirmed, but the lease continues",
    ),
    "a student waits after the end of the play": (
        checker.ended_plays_leave_nothing,
        {"operations": append_item(CORRECT.operations, build_end_of_play("fay", at=46, ended=46))},
        "but the student has waited since 16:00:45.000",
    ),
    "a broken sandbox is deleted during its hold": (
        checker.released_sandboxes_are_deleted_in_csp,
        {"leases": change_item(CORRECT.leases, 0, end_reason="broken"), "hold_sec": 10},
        "before the end of its hold: lease 1",
    ),
    "a student gets another sandbox during a lease": (
        checker.the_same_sandbox_while_the_lease_lasts,
        {"operations": append_item(CORRECT.operations, build_granted(13, "dan", "5", 200, at=65, since=90.5))},
        "lease 5 of 5 to dan",
    ),
    "a student gets a released sandbox": (
        checker.the_same_sandbox_while_the_lease_lasts,
        {"operations": append_item(CORRECT.operations, build_granted(13, "ada", "1", 200, at=30, since=2.5))},
        "not leased at that time",
    ),
    "a gateway reads from a former primary": (
        checker.reads_show_answered_leases,
        {
            "operations": append_item(
                CORRECT.operations,
                build_operation(
                    13, "cyd", "refused", "3", kind="read", at=55, status=404, code="SANDBOX_NOT_FOUND"
                ),
            )
        },
        "operation 13, cyd's read of 3",
    ),
    "a confirmed release has no effect": (
        checker.releases_are_kept,
        {"leases": change_item(CORRECT.leases, 0, ended_at=None, end_reason=None)},
        "operation 4, ada's release of 1",
    ),
    "a release is confirmed before its effect": (
        checker.releases_are_kept,
        {"leases": change_item(CORRECT.leases, 0, ended_at=START + 30)},
        "the lease continues",
    ),
    "a release without a lease is confirmed": (
        checker.releases_are_kept,
        {
            "operations": append_item(
                CORRECT.operations, build_operation(13, "eve", "ok", "1", kind="release", at=99, status=200)
            )
        },
        "this lease does not exist",
    ),
    "a release is refused to the holder": (
        checker.releases_are_kept,
        {
            "operations": change_item(
                CORRECT.operations, 10, outcome="refused", status=403, code="NOT_SANDBOX_OWNER"
            )
        },
        "was refused (NOT_SANDBOX_OWNER)",
    ),
    "a request takes effect twice": (
        checker.every_unknown_resolves_to_once_or_never,
        {"leases": append_item(CORRECT.leases, build_lease(6, "6", "bob", 33))},
        "lease 6 of 6 to bob",
    ),
    "an answered request takes effect again after the release": (
        checker.every_unknown_resolves_to_once_or_never,
        {"leases": append_item(CORRECT.leases, build_lease(6, "6", "ada", 22))},
        "lease 6 of 6 to ada",
    ),
    "an answered request takes effect again, and the next request returns its lease": (
        checker.every_unknown_resolves_to_once_or_never,
        {"operations": change_item(CORRECT.operations, 11, invoked_at=START + 95, ended_at=START + 96, status=200)},
        "lease 5 of 5 to dan",
    ),
    "a refused request takes effect": (
        checker.every_unknown_resolves_to_once_or_never,
        {"operations": change_item(CORRECT.operations, 4, outcome="refused", status=409)},
        "lease 2 of 2 to bob",
    ),
    "a request takes effect before it was sent": (
        checker.every_unknown_resolves_to_once_or_never,
        {"operations": change_item(CORRECT.operations, 4, invoked_at=START + 32)},
        "lease 2 of 2 to bob",
    ),
    "a request takes effect long after its time-out": (
        checker.every_unknown_resolves_to_once_or_never,
        {"operations": change_item(CORRECT.operations, 4, invoked_at=START - 900, ended_at=START - 890)},
        "lease 2 of 2 to bob",
    ),
    "a lease ends as released without a request": (
        checker.every_unknown_resolves_to_once_or_never,
        {"leases": change_item(CORRECT.leases, 2, ended_at=START + 55, end_reason="student")},
        "no release request of the student explains the end of lease 3",
    ),
    "a lease expires too early": (
        checker.every_unknown_resolves_to_once_or_never,
        {"leases": change_item(CORRECT.leases, 1, ended_at=START + 131.5)},
        "expired before",
    ),
    "a lease never ends": (
        checker.every_unknown_resolves_to_once_or_never,
        {"collected_at": START + 1000},
        "overdue at 16:16:40.000: lease 3",
    ),
    "a lease is ended by an administrator in a round without one": (
        checker.every_unknown_resolves_to_once_or_never,
        {"leases": change_item(CORRECT.leases, 0, end_reason="admin")},
        "unknown reason for the end of lease 1",
    ),
    "a deleted sandbox comes back": (
        checker.only_the_specs_transitions,
        {"events": append_item(CORRECT.events, build_event("new", "sandbox.discovered", "1", 150))},
        "sandbox 1 was deleted before sandbox.discovered new",
    ),
    "a used sandbox is available again": (
        checker.only_the_specs_transitions,
        {"events": append_item(CORRECT.events, build_event("new", "sandbox.restored", "3", 150))},
        "sandbox 3 was allocated before sandbox.restored",
    ),
    "a completed deletion is requested again": (
        checker.only_the_specs_transitions,
        {"events": append_item(CORRECT.events, build_event("new", "sandbox.deletion_requested", "1", 150))},
        "sandbox 1 was deleted before sandbox.deletion_requested",
    ),
    "a sandbox has a status without an event": (
        checker.only_the_specs_transitions,
        {"sandboxes": change_item(CORRECT.sandboxes, 5, status="stale")},
        "sandbox 6 is stale, but its events lead to available",
    ),
    "a sandbox appears without an event": (
        checker.only_the_specs_transitions,
        {"sandboxes": append_item(CORRECT.sandboxes, build_sandbox("9", "available"))},
        "sandbox 9 is available, but has no event",
    ),
    "an allocation is never published": (
        checker.every_event_is_published,
        {"events": remove_events(CORRECT.events, "3-taken")},
        "sandbox.allocated is missing for lease 3",
    ),
    "the end of a lease is never published": (
        checker.every_event_is_published,
        {"events": remove_events(CORRECT.events, "2-left")},
        "sandbox.deletion_requested is missing for lease 2",
    ),
    "a deletion is never published": (
        checker.every_event_is_published,
        {"events": remove_events(CORRECT.events, "1-gone")},
        "sandbox.deleted is missing for sandbox 1",
    ),
    "an event stays in the outbox": (
        checker.every_event_is_published,
        {"unpublished": ["late"]},
        "event late is still in the outbox",
    ),
    "the events of a sandbox are out of order": (
        checker.every_event_is_published,
        {"events": [*remove_events(CORRECT.events, "6-away"), build_event("6-away", "sandbox.stale", "6", 91)]},
        "sandbox 6: sandbox.stale 6-away",
    ),
    "an epoch goes back": (
        checker.epochs_never_go_back,
        {
            "epochs": append_item(
                CORRECT.epochs,
                EpochObservation(seen_at=START + 3, queue="allocator.commands", epoch=1, backend_pid=11),
            )
        },
        "the epoch of allocator.commands was 3",
    ),
    "two queues share an epoch": (
        checker.epochs_never_go_back,
        {"epochs": change_item(CORRECT.epochs, 2, epoch=1)},
        "epoch 1 belongs to allocator.commands and allocator.maintenance",
    ),
    "the gateway counts too many available sandboxes": (
        checker.counts_add_up,
        {"stats": {**CORRECT.stats, "available": 3}},
        "the gateway counts 3 available sandboxes; there are 2",
    ),
    "the gateway counts too many sandboxes in total": (
        checker.counts_add_up,
        {"stats": {**CORRECT.stats, "total": 9}},
        "the gateway counts 9 sandboxes in total; there are 8",
    ),
    "a sandbox is available while a student holds it": (
        checker.counts_add_up,
        {"sandboxes": change_item(CORRECT.sandboxes, 2, status="available")},
        "sandbox 3 is available, but there is lease 3",
    ),
    "an allocated sandbox has no lease": (
        checker.counts_add_up,
        {"sandboxes": change_item(CORRECT.sandboxes, 5, status="allocated")},
        "sandbox 6 is allocated, but has no lease",
    ),
    "a released sandbox stays in CSP": (
        checker.released_sandboxes_are_deleted_in_csp,
        {"accounts": {**CORRECT.accounts, "account-1": "sandbox-1"}},
        "CSP still has account account-1",
    ),
    "a released sandbox is not recorded as deleted": (
        checker.released_sandboxes_are_deleted_in_csp,
        {"sandboxes": change_item(CORRECT.sandboxes, 0, status="deletion_failed")},
        "sandbox 1 is deletion_failed after lease 1",
    ),
    "an available sandbox is gone from CSP": (
        checker.released_sandboxes_are_deleted_in_csp,
        {"accounts": remove_account("account-6")},
        "CSP has no account account-6",
    ),
    "a sandbox is deleted during its lease": (
        checker.released_sandboxes_are_deleted_in_csp,
        {"deletions": change_item(CORRECT.deletions, 0, began_at=START + 10)},
        "to delete account account-1 of lease 1",
    ),
    "a sandbox without a lease is deleted": (
        checker.released_sandboxes_are_deleted_in_csp,
        {
            "deletions": append_item(
                CORRECT.deletions, Deletion(external_id="account-6", began_at=START + 9, status=500)
            )
        },
        "to delete account account-6, which has no lease",
    ),
    "an intent is granted above the max": (
        checker.no_stock_exceeds_its_max,
        {"stock_limits": {"lab-": 2}, "creations": append_item(CORRECT.creations, build_creation(11, at=13))},
        "the stock of lab- has a max of 2, but had 3",
    ),
    "an intent has two accounts": (
        checker.one_account_per_intent_or_none,
        {"accounts": {**CORRECT.accounts, "second": "lab-8"}},
        "lab-8 has 2 accounts: account-8 second",
    ),
    "an intent has two accounts, one after the other": (
        checker.one_account_per_intent_or_none,
        {"accounts": {**CORRECT.accounts, "second": "lab-7"}},
        "lab-7 has 2 accounts: account-7 second",
    ),
    "an abandoned intent has an account": (
        checker.one_account_per_intent_or_none,
        {"accounts": {**CORRECT.accounts, "lost": "lab-10"}},
        "lab-10 is abandoned with None, but CSP had lost",
    ),
    "an account of an intent never existed": (
        checker.one_account_per_intent_or_none,
        {"creations": append_item(CORRECT.creations, build_creation(11, at=20, until=21))},
        "lab-11 is created with account-11, but CSP had none",
    ),
    "the pool lacks the account of an intent": (
        checker.one_account_per_intent_or_none,
        {"sandboxes": change_item(CORRECT.sandboxes, 7, status="deleted")},
        "CSP has account account-8 of lab-8, but the pool lacks it",
    ),
    "an intent is never settled": (
        checker.one_account_per_intent_or_none,
        {"creations": change_item(CORRECT.creations, 2, granted_at=START + 9)},
        "lab-9 is in flight since",
    ),
    "students wait too long after a fault": (
        checker.students_are_served_again_in_time,
        {"recoveries": change_item(CORRECT.recoveries, 0, served_at=START + 22.1)},
        "a new student was given a sandbox 10.1 s later",
    ),
    "no student is served after a fault": (
        checker.students_are_served_again_in_time,
        {"recoveries": change_item(CORRECT.recoveries, 0, served_at=None)},
        "no new student was given a sandbox",
    ),
    "a request times out although a standby is ready": (
        checker.requests_are_answered_while_a_standby_is_there,
        {"operations": change_item(CORRECT.operations, 2, outcome="unknown", status=504, ended_at=START + 14)},
        "operation 3, ada's allocate",
    ),
    "a request gets no response although a standby is ready": (
        checker.requests_are_answered_while_a_standby_is_there,
        {
            "operations": change_item(
                CORRECT.operations, 3, outcome="unknown", status=None, code="TimeoutError", ended_at=START + 25
            )
        },
        "operation 4, ada's release of 1",
    ),
    "the broker answers 500": (
        checker.nothing_goes_wrong_that_is_ours,
        {"operations": change_item(CORRECT.operations, 5, status=500, code="INTERNAL_ERROR")},
        "was answered 500 INTERNAL_ERROR",
    ),
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_violation_is_reported(name: str) -> None:
    rule, changes, sentence = VIOLATIONS[name]
    violations = list(rule(replace(CORRECT, **changes)))
    assert any(sentence in violation for violation in violations), violations
    rule_name = rule.__name__.replace("_", " ")
    assert any(violation.startswith(f"{rule_name}: ") for violation in checker.check(replace(CORRECT, **changes)))


def test_short_client_timeout_is_not_an_unanswered_request() -> None:
    operations = change_item(CORRECT.operations, 2, outcome="unknown", status=None, code="TimeoutError")
    assert (
        list(checker.requests_are_answered_while_a_standby_is_there(replace(CORRECT, operations=operations))) == []
    )


DELAYS: dict[str, Changes] = {
    "new student": {"recoveries": change_item(CORRECT.recoveries, 0, served_at=START + 22.5)},
    "pending request": {
        "operations": change_item(CORRECT.operations, 2, outcome="unknown", status=504, ended_at=START + 14)
    },
}
"""Delays that exceed their limit by less than three seconds."""


@pytest.mark.parametrize("delay", DELAYS)
@pytest.mark.parametrize(
    ("stalls", "excused"),
    [
        ([Stall(since=START + 9, until=START + 10.5), Stall(since=START + 12.5, until=START + 13.5)], True),
        ([Stall(since=START + 1, until=START + 8.9), Stall(since=START + 12.4, until=START + 12.6)], False),
        ([Stall(since=START + 22.6, until=START + 29)], False),
    ],
)
def test_delays_are_excused_only_by_stalls_of_the_machine(delay: str, stalls: list[Stall], excused: bool) -> None:
    delayed = replace(CORRECT, **DELAYS[delay], stalls=stalls)
    violations = [
        *checker.students_are_served_again_in_time(delayed),
        *checker.requests_are_answered_while_a_standby_is_there(delayed),
    ]
    assert (violations == []) is excused


def test_every_rule_has_a_violation() -> None:
    assert {rule for rule, _, _ in VIOLATIONS.values()} == set(checker.RULES)
