"""Who gets which sandbox, and that nobody gets two or the same."""

import asyncio
from datetime import timedelta

import asyncpg
import pytest

from allocator.writer import Writer
from sandbox_broker.contract.commands import AllocateSandbox
from sandbox_broker.contract.replies import Reply

from .allocator_harness import Pool, allocate, ask, done, granted, refusal, release


async def test_the_sandbox_that_is_available_longest_is_given_first(pool: Pool) -> None:
    first, second, third = await pool.fill(3)
    await pool.execute("UPDATE sandboxes SET status_since = now() - interval '2 days' WHERE sandbox_id = $1", third)
    writer = await pool.writer()
    given = [granted((await allocate(writer, ask(holder)))[0]).sandbox_id for holder in ("ann", "bob", "cid")]
    assert given == [third, first, second]


async def test_within_a_prefix_too_the_one_that_is_available_longest_is_given_first(pool: Pool) -> None:
    ids = await pool.fill(["gcp-1", "aws-9", "aws-1", "gcp-2", "aws-5"])
    replies = await allocate(await pool.writer(), *(ask(f"student-{number}", "aws-") for number in range(3)))
    assert [granted(reply).sandbox_id for reply in replies] == [ids[1], ids[2], ids[4]]


async def test_a_lease_tells_all_about_the_sandbox_and_lasts_the_lab_in_the_seconds_answered(pool: Pool) -> None:
    (sandbox_id,) = await pool.fill(["sandbox-x"])
    await pool.execute("UPDATE sandboxes SET sfdc_account_id = 'sfdc'")
    before = await pool.value("SELECT floor(extract(epoch FROM now()))::bigint")
    lease = granted((await allocate(await pool.writer(), ask("ann", track="lab")))[0])
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
async def test_a_prefix_is_exact_text_without_wildcards(
    pool: Pool, prefix: str, fits: str, others: list[str]
) -> None:
    await pool.fill([*others, fits])
    writer = await pool.writer()
    first, second = await allocate(writer, ask("ann", prefix), ask("bob", prefix))
    assert granted(first).name == fits
    assert refusal(second) == "POOL_EXHAUSTED"
    assert prefix in second.message  # type: ignore[union-attr]


async def test_prefixes_of_one_batch_never_share_a_sandbox(pool: Pool) -> None:
    await pool.fill([f"aws-{number}" for number in range(4)] + [f"gcp-{number}" for number in range(2)])
    wishes = [None, "a", "aws-", "aws-1", "gcp-", "g"]
    replies = await allocate(await pool.writer(), *(ask(f"student-{wish}", wish) for wish in wishes))
    leases = [granted(reply) for reply in replies]
    assert len({lease.sandbox_id for lease in leases}) == 6
    assert all(lease.name.startswith(wish or "") for lease, wish in zip(leases, wishes, strict=True))
    assert leases[3].name == "aws-1"  # the general wishes have not robbed the specific one
    await pool.sound()


async def test_whoever_asks_again_gets_the_lease_they_have(pool: Pool) -> None:
    await pool.fill(3)
    writer = await pool.writer()
    first = granted((await allocate(writer, ask("ann")))[0])
    for again in (ask("ann"), ask("ann", "no-such-prefix"), ask("ann", key="k"), ask("ann", track="other")):
        (reply,) = await allocate(writer, again)
        assert reply == first.model_copy(update={"new": False})
    assert await pool.events() == ["sandbox.allocated"]


async def test_of_copies_in_one_batch_one_is_new(pool: Pool) -> None:
    await pool.fill(3)
    copies = [ask("ann"), ask("ann"), ask("ann", key="k"), ask("ann", "sandbox")]
    replies = await allocate(await pool.writer(), *copies)
    leases = [granted(reply) for reply in replies]
    assert len({lease.sandbox_id for lease in leases}) == 1
    assert sorted(lease.new for lease in leases) == [False, False, False, True]


async def test_an_empty_pool_says_so_and_announces_it(pool: Pool) -> None:
    await pool.fill(1)
    replies = await allocate(
        await pool.writer(), ask("ann"), ask("bob"), ask("cid"), ask("dan", "aws-"), ask("eve", "aws-")
    )
    assert [reply.type for reply in replies] == ["LeaseGranted"] + 4 * ["Refused"]
    dry = await pool.column("SELECT data->>'name_prefix' FROM outbox WHERE type = 'pool.exhausted'")
    assert sorted(dry, key=str) == [None, "aws-"]


async def test_only_what_is_available_is_given(pool: Pool) -> None:
    for status in ("allocated", "pending_deletion", "deletion_failed", "stale", "deleted"):
        await pool.fill(2, status)
    (reply,) = await allocate(await pool.writer(), ask("ann"))
    assert refusal(reply) == "POOL_EXHAUSTED"


async def test_the_same_key_of_the_same_student_gives_the_same_lease(pool: Pool) -> None:
    await pool.fill(2)
    writer = await pool.writer()
    (first,) = await allocate(writer, ask("ann", key="k"))
    (second,) = await allocate(writer, ask("ann", key="k"))
    assert granted(second).sandbox_id == granted(first).sandbox_id
    assert not granted(second).new


async def test_the_key_of_another_student_is_refused(pool: Pool) -> None:
    await pool.fill(3)
    writer = await pool.writer()
    await allocate(writer, ask("ann", key="k"), ask("bob"))
    replies = await allocate(writer, ask("bob", key="k"), ask("cid", key="k"))
    assert [refusal(reply) for reply in replies] == 2 * ["IDEMPOTENCY_KEY_CONFLICT"]
    assert await pool.value("SELECT count(*) FROM leases") == 2


async def test_of_two_students_with_one_key_in_one_batch_one_gets_a_lease(pool: Pool) -> None:
    await pool.fill(3)
    replies = await allocate(await pool.writer(), ask("ann", key="k"), ask("bob", key="k"))
    assert [reply.type for reply in replies] == ["LeaseGranted", "Refused"]


async def test_the_key_of_a_lease_that_has_ended_gives_no_new_one(pool: Pool) -> None:
    await pool.fill(3)
    writer = await pool.writer()
    lease = granted((await allocate(writer, ask("ann", key="k")))[0])
    await release(writer, done(lease.sandbox_id, "ann"))
    (own,) = await allocate(writer, ask("ann", key="k"))
    (other,) = await allocate(writer, ask("bob", key="k"))
    assert (refusal(own), refusal(other)) == 2 * ("IDEMPOTENCY_KEY_CONFLICT",)
    assert "yours" in own.message  # type: ignore[union-attr]
    fresh = granted((await allocate(writer, ask("ann", key="new")))[0])
    assert fresh.new
    assert fresh.sandbox_id != lease.sandbox_id


@pytest.mark.parametrize("allocators", [2, 8])
async def test_allocators_that_claim_at_the_same_moment_share_out_the_pool(pool: Pool, allocators: int) -> None:
    students, piece = 240, 10
    await pool.fill(students)
    writers = [await pool.writer() for _ in range(allocators)]
    commands = [ask(f"student-{number}") for number in range(students)]
    pieces = [commands[start : start + piece] for start in range(0, students, piece)]

    async def work(number: int) -> list[Reply]:
        return [reply for one in pieces[number::allocators] for reply in await allocate(writers[number], *one)]

    replies = [reply for found in await asyncio.gather(*map(work, range(allocators))) for reply in found]
    assert len({granted(reply).sandbox_id for reply in replies}) == students
    assert all(granted(reply).new for reply in replies)
    await pool.sound()


async def allocate_with_retries(writer: Writer, command: AllocateSandbox) -> tuple[Reply, int]:
    """The reply, and how often another allocator was faster."""
    for raced in range(5):
        try:
            return (await allocate(writer, command))[0], raced
        except asyncpg.UniqueViolationError:
            continue
    raise AssertionError("somebody was faster five times")


async def test_a_student_whom_two_allocators_serve_at_once_gets_one_lease(pool: Pool) -> None:
    one, other = await pool.writer(), await pool.writer()
    races = 0
    for number in range(40):
        await pool.fill(2)
        replies = await asyncio.gather(
            *(allocate_with_retries(writer, ask(f"student-{number}", key=f"{number}")) for writer in (one, other))
        )
        leases = [granted(reply) for reply, _ in replies]
        assert len({lease.sandbox_id for lease in leases}) == 1
        assert [lease.new for lease in leases].count(True) == 1
        races += sum(raced for _, raced in replies)
    await pool.sound()


async def test_the_slower_of_two_allocators_is_told_and_its_second_try_finds_the_lease(pool: Pool) -> None:
    await pool.fill(2)
    slow, fast = await pool.writer(), await pool.writer()
    # The faster one holds its lease back until the slower one waits for it.
    transaction = fast.connection.transaction()
    await transaction.start()
    lease = granted((await allocate(fast, ask("ann")))[0])
    waiting = asyncio.create_task(allocate(slow, ask("ann")))
    await pool.until_waiting(slow)
    await transaction.commit()
    with pytest.raises(asyncpg.UniqueViolationError):
        await waiting
    (reply,) = await allocate(slow, ask("ann"))
    assert reply == lease.model_copy(update={"new": False})
    assert await pool.events() == ["sandbox.allocated"]
    await pool.sound()


async def test_a_statement_that_fails_leaves_nothing_not_even_an_event(pool: Pool) -> None:
    (sandbox_id,) = await pool.fill(1)
    # An anomaly that the unique index catches: it was leased before.
    await pool.execute(
        "INSERT INTO leases (sandbox_id, holder, expires_at, ended_at, end_reason) "
        "VALUES ($1, 'somebody', now(), now(), 'student')",
        sandbox_id,
    )
    before = await pool.state()
    with pytest.raises(asyncpg.UniqueViolationError):
        await allocate(await pool.writer(), ask("ann"))
    assert await pool.state() == before


async def test_a_prefix_gets_the_oldest_of_all_names_that_start_with_it(pool: Pool) -> None:
    ids = await pool.fill(
        ["lab-b-7", "other-1", "lab-a-12", "lab", "LAB-1", "lab-a-2", "lab-b-1", "lac-1", "lab-c"]
    )
    writer = await pool.writer()
    given = [granted(reply).sandbox_id for reply in await allocate(writer, *(ask(f"{n}", "lab") for n in range(5)))]
    assert given == [ids[place] for place in (0, 2, 3, 5, 6)]


async def test_a_prefix_that_ends_within_a_number_gets_the_oldest_of_its_names(pool: Pool) -> None:
    ids = await pool.fill(["lab-2", "lab-12", "lab-1", "lab-100", "lab-1-x", "lab-21"])
    writer = await pool.writer()
    given = [
        granted(reply).sandbox_id for reply in await allocate(writer, *(ask(f"{n}", "lab-1") for n in range(4)))
    ]
    assert given == [ids[place] for place in (1, 2, 3, 4)]
    assert refusal((await allocate(writer, ask("late", "lab-1")))[0]) == "POOL_EXHAUSTED"


async def test_many_prefixes_of_one_batch_each_get_their_own(pool: Pool) -> None:
    names = [f"lab-{letter}-{number}" for number in range(3) for letter in "abcdefgh"]
    await pool.fill(names)
    writer = await pool.writer()
    asked = [ask(f"{letter}{number}", f"lab-{letter}-") for letter in "abcdefgh" for number in range(4)]
    replies = await allocate(writer, *asked)
    for letter in "abcdefgh":
        mine = [
            reply for command, reply in zip(asked, replies, strict=True) if command.name_prefix == f"lab-{letter}-"
        ]
        assert [granted(reply).name for reply in mine[:3]] == [f"lab-{letter}-{number}" for number in range(3)]
        assert refusal(mine[3]) == "POOL_EXHAUSTED"
    await pool.sound()
