"""Allocation: the choice of the sandbox, idempotency, and concurrency."""

import asyncio
import json
from datetime import timedelta

import asyncpg
import pytest

from allocator.write_session import WriteSession
from sandbox_broker.contract.commands import AllocateSandbox
from sandbox_broker.contract.policies import Match, Policy
from sandbox_broker.contract.replies import Reply, refuse

from .allocator_harness import (
    Pool,
    allocate,
    allocate_command,
    granted_lease,
    refusal_code,
    release,
    release_command,
)


async def test_the_longest_available_sandbox_is_allocated_first(pool: Pool) -> None:
    first, second, third = await pool.fill(3)
    await pool.execute("UPDATE sandboxes SET status_since = now() - interval '2 days' WHERE sandbox_id = $1", third)
    session = await pool.write_session()
    sandbox_ids = [
        granted_lease((await allocate(session, allocate_command(holder)))[0]).sandbox_id
        for holder in ("ann", "bob", "cid")
    ]
    assert sandbox_ids == [third, first, second]


async def test_the_longest_available_sandbox_of_a_prefix_is_allocated_first(pool: Pool) -> None:
    ids = await pool.fill(["gcp-1", "aws-9", "aws-1", "gcp-2", "aws-5"])
    replies = await allocate(
        await pool.write_session(), *(allocate_command(f"student-{number}", "aws-") for number in range(3))
    )
    assert [granted_lease(reply).sandbox_id for reply in replies] == [ids[1], ids[2], ids[4]]


async def test_a_lease_describes_the_sandbox_and_lasts_for_the_lab_duration(pool: Pool) -> None:
    (sandbox_id,) = await pool.fill(["sandbox-x"])
    await pool.execute("UPDATE sandboxes SET sfdc_account_id = 'sfdc'")
    before = await pool.value("SELECT floor(extract(epoch FROM now()))::bigint")
    lease = granted_lease((await allocate(await pool.write_session(), allocate_command("ann", track="lab")))[0])
    assert (lease.new, lease.sandbox_id, lease.name) == (True, sandbox_id, "sandbox-x")
    assert (lease.external_id, lease.sfdc_account_id) == (f"account-{sandbox_id}", "sfdc")
    assert before <= lease.allocated_at <= before + 5
    assert lease.expires_at == lease.allocated_at + timedelta(hours=4).total_seconds()
    assert await pool.value("SELECT track_name FROM leases") == "lab"
    assert await pool.status(sandbox_id) == "allocated"
    assert await pool.events(sandbox_id) == ["sandbox.allocated"]


@pytest.mark.parametrize(
    ("prefix", "fits", "others"),
    [
        ("Lab-", "Lab-1", ["lab-1", "LAB-1", "xLab-1", "Lab"]),
        ("100%", "100%-1", ["100", "1000", "100x%"]),
        ("a_b", "a_b", ["axb", "a-b", "a"]),
        ("*", "*-1", ["a", "-1"]),
        ("a\\", "a\\b", ["a", "ab", "a/"]),
        ("a~", "a~é", ["a", "a}", "b", "aé"]),
        ("lab", "lab\U0001f600", ["la\U0001f600", "lac", "éab", "あ"]),
    ],
)
async def test_a_prefix_is_matched_exactly_without_wildcards(
    pool: Pool, prefix: str, fits: str, others: list[str]
) -> None:
    await pool.fill([*others, fits])
    session = await pool.write_session()
    first, second = await allocate(session, allocate_command("ann", prefix), allocate_command("bob", prefix))
    assert granted_lease(first).name == fits
    assert second == refuse("POOL_EXHAUSTED", cause="name_prefix", name_prefix=prefix)


async def test_nested_prefixes_in_a_batch_never_share_a_sandbox(pool: Pool) -> None:
    await pool.fill([f"aws-{number}" for number in range(4)] + [f"gcp-{number}" for number in range(2)])
    prefixes = [None, "a", "aws-", "aws-1", "gcp-", "g"]
    replies = await allocate(
        await pool.write_session(), *(allocate_command(f"student-{prefix}", prefix) for prefix in prefixes)
    )
    leases = [granted_lease(reply) for reply in replies]
    assert len({lease.sandbox_id for lease in leases}) == 6
    assert all(lease.name.startswith(prefix or "") for lease, prefix in zip(leases, prefixes, strict=True))
    assert leases[3].name == "aws-1"  # the general prefixes did not take it
    await pool.assert_sound()


async def test_a_repeated_request_returns_the_existing_lease(pool: Pool) -> None:
    await pool.fill(3)
    session = await pool.write_session()
    first = granted_lease((await allocate(session, allocate_command("ann")))[0])
    for repeated in (
        allocate_command("ann"),
        allocate_command("ann", "no-such-prefix"),
        allocate_command("ann", key="k"),
        allocate_command("ann", track="other"),
    ):
        (reply,) = await allocate(session, repeated)
        assert reply == first.model_copy(update={"new": False})
    assert await pool.events() == ["sandbox.allocated"]


async def test_duplicates_in_a_batch_share_one_new_lease(pool: Pool) -> None:
    await pool.fill(3)
    copies = [
        allocate_command("ann"),
        allocate_command("ann"),
        allocate_command("ann", key="k"),
        allocate_command("ann", "sandbox"),
    ]
    replies = await allocate(await pool.write_session(), *copies)
    leases = [granted_lease(reply) for reply in replies]
    assert len({lease.sandbox_id for lease in leases}) == 1
    assert sorted(lease.new for lease in leases) == [False, False, False, True]


TERMS = ("policy", "lease_sec", "max_extension_sec", "standby_sec", "max_replacements")


async def terms_of(pool: Pool, holder: str) -> tuple[object, ...]:
    (row,) = await pool.rows(f"SELECT {', '.join(TERMS)} FROM leases WHERE holder = $1", holder)
    return tuple(row)


async def test_a_lease_keeps_the_defaults_that_it_was_granted_under(pool: Pool) -> None:
    await pool.fill(1)
    await allocate(await pool.write_session(), allocate_command("ann"))
    assert await terms_of(pool, "ann") == (None, 4 * 3600, 4 * 3600, 24 * 3600, 1)


async def test_each_request_of_a_batch_gets_the_terms_of_its_policy(pool: Pool) -> None:
    await pool.fill(3)
    await pool.apply_policies(
        Policy(name="long", match=Match(track_name="long-lab"), lease_hours=8, max_extension_hours=0),
        Policy(
            name="short", match=Match(track_prefix="short-"), lease_hours=0.5, standby_hours=1, max_replacements=3
        ),
    )
    leases = await allocate(
        await pool.write_session(),
        allocate_command("ann", track="long-lab"),
        allocate_command("bob", track="short-lab"),
        allocate_command("cid", track="other-lab"),
    )
    assert await terms_of(pool, "ann") == ("long", 8 * 3600, 0, 24 * 3600, 1)
    assert await terms_of(pool, "bob") == ("short", 1800, 4 * 3600, 3600, 3)
    assert await terms_of(pool, "cid") == (None, 4 * 3600, 4 * 3600, 24 * 3600, 1)
    durations = [lease.expires_at - lease.allocated_at for lease in map(granted_lease, leases)]
    assert durations == [8 * 3600, 1800, 4 * 3600]
    payloads = [json.loads(data) for data in await pool.column("SELECT data FROM outbox ORDER BY outbox_id")]
    assert sorted((payload["holder"], payload["policy"]) for payload in payloads) == [
        ("ann", "long"),
        ("bob", "short"),
        ("cid", None),
    ]


async def test_an_allocation_uses_the_policies_applied_last(pool: Pool) -> None:
    await pool.fill(4)
    session = await pool.write_session()
    await allocate(session, allocate_command("ann"))
    await pool.apply_policies(Policy(name="lab", lease_hours=8))
    await allocate(session, allocate_command("bob"))
    await pool.apply_policies()
    await allocate(session, allocate_command("cid"))
    assert [(await terms_of(pool, holder))[0] for holder in ("ann", "bob", "cid")] == [None, "lab", None]
    assert await pool.events() == ["sandbox.allocated"] * 3


async def test_a_new_connection_forgets_the_policies(pool: Pool) -> None:
    await pool.fill(2)
    await pool.apply_policies(Policy(name="lab", lease_hours=8))
    session = await pool.write_session()
    await allocate(session, allocate_command("ann"))
    # As in a restored database: another content under the same version.
    await pool.execute("UPDATE policies SET document = jsonb_build_object('name', 'lab', 'lease_hours', 2)")
    session.close()
    await session.connect()
    await allocate(session, allocate_command("bob"))
    assert (await terms_of(pool, "bob"))[1] == 2 * 3600


async def test_an_empty_pool_refuses_and_announces_it(pool: Pool) -> None:
    await pool.fill(1)
    replies = await allocate(
        await pool.write_session(),
        allocate_command("ann"),
        allocate_command("bob"),
        allocate_command("cid"),
        allocate_command("dan", "aws-"),
        allocate_command("eve", "aws-"),
    )
    assert [reply.type for reply in replies] == ["LeaseGranted"] + 4 * ["Refused"]
    prefixes = await pool.column("SELECT data->>'name_prefix' FROM outbox WHERE type = 'pool.exhausted'")
    assert sorted(prefixes, key=str) == [None, "aws-"]


async def test_only_available_sandboxes_are_allocated(pool: Pool) -> None:
    for status in ("allocated", "pending_deletion", "deletion_failed", "stale", "deleted"):
        await pool.fill(2, status)
    (reply,) = await allocate(await pool.write_session(), allocate_command("ann"))
    assert refusal_code(reply) == "POOL_EXHAUSTED"


async def test_a_repeated_idempotency_key_returns_the_same_lease(pool: Pool) -> None:
    await pool.fill(2)
    session = await pool.write_session()
    (first,) = await allocate(session, allocate_command("ann", key="k"))
    (second,) = await allocate(session, allocate_command("ann", key="k"))
    assert granted_lease(second).sandbox_id == granted_lease(first).sandbox_id
    assert not granted_lease(second).new


async def test_the_idempotency_key_of_another_student_is_refused(pool: Pool) -> None:
    await pool.fill(3)
    session = await pool.write_session()
    await allocate(session, allocate_command("ann", key="k"), allocate_command("bob"))
    replies = await allocate(session, allocate_command("bob", key="k"), allocate_command("cid", key="k"))
    assert [refusal_code(reply) for reply in replies] == 2 * ["IDEMPOTENCY_KEY_CONFLICT"]
    assert await pool.value("SELECT count(*) FROM leases") == 2


async def test_two_students_with_one_key_in_a_batch_get_one_lease(pool: Pool) -> None:
    await pool.fill(3)
    replies = await allocate(
        await pool.write_session(), allocate_command("ann", key="k"), allocate_command("bob", key="k")
    )
    assert [reply.type for reply in replies] == ["LeaseGranted", "Refused"]


async def test_the_key_of_an_ended_lease_is_refused(pool: Pool) -> None:
    await pool.fill(3)
    session = await pool.write_session()
    lease = granted_lease((await allocate(session, allocate_command("ann", key="k")))[0])
    await release(session, release_command(lease.sandbox_id, "ann"))
    (own,) = await allocate(session, allocate_command("ann", key="k"))
    (other,) = await allocate(session, allocate_command("bob", key="k"))
    assert own == refuse("IDEMPOTENCY_KEY_CONFLICT", cause="own_ended_lease")
    assert other == refuse("IDEMPOTENCY_KEY_CONFLICT", cause="other_student")
    fresh = granted_lease((await allocate(session, allocate_command("ann", key="new")))[0])
    assert fresh.new
    assert fresh.sandbox_id != lease.sandbox_id


@pytest.mark.parametrize("allocators", [2, 8])
async def test_concurrent_allocators_allocate_each_sandbox_once(pool: Pool, allocators: int) -> None:
    students, batch_size = 240, 10
    await pool.fill(students)
    sessions = [await pool.write_session() for _ in range(allocators)]
    commands = [allocate_command(f"student-{number}") for number in range(students)]
    batches = [commands[start : start + batch_size] for start in range(0, students, batch_size)]

    async def work(number: int) -> list[Reply]:
        return [
            reply for batch in batches[number::allocators] for reply in await allocate(sessions[number], *batch)
        ]

    replies = [reply for part in await asyncio.gather(*map(work, range(allocators))) for reply in part]
    assert len({granted_lease(reply).sandbox_id for reply in replies}) == students
    assert all(granted_lease(reply).new for reply in replies)
    await pool.assert_sound()


async def allocate_with_retries(session: WriteSession, command: AllocateSandbox) -> tuple[Reply, int]:
    """Return the reply and the number of lost races."""
    for raced in range(5):
        try:
            return (await allocate(session, command))[0], raced
        except asyncpg.UniqueViolationError:
            continue
    raise AssertionError("lost five races")


async def test_concurrent_allocators_grant_one_lease_per_student(pool: Pool) -> None:
    one, other = await pool.write_session(), await pool.write_session()
    races = 0
    for number in range(40):
        await pool.fill(2)
        replies = await asyncio.gather(
            *(
                allocate_with_retries(session, allocate_command(f"student-{number}", key=f"{number}"))
                for session in (one, other)
            )
        )
        leases = [granted_lease(reply) for reply, _ in replies]
        assert len({lease.sandbox_id for lease in leases}) == 1
        assert [lease.new for lease in leases].count(True) == 1
        races += sum(raced for _, raced in replies)
    await pool.assert_sound()


async def test_the_slower_allocator_gets_an_error_and_finds_the_lease_on_retry(pool: Pool) -> None:
    await pool.fill(2)
    slow, fast = await pool.write_session(), await pool.write_session()
    # The faster allocator commits only when the slower one waits for its row.
    transaction = fast.connection.transaction()
    await transaction.start()
    lease = granted_lease((await allocate(fast, allocate_command("ann")))[0])
    waiting = asyncio.create_task(allocate(slow, allocate_command("ann")))
    await pool.until_waiting(slow)
    await transaction.commit()
    with pytest.raises(asyncpg.UniqueViolationError):
        await waiting
    (reply,) = await allocate(slow, allocate_command("ann"))
    assert reply == lease.model_copy(update={"new": False})
    assert await pool.events() == ["sandbox.allocated"]
    await pool.assert_sound()


async def test_a_failed_statement_writes_no_row_and_no_event(pool: Pool) -> None:
    (sandbox_id,) = await pool.fill(1)
    # An inconsistency that the unique index catches: the available sandbox was leased before.
    await pool.execute(
        "INSERT INTO leases (sandbox_id, holder, expires_at, ended_at, end_reason) "
        "VALUES ($1, 'other', now(), now(), 'student')",
        sandbox_id,
    )
    before = await pool.state()
    with pytest.raises(asyncpg.UniqueViolationError):
        await allocate(await pool.write_session(), allocate_command("ann"))
    assert await pool.state() == before


async def test_a_prefix_gets_the_longest_available_of_all_matching_names(pool: Pool) -> None:
    ids = await pool.fill(
        ["lab-b-7", "other-1", "lab-a-12", "lab", "LAB-1", "lab-a-2", "lab-b-1", "lac-1", "lab-c"]
    )
    session = await pool.write_session()
    sandbox_ids = [
        granted_lease(reply).sandbox_id
        for reply in await allocate(session, *(allocate_command(f"{n}", "lab") for n in range(5)))
    ]
    assert sandbox_ids == [ids[index] for index in (0, 2, 3, 5, 6)]


async def test_a_prefix_that_splits_a_number_gets_the_longest_available(pool: Pool) -> None:
    ids = await pool.fill(["lab-2", "lab-12", "lab-1", "lab-100", "lab-1-x", "lab-21"])
    session = await pool.write_session()
    sandbox_ids = [
        granted_lease(reply).sandbox_id
        for reply in await allocate(session, *(allocate_command(f"{n}", "lab-1") for n in range(4)))
    ]
    assert sandbox_ids == [ids[index] for index in (1, 2, 3, 4)]
    assert refusal_code((await allocate(session, allocate_command("late", "lab-1")))[0]) == "POOL_EXHAUSTED"


async def test_many_prefixes_in_a_batch_get_their_own_sandboxes(pool: Pool) -> None:
    names = [f"lab-{letter}-{number}" for number in range(3) for letter in "abcdefgh"]
    await pool.fill(names)
    session = await pool.write_session()
    commands = [
        allocate_command(f"{letter}{number}", f"lab-{letter}-") for letter in "abcdefgh" for number in range(4)
    ]
    replies = await allocate(session, *commands)
    for letter in "abcdefgh":
        mine = [
            reply
            for command, reply in zip(commands, replies, strict=True)
            if command.name_prefix == f"lab-{letter}-"
        ]
        assert [granted_lease(reply).name for reply in mine[:3]] == [
            f"lab-{letter}-{number}" for number in range(3)
        ]
        assert refusal_code(mine[3]) == "POOL_EXHAUSTED"
    await pool.assert_sound()
