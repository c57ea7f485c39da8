"""brokerctl against the running broker: what it shows, what it does, and what it tells scripts."""

import asyncio
import json
import signal
import uuid

import aio_pika
import pytest

from devstack.ports import free_port
from sandbox_broker.contract import topology
from tests.integration.ctl import ctl, eventually_said, start
from tests.integration.stack import ADMIN_TOKEN, TRACK_TOKEN, Stack, eventually


async def test_status_is_one_screen_and_0_when_all_is_well(stack: Stack) -> None:
    await stack.allocate("ada")
    said = await eventually_said(stack, lambda said: said.status == 0)
    assert "Nothing needs attention." in said.out
    assert "49 available, 1 allocated" in said.out
    for part in ("gateway", "RabbitMQ", "PostgreSQL", "allocator", "reaper", "csp-syncer"):
        assert f"{part} up" in said.out
    for queue in topology.QUEUES:
        assert queue.name in said.out
    assert len(said.out.splitlines()) <= 24

    found = (await eventually_said(stack, lambda said: said.status == 0, "--json")).json
    assert (found["pool"]["available"], found["gateway"]["state"], found["attention"]) == (49, "up", [])


async def test_status_says_what_needs_attention_and_what_to_do(stack: Stack) -> None:
    await stack.fill(1)
    await stack.allocate("ada")
    said = await eventually_said(stack, lambda said: "No sandbox is available" in said.out)
    assert said.status == 4
    assert "brokerctl sync" in said.out


async def test_watch_looks_again_and_again_until_it_is_interrupted(stack: Stack) -> None:
    watching = await start(stack.url, "watch", "--json", "--every", "0.1", "--within", "60")
    assert watching.stdout is not None
    for allocated in range(3):
        while (json.loads(await watching.stdout.readline())["pool"] or {}).get("allocated") != allocated:
            pass
        await stack.allocate(f"student-{allocated}")
    watching.send_signal(signal.SIGINT)
    await watching.communicate()
    assert watching.returncode == 0


async def test_watch_writes_a_line_for_each_look_where_nobody_watches(stack: Stack) -> None:
    watching = await start(stack.url, "watch", "--every", "0.1", "--within", "60", COLUMNS="20")
    assert watching.stdout is not None
    for allocated in range(3):
        while f" {allocated} allocated," not in (line := (await watching.stdout.readline()).decode()):
            assert line
        await stack.allocate(f"student-{allocated}")
    watching.send_signal(signal.SIGINT)
    await watching.communicate()
    assert watching.returncode == 0


async def test_the_pool_is_counted_and_listed(stack: Stack) -> None:
    lease = (await stack.allocate("ada", X_Instruqt_Track_ID="dns-101")).json()
    assert (await ctl(stack, "pool", "--json")).json["available"] == 49
    by_track = (await ctl(stack, "pool", "--by", "track_name", "--json")).json
    assert [(group["value"], group["allocated"]) for group in by_track["groups"]] == [("dns-101", 1)]
    assert "dns-101" in (await ctl(stack, "pool", "--by", "track_name")).out
    listed = (await ctl(stack, "pool", "--status", "allocated", "--json")).json
    assert [entry["sandbox_id"] for entry in listed] == [lease["sandbox_id"]]
    assert len((await ctl(stack, "pool", "--prefix", "sandbox-", "--limit", "7", "--json")).json) == 7
    assert lease["name"] in (await ctl(stack, "pool", "--track", "dns-101")).out


async def test_a_sandbox_has_a_story_and_a_student_a_list_of_sandboxes(stack: Stack) -> None:
    lease = (await stack.allocate("ada")).json()
    said = await ctl(stack, "release", lease["sandbox_id"], "--reason", "class ended", "--json")
    assert (said.status, said.json["status"]) == (0, "pending_deletion")
    await eventually(stack.nothing_pending)

    story = (await ctl(stack, "sandbox", lease["sandbox_id"], "--json")).json
    assert [step["status"] for step in story["history"]] == [
        "available",
        "allocated",
        "pending_deletion",
        "deleted",
    ]
    shown = (await ctl(stack, "sandbox", lease["sandbox_id"])).out
    assert "sandbox.deletion_requested" in shown
    assert "class ended" in shown

    (had,) = (await ctl(stack, "who", "ada", "--json")).json
    assert (had["sandbox_id"], had["end_note"]) == (lease["sandbox_id"], "class ended")
    assert lease["sandbox_id"] in (await ctl(stack, "who", "ada")).out
    assert "never had a sandbox" in (await ctl(stack, "who", "nobody")).out


async def test_a_deletion_that_has_failed_for_good_is_tried_anew(stack: Stack) -> None:
    await stack.database.execute(
        "UPDATE sandboxes SET status = 'deletion_failed', status_since = now(), deletion_attempts = 8, "
        "deletion_requested_at = now(), deletion_error = 'CSP answered 500' "
        "WHERE sandbox_id = (SELECT min(sandbox_id) FROM sandboxes)"
    )
    await eventually_said(stack, lambda said: "deletion_failed" in said.out)
    (failed,) = (await ctl(stack, "pool", "--status", "deletion_failed", "--json")).json
    said = await ctl(stack, "retry", failed["sandbox_id"])
    assert said.status == 0
    assert "is pending_deletion" in said.out
    assert (await ctl(stack, "cleanup")).status == 0
    assert (await stack.stats())["deleted"] == 1
    said = await ctl(stack, "retry", failed["sandbox_id"], "--json")
    assert (said.status, said.error["code"]) == (1, "NOT_DELETION_FAILED")


async def test_a_sync_tells_what_it_did_and_shows_a_held_listing_before_it_is_forced(stack: Stack) -> None:
    assert (await ctl(stack, "sync", "--json")).json["synced"] == 50
    await stack.control("PATCH", "behaviour", {"listing_fraction": 0.5})
    said = await ctl(stack, "sync")
    assert said.status == 1
    assert "sandboxes would be" in said.out
    assert "brokerctl sync --force" in said.err
    assert (await ctl(stack, "sync", "--json")).error["code"] == "SYNC_HELD"
    said = await ctl(stack, "sync", "--show", "--json")
    assert said.status == 4
    assert said.json["held"]["stale"]["count"] > 20
    await eventually_said(stack, lambda said: "listing is held" in said.out)

    refused = await ctl(stack, "sync", "--force")
    assert refused.status == 2
    assert "--yes" in refused.err
    assert (await stack.stats())["stale"] == 0
    assert (await ctl(stack, "sync", "--force", "--yes")).status == 0
    assert (await stack.stats())["stale"] > 20
    assert (await ctl(stack, "sync", "--show")).status == 0


async def test_csp_that_does_not_answer_makes_a_sync_something_to_repeat(stack: Stack) -> None:
    await stack.control("PATCH", "behaviour", {"fail_next_listings": 1})
    said = await ctl(stack, "sync", "--json")
    assert (said.status, said.error["code"]) == (3, "CSP_UNAVAILABLE")


async def test_a_clean_up_that_takes_long_is_followed_to_its_end(stack: Stack) -> None:
    port = free_port()
    gateway = await stack.start_service(
        "gateway", name="hasty gateway", settings={"GATEWAY_PORT": str(port), "ADMIN_WAIT_SEC": "1"}
    )
    try:
        await stack.control("PATCH", "behaviour", {"delete_latency_sec": 1})
        leases = [(await stack.allocate(f"student-{number}")).json() for number in range(6)]
        await asyncio.gather(*(stack.release(lease["sandbox_id"], lease_of) for lease, lease_of in _held(leases)))
        said = await ctl(stack, "cleanup", "--json", url=f"http://127.0.0.1:{port}")
        assert said.status == 0, said
        assert said.json["status"] == "completed"
        assert (await stack.stats())["deleted"] == 6
    finally:
        await gateway.stop()


def _held(leases: list[dict[str, str]]) -> list[tuple[dict[str, str], str]]:
    return [(lease, f"student-{number}") for number, lease in enumerate(leases)]


# Dead letters


async def put(stack: Stack, queue: topology.Queue, body: bytes, count: int = 1) -> None:
    connection = await aio_pika.connect(stack.environment["AMQP_URL"])
    async with connection, connection.channel() as channel:
        for number in range(count):
            message = aio_pika.Message(body, correlation_id=f"correlation-{number}")
            await channel.default_exchange.publish(message, queue.name)


async def dead(stack: Stack, count: int) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []

    async def there() -> bool:
        nonlocal found
        found = (await ctl(stack, "dlq", "list", "--json")).json
        return len(found) == count

    await eventually(there)
    return found


async def test_dead_letters_are_listed_shown_and_dropped(stack: Stack) -> None:
    assert "no dead letters" in (await ctl(stack, "dlq", "list")).out
    poisonous = (topology.ALLOCATOR_COMMANDS, topology.ALLOCATOR_MAINTENANCE, topology.SYNCER_COMMANDS)
    for queue in (*poisonous, topology.REAPER_COMMANDS):
        await put(stack, queue, b"nonsense \x1b[2J")
        await put(stack, queue, b'{"commands": [{"type": "Unheard"}]}')
    found = await dead(stack, 8)
    assert {(letter["service"], letter["queue"]) for letter in found} == {
        ("allocator", "allocator.commands"),
        ("allocator", "allocator.maintenance"),
        ("csp-syncer", "csp-syncer.commands"),
        ("reaper", "reaper.commands"),
    }
    await eventually_said(stack, lambda said: "8 messages could not be processed" in said.out)
    assert (await stack.allocate("ada")).status_code == 201  # it blocks nobody

    unreadable = next(letter for letter in found if not letter["commands"])
    shown = await ctl(stack, "dlq", "show", unreadable["dead_letter_id"])
    assert "nonsense" in shown.out
    assert "\x1b" not in shown.out  # what others wrote does not command the terminal
    assert "no envelope" in shown.out
    unheard = next(letter for letter in found if letter["commands"])
    letter = (await ctl(stack, "dlq", "show", unheard["dead_letter_id"], "--json")).json
    assert json.loads(letter["payload"]) == {"commands": [{"type": "Unheard"}]}

    said = await ctl(stack, "dlq", "drop", unreadable["dead_letter_id"], unheard["dead_letter_id"])
    assert (said.status, len(said.out.splitlines())) == (0, 2)
    assert (await ctl(stack, "dlq", "drop", "--all")).status == 2  # nobody is there to ask
    said = await ctl(stack, "dlq", "drop", "--all", "--yes", "--json")
    assert {answer["status"] for answer in said.lines} == {"dropped"}
    assert (await ctl(stack, "dlq", "list", "--json")).json == []


async def test_a_replay_does_what_had_failed_and_nothing_that_was_done(stack: Stack) -> None:
    lease = (await stack.allocate("ada")).json()
    await stack.database.execute("ALTER TABLE leases ADD CONSTRAINT test CHECK (ended_at IS NULL)")
    try:
        assert (await stack.release(lease["sandbox_id"], "ada")).status_code == 500
    finally:
        await stack.database.execute("ALTER TABLE leases DROP CONSTRAINT test")
    (letter,) = await dead(stack, 1)
    assert "CheckViolation" in letter["reason"]
    allocated = '{"commands": [{"type": "AllocateSandbox", "request_id": "r", "holder": "ada"}]}'
    carried_out: uuid.UUID = await stack.database.fetchval(
        "INSERT INTO dead_letters VALUES (gen_random_uuid(), now(), 'allocator.commands', 'why', '{}', NULL, NULL, "
        "NULL, $1) RETURNING dead_letter_id",
        allocated.encode(),
    )
    said = await ctl(stack, "dlq", "replay", letter["dead_letter_id"], str(carried_out))
    assert said.status == 0, said
    assert "is back in allocator.commands" in said.out
    assert "all its students have got a sandbox" in said.out
    await eventually(stack.nothing_pending)

    async def deleted() -> bool:
        return (await stack.stats())["deleted"] == 1

    await eventually(deleted)
    stats = await stack.stats()
    assert (stats["available"], stats["allocated"]) == (49, 0)
    assert await dead(stack, 0) == []
    again = await ctl(stack, "dlq", "replay", letter["dead_letter_id"], "--json")
    assert (again.status, again.error["code"]) == (1, "DEAD_LETTER_NOT_FOUND")


# What scripts are told


@pytest.mark.parametrize(
    ("arguments", "settings", "status", "said"),
    [
        (("sandbox", "unknown"), {}, 1, "SANDBOX_NOT_FOUND"),
        (("sandbox", "../stats"), {}, 1, "NOT_FOUND"),
        (("release", "unknown", "--reason", "why"), {}, 1, "SANDBOX_NOT_FOUND"),
        (("release", "unknown"), {}, 2, "--reason"),
        (("pool", "--by", "colour"), {}, 2, "colour"),
        (("nonsense",), {}, 2, "nonsense"),
        (("dlq", "replay"), {}, 2, "--all"),
        (("pool",), {"BROKER_ADMIN_TOKEN": "wrong"}, 2, "Check BROKER_ADMIN_TOKEN"),
        (("status",), {"BROKER_ADMIN_TOKEN": "wrong"}, 2, "Check BROKER_ADMIN_TOKEN"),
        (("pool",), {"BROKER_ADMIN_TOKEN": TRACK_TOKEN}, 2, "Check BROKER_ADMIN_TOKEN"),
        (("pool",), {"BROKER_ADMIN_TOKEN": ""}, 2, "BROKER_ADMIN_TOKEN is not set"),
        (("pool",), {"BROKER_API_URL": "nonsense"}, 2, "BROKER_API_URL must be like"),
        (("pool",), {"BROKER_API_URL": "http://127.0.0.1:1"}, 3, "No gateway answers at http://127.0.0.1:1"),
        (("pool",), {"BROKER_API_URL": "http://no-such-host.invalid"}, 3, "No gateway answers"),
    ],
    ids=str,
)
async def test_the_exit_status_says_what_stood_in_the_way_and_the_message_what_to_do(
    stack: Stack, arguments: tuple[str, ...], settings: dict[str, str], status: int, said: str
) -> None:
    found = await ctl(stack, *arguments, **settings)
    assert (found.status, found.out) == (status, "")
    assert said in found.err
    assert "wrong" not in found.err
    assert TRACK_TOKEN not in found.err


async def test_what_is_not_the_broker_is_told_apart(stack: Stack) -> None:
    said = await ctl(stack, "pool", url=stack.simulator)
    assert said.status == 3
    assert "is not the broker" in said.err


async def test_the_settings_may_come_from_a_file(stack: Stack, tmp_path: object) -> None:
    file = f"{tmp_path}/broker.env"
    with open(file, "w") as written:  # noqa: ASYNC230
        written.write(f"BROKER_API_URL={stack.url}/v1/\nBROKER_ADMIN_TOKEN='{ADMIN_TOKEN},another'\n")
    nothing = {"BROKER_API_URL": "", "BROKER_ADMIN_TOKEN": ""}
    assert (await ctl(stack, "--config", file, "pool", "--json", **nothing)).json["available"] == 50
    assert (await ctl(stack, "pool", "--json", **nothing, BROKERCTL_CONFIG=file)).json["available"] == 50
    assert (await ctl(stack, "--config", f"{file}.gone", "pool", **nothing)).status == 2


async def test_help_needs_no_settings_and_a_shell_completes(stack: Stack) -> None:
    nothing = {"BROKER_API_URL": "", "BROKER_ADMIN_TOKEN": ""}
    for arguments in ((), ("status",), ("dlq",), ("dlq", "replay")):
        said = await ctl(stack, *arguments, "--help", **nothing)
        assert (said.status, said.err) == (0, "")
    said = await ctl(
        stack,
        _BROKERCTL_COMPLETE="complete_bash",
        COMP_WORDS="brokerctl dlq re",
        COMP_CWORD="2",
        **nothing,
    )
    assert said.out.split() == ["replay"]
