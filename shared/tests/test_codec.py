"""Encoding of messages: round trips, and detection of invalid messages."""

import json
import uuid
from datetime import UTC, datetime
from typing import Any, Literal, get_args

import pytest
from asyncpg.pgproto import pgproto
from pydantic import BaseModel, ConfigDict, ValidationError

from sandbox_broker.contract.codec import (
    MAX_ENVELOPE,
    InvalidCommand,
    InvalidEnvelope,
    ReplyEnvelope,
    decode_commands,
    encode_commands,
    encode_replies,
)
from sandbox_broker.contract.commands import (
    AllocateSandbox,
    AnyCommand,
    ApplyListing,
    ApplyPolicies,
    BeginListing,
    ClaimAccess,
    ClaimCreations,
    ClaimDeletions,
    ClaimLease,
    CleanUpNow,
    Command,
    ConfirmRestore,
    DeleteStale,
    DropDeadLetter,
    EndCleanup,
    EndCreations,
    EndLease,
    EndPlay,
    EndTokenLeases,
    ExpireLeases,
    ExtendLease,
    ForgetStudent,
    HurryDeletions,
    IssueToken,
    ListedAccount,
    PurgeAudit,
    PurgePersonalData,
    PurgeRecords,
    RecordAccess,
    RecordAccessFailure,
    RecordAccessRemoval,
    RecordCreation,
    RecordCreationFailure,
    RecordDeletion,
    RecordDeletionFailure,
    RecordJob,
    RecordTokenUses,
    RefreshSandboxes,
    ReleaseSandbox,
    ReplaceSandbox,
    ReplayDeadLetter,
    ResumeStock,
    RetryDeletion,
    RevokeToken,
    RotateAccessKeys,
    ServeWaiting,
    StageListing,
    SuspendToken,
    SyncPool,
)
from sandbox_broker.contract.events import Event, encode_event
from sandbox_broker.contract.policies import Match, Policy, StockRule
from sandbox_broker.contract.replies import (
    AccessClaimed,
    AccessKeysRotated,
    CleanedUp,
    CreationsClaimed,
    DeadLetterReplayed,
    DeletionsClaimed,
    DeletionsHurried,
    DueAccess,
    DueCreation,
    DueDeletion,
    LeaseExtended,
    LeaseGranted,
    LeasesExpired,
    LineServed,
    ListingApplied,
    ListingBegun,
    ListingStaged,
    PlayEnded,
    PoliciesApplied,
    PolicyChange,
    PoolSynced,
    Purged,
    Recorded,
    Refused,
    Reply,
    SandboxesRefreshed,
    SandboxReleased,
    StudentForgotten,
    StudentWaiting,
    TokenLeasesEnded,
    refuse,
)
from sandbox_broker.contract.tokens import Sender, TokenGrant
from sandbox_broker.contract.types import MAX_ID_LENGTH

FULL = ListedAccount(
    sandbox_id="7",
    external_id="u-7",
    name="läb 7",
    sfdc_account_id="s",
    created_at=datetime(2025, 3, 27, tzinfo=UTC),
)
RUN = uuid.UUID(int=8)
COMMANDS: list[Command] = [
    AllocateSandbox(request_id="r", holder="h"),
    AllocateSandbox(request_id="r", holder="h", track_name="t", name_prefix="p%_*", idempotency_key="k"),
    AllocateSandbox(request_id="r", holder="h", wait_sec=900),
    AllocateSandbox(request_id="r", holder="h", mode="standby"),
    ClaimLease(request_id="r", sandbox_id="7", holder="h"),
    ClaimLease(request_id="r", sandbox_id="7", holder="h", new_holder="n"),
    ExtendLease(request_id="r", sandbox_id="7", holder="h", extension_id=RUN, extension_sec=7200),
    ExtendLease(request_id="r", sandbox_id="7", extension_id=RUN, extension_sec=1, note="läb goes on"),
    ReplaceSandbox(request_id="r", sandbox_id="7", holder="h", reason="no DNS"),
    ReplaceSandbox(request_id="r", sandbox_id="7", reason="no DNS"),
    ReleaseSandbox(request_id="r", sandbox_id="7", holder="h"),
    ServeWaiting(),
    EndPlay(request_id="r", holder="h", ended_at=1728060000),
    ExpireLeases(grace_sec=1800, limit=200),
    ClaimDeletions(run_id=RUN, limit=10, claim_sec=120.5),
    HurryDeletions(run_id=RUN, limit=500, claim_sec=120.5),
    EndCleanup(run_id=RUN),
    RecordDeletion(sandbox_id="7"),
    RecordDeletionFailure(run_id=RUN, sandbox_id="7", attempts=1, error="500", retry_in_sec=30.5),
    RecordDeletionFailure(run_id=RUN, sandbox_id="7", attempts=8, error="500", retry_in_sec=None),
    EndLease(request_id="r", sandbox_id="7", note="läb over"),
    RetryDeletion(request_id="r", sandbox_id="7"),
    RetryDeletion(request_id="r", sandbox_id="7", end_hold=True),
    ReplayDeadLetter(request_id="r", dead_letter_id=RUN),
    DropDeadLetter(request_id="r", dead_letter_id=RUN),
    ConfirmRestore(request_id="r"),
    ApplyPolicies(
        request_id="r",
        policies=(
            Policy(name="a", match=Match(track_name="lab"), lease_hours=8, max_active=50),
            Policy(name="b", lease_hours=1.5, stock=StockRule(name_prefix="lab-", min=1, max=2)),
        ),
        dry_run=True,
    ),
    ClaimCreations(run_id=RUN, limit=2, claim_sec=600.5),
    ClaimCreations(run_id=RUN, limit=2, claim_sec=600.5, received=(1, 2)),
    ClaimCreations(run_id=RUN, limit=2, claim_sec=600.5, dry_run=True),
    EndCreations(run_id=RUN),
    RecordCreation(creation_id=3, external_id="u-7"),
    RecordCreationFailure(run_id=RUN, creation_id=3, attempts=1, error="503", retry_in_sec=30.5),
    RecordCreationFailure(run_id=RUN, creation_id=3, attempts=1, error="quota", refused=True, max_failures=3),
    ResumeStock(request_id="r", name_prefix="lab-"),
    IssueToken(
        request_id="r",
        key_id="0123456789abcdef",
        token_hash="ab" * 32,
        pepper_id="01234567",
        grant=TokenGrant(name="lab", role="track", tracks=("lab",), max_active=50, expires_at=1),
        sender=Sender(actor="$BROKER_ADMIN_TOKEN", address="192.0.2.1", reason="läb"),
    ),
    RevokeToken(request_id="r", name="lab"),
    SuspendToken(request_id="r", name="lab", suspended=False),
    EndTokenLeases(request_id="r", name="lab", note="leaked", limit=500),
    RecordTokenUses(uses={"0123456789abcdef": 1728060000}),
    ForgetStudent(request_id="r", student="h"),
    PurgeAudit(for_sec=34560000, limit=500),
    PurgePersonalData(for_sec=34560000, limit=500),
    AllocateSandbox(
        request_id="r",
        holder="h",
        secret_hash="ab" * 32,
        sender=Sender(actor="lab", key_id="0123456789abcdef", address="192.0.2.1"),
    ),
    AllocateSandbox(request_id="r", holder="h", access="user"),
    ClaimAccess(limit=5, max_running=5, claim_sec=90.5, email_domain="labs.example.com", removal_wait_sec=300),
    RecordAccess(sandbox_id="7", claim_id=RUN, user_id="u-1"),
    RecordAccessFailure(sandbox_id="7", claim_id=RUN, error="503", retry_in_sec=5.5, failed=True),
    RecordAccessRemoval(sandbox_id="7", claim_id=RUN),
    RotateAccessKeys(request_id="r", limit=500),
    BeginListing(),
    StageListing(listing_id=3, accounts=(FULL, ListedAccount(sandbox_id="8", external_id="u-8", name="8"))),
    StageListing(listing_id=3, accounts=(), unreadable=("9",)),
    ApplyListing(listing_id=3, total=2, max_stale_fraction=0.25, force=True),
    RefreshSandboxes(listing_id=3, after="7", limit=500),
    DeleteStale(stale_for_sec=86400, limit=500),
    PurgeRecords(status="deleted", for_sec=2592000, limit=500),
    RecordJob(
        job_id=uuid.UUID(int=7),
        kind="sync",
        state="completed",
        progress={"staged": 500},
        result={"synced": 7, "message": "done"},
    ),
    SyncPool(request_id="r", force=True, job_id=uuid.UUID(int=7)),
    CleanUpNow(request_id="r", job_id=uuid.UUID(int=7)),
]
REPLIES: list[Reply] = [
    LineServed(served=2, waiting=5),
    StudentWaiting(position=3, waiting_since=1, estimated_wait_sec=None, retry_after=5),
    refuse("POOL_EXHAUSTED", cause="name_prefix", name_prefix="lab-"),
    LeaseExtended(changed=True, expires_at=2, max_expires_at=3),
    LeaseGranted(
        new=True,
        sandbox_id="7",
        name="n",
        external_id="u",
        sfdc_account_id=None,
        allocated_at=1,
        expires_at=2,
        mode="standby",
        claimed_at=3,
    ),
    LeaseGranted(
        new=True,
        sandbox_id="7",
        name="n",
        external_id="u",
        sfdc_account_id=None,
        allocated_at=1,
        expires_at=2,
    ),
    PlayEnded(outcome="no_lease"),
    PlayEnded(outcome="released", sandbox_id="7"),
    SandboxReleased(sandbox_id="7", status="pending_deletion", deletion_requested_at=1),
    LeasesExpired(sandbox_ids=("7", "8")),
    DeletionsClaimed(deletions=(DueDeletion(sandbox_id="7", external_id="u", name="n", attempts=0, missing=True),)),
    DeletionsClaimed(deletions=(), on_duty=False, next_in_sec=12.5),
    DeletionsHurried(on_duty=True, hurried=3),
    CleanedUp(deleted=3, failed=1, duration_ms=12),
    AccessClaimed(
        logins=(
            DueAccess(
                sandbox_id="7",
                external_id="u",
                claim_id=RUN,
                email="h@labs.example.com",
                groups=("user", "act_admin"),
                password="encrypted",
                attempts=1,
                waiting_sec=12.5,
            ),
        )
    ),
    AccessClaimed(logins=(), next_in_sec=4.5),
    AccessKeysRotated(rotated=3, remaining=1, unreadable=1),
    CreationsClaimed(
        creations=(
            DueCreation(
                creation_id=3,
                name="lab-7",
                name_prefix="lab-",
                admin_user={"email": "lab@example.com", "name": "Lab"},
                attempts=1,
                claimed_before=True,
                request_id="r",
            ),
        )
    ),
    CreationsClaimed(creations=(), on_duty=False, next_in_sec=12.5, awaited=2, awaited_sec=3.5),
    DeadLetterReplayed(dead_letter_id=RUN, queue="allocator.commands", published=True, skipped=1),
    PoliciesApplied(changes=(PolicyChange(name="a", change="changed", fields=("lease_hours",)),)),
    Recorded(changed=False),
    TokenLeasesEnded(sandbox_ids=("7", "8")),
    StudentForgotten(pseudonym="forgotten-1", leases=2),
    SandboxesRefreshed(last="7"),
    SandboxesRefreshed(last=None),
    Purged(count=7),
    ListingBegun(listing_id=3),
    ListingStaged(staged=2),
    ListingApplied(synced=2, discovered=1, restored=0, marked_stale=1),
    PoolSynced(synced=2, marked_stale=1, restored=0, duration_ms=12),
]


def kinds(union: Any) -> set[type]:
    return set(get_args(get_args(union)[0]))


def envelope(*entries: object) -> bytes:
    return json.dumps({"commands": entries}).encode()


def test_the_samples_cover_all_messages() -> None:
    assert {type(command) for command in COMMANDS} == kinds(AnyCommand)
    assert {type(reply) for reply in REPLIES} == kinds(Reply)


@pytest.mark.parametrize("command", COMMANDS, ids=repr)
def test_a_command_arrives_as_it_was_sent(command: Command) -> None:
    assert decode_commands(encode_commands([command])) == [command]


@pytest.mark.parametrize("reply", REPLIES, ids=repr)
def test_a_reply_arrives_as_it_was_sent(reply: Reply) -> None:
    body = encode_replies([reply])
    assert ReplyEnvelope.model_validate_json(body).replies == (reply,)
    assert json.loads(body) == json.loads(ReplyEnvelope(replies=(reply,)).model_dump_json())


def test_an_id_of_asyncpg_is_encoded() -> None:
    number = pgproto.UUID(str(RUN))
    assert decode_commands(encode_commands([CleanUpNow(request_id="r", job_id=number)])) == [
        CleanUpNow(request_id="r", job_id=RUN)
    ]
    reply = DeadLetterReplayed(dead_letter_id=number, queue="q", published=True, skipped=0)
    assert ReplyEnvelope.model_validate_json(encode_replies([reply])).replies == (reply,)


def test_commands_keep_their_order() -> None:
    assert decode_commands(encode_commands(COMMANDS)) == COMMANDS


@pytest.mark.parametrize("message", [*COMMANDS, *REPLIES, FULL], ids=repr)
def test_messages_are_frozen(message: BaseModel) -> None:
    field = next(iter(type(message).model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(message, field, getattr(message, field))


@pytest.mark.parametrize("command", COMMANDS, ids=repr)
def test_a_command_of_an_unknown_version_is_refused(command: Command) -> None:
    (refused,) = decode_commands(envelope({**command.model_dump(mode="json"), "version": 2}))
    assert isinstance(refused, InvalidCommand)
    assert "version" in str(refused)


def test_a_reply_of_an_unknown_version_is_refused() -> None:
    body = json.dumps({"replies": [{**REPLIES[0].model_dump(), "version": 2}]})
    with pytest.raises(ValidationError, match="version"):
        ReplyEnvelope.model_validate_json(body)


def test_unknown_fields_are_ignored() -> None:
    command = {"type": "RecordDeletion", "sandbox_id": "7", "mood": "good"}
    assert decode_commands(json.dumps({"commands": [command], "trace": 1}).encode()) == [
        RecordDeletion(sandbox_id="7")
    ]


@pytest.mark.parametrize(
    "poison",
    [
        None,
        7,
        "text",
        [],
        {},
        {"type": "DropTable"},
        {"type": "RecordDeletion"},
        {"type": "RecordDeletion", "sandbox_id": ""},
        {"type": "ExpireLeases", "grace_sec": -1, "limit": 1},
        {"type": "LeaseGranted"},
    ],
    ids=repr,
)
def test_an_invalid_entry_does_not_affect_the_other_entries(poison: object) -> None:
    good = {"type": "RecordDeletion", "sandbox_id": "7"}
    before, refused, after = decode_commands(envelope(good, poison, good))
    assert before == after == RecordDeletion(sandbox_id="7")
    assert isinstance(refused, InvalidCommand)
    assert refused.raw == poison
    assert str(refused)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nonsense",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"{}",
        b'{"commands": {}}',
        b'{"commands": []}',
        b'{"commands": ' + b"[" * 100_000,
    ],
    ids=lambda body: body[:20],
)
def test_a_body_without_an_envelope_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidEnvelope):
        decode_commands(body)


def test_an_envelope_has_a_maximum_number_of_commands() -> None:
    full = [BeginListing()] * MAX_ENVELOPE
    assert decode_commands(encode_commands(full)) == full
    with pytest.raises(ValueError, match="201 commands"):
        encode_commands([*full, BeginListing()])
    with pytest.raises(ValueError, match="0 commands"):
        encode_commands([])
    with pytest.raises(InvalidEnvelope):
        decode_commands(envelope(*[{"type": "BeginListing"}] * (MAX_ENVELOPE + 1)))


@pytest.mark.parametrize("text", ["a\0", "\0", "a\n", "a\nb", "\ta", "a\x7f", "é", "", "x" * (MAX_ID_LENGTH + 1)])
def test_ids_are_short_printable_ascii(text: str) -> None:
    for refused in (
        lambda: AllocateSandbox(request_id="r", holder=text),
        lambda: AllocateSandbox(request_id="r", holder="h", idempotency_key=text),
        lambda: AllocateSandbox(request_id="r", holder="h", name_prefix=text),
        lambda: AllocateSandbox(request_id="r", holder="h", track_name=text),
        lambda: RecordDeletion(sandbox_id=text),
        lambda: ListedAccount(sandbox_id=text, external_id="u", name="n"),
        lambda: ListedAccount(sandbox_id="7", external_id=text, name="n"),
    ):
        with pytest.raises(ValidationError):
            refused()


def test_text_that_postgresql_cannot_store_is_refused() -> None:
    with pytest.raises(ValidationError):
        ListedAccount(sandbox_id="7", external_id="u", name="a\0b")
    with pytest.raises(ValidationError):
        ListedAccount(sandbox_id="7", external_id="u", name="n", sfdc_account_id="a\0b")
    with pytest.raises(ValidationError):
        RecordDeletionFailure(run_id=RUN, sandbox_id="7", attempts=1, error="a\0b")
    assert ListedAccount(sandbox_id="7", external_id="u", name="läb\n7").name == "läb\n7"


def test_an_event_has_the_format_of_cloudevents() -> None:
    event = Event.model_validate(
        {
            "id": "b6d1a9a0-27a4-4a24-93d5-6c3d5e4f1a11",
            "type": "sandbox.deleted",
            "subject": "7",
            "time": "2025-03-27T16:53:47Z",
            "data": {"sandbox_id": "7", "reason": None},
        }
    )
    written = json.loads(event.model_dump_json(exclude_none=True))
    assert written["specversion"] == "1.0"
    assert written["source"].startswith("/sandbox-broker/")
    assert written["data"] == {"sandbox_id": "7", "reason": None}
    assert Event.model_validate(written) == event


def test_encode_event_writes_the_same_json_as_the_model() -> None:
    moment = datetime(2025, 3, 27, 16, 53, 47, 605459, tzinfo=UTC)
    for subject, resume_after in (('7"\\', None), (None, 12)):
        event_id, data = "b6d1a9a0-27a4-4a24-93d5-6c3d5e4f1a11", '{"name": "läb", "n": null}'
        body = encode_event(
            event_id, "sandbox.deleted", subject, moment, data, sequence=17, resume_after=resume_after
        )
        event = Event.model_validate_json(body)
        assert (event.subject, event.time, event.sequence) == (subject, moment, "17")
        assert event.resumeafter == (resume_after and str(resume_after))
        assert event.data == {"name": "läb", "n": None}
        assert json.loads(body) == json.loads(event.model_dump_json(exclude_none=True)) | {
            "time": "2025-03-27T16:53:47.605459+00:00"
        }


class PreviousRefused(BaseModel):
    """Refused of the previous version, which runs beside this one during a rolling upgrade."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    type: Literal["Refused"] = "Refused"
    version: Literal[1] = 1
    code: str
    message: str


def test_the_previous_version_reads_a_refusal_with_its_facts() -> None:
    refusal = refuse("POOL_EXHAUSTED", cause="name_prefix", name_prefix="lab-")
    (raw,) = json.loads(encode_replies([refusal]))["replies"]
    read = PreviousRefused.model_validate(raw)
    assert (read.code, read.message) == ("POOL_EXHAUSTED", "POOL_EXHAUSTED (cause: name_prefix, name_prefix: lab-)")
    assert PreviousRefused.model_validate(refuse("POOL_EXHAUSTED").model_dump()).message == "POOL_EXHAUSTED"


def test_a_refusal_of_the_previous_version_has_no_parameters() -> None:
    raw = PreviousRefused(code="POOL_EXHAUSTED", message="No available sandboxes in pool").model_dump()
    assert Refused.model_validate(raw).parameters is None
    assert Refused.model_validate(raw).to_job_result() == {
        "code": "POOL_EXHAUSTED",
        "message": "No available sandboxes in pool",
    }
