"""brokerctl with a running broker: output, effects, and exit status for scripts."""

import asyncio
import json
import signal
import uuid

import aio_pika
import pytest

from devstack.conditions import wait_until
from devstack.ports import free_port
from sandbox_broker.contract import topology
from tests.integration.ctl import run_brokerctl, start_brokerctl, wait_for_status
from tests.integration.stack import ADMIN_TOKEN, TRACK_TOKEN, Stack


async def test_the_status_of_a_healthy_broker_fits_on_one_screen(stack: Stack) -> None:
    await stack.allocate("ada")
    result = await wait_for_status(stack, lambda result: result.status == 0)
    assert "Nothing needs attention." in result.out
    assert "49 available, 1 allocated" in result.out
    for part in ("gateway", "RabbitMQ", "PostgreSQL", "allocator", "reaper", "csp-syncer", "provisioner"):
        assert f"{part} up" in result.out
    for queue in topology.QUEUES:
        assert queue.name in result.out
    assert len(result.out.splitlines()) <= 24

    found = (await wait_for_status(stack, lambda result: result.status == 0, "--json")).json
    assert (found["pool"]["available"], found["gateway"]["state"], found["attention"]) == (49, "up", [])


async def test_status_reports_an_empty_pool_with_the_remedy(stack: Stack) -> None:
    await stack.fill(1)
    await stack.allocate("ada")
    result = await wait_for_status(stack, lambda result: "No sandbox is available" in result.out)
    assert result.status == 4
    assert "brokerctl sync" in result.out


async def test_watch_polls_until_it_is_interrupted(stack: Stack) -> None:
    watching = await start_brokerctl(stack.url, "watch", "--json", "--every", "0.1", "--within", "60")
    assert watching.stdout is not None
    for allocated in range(3):
        while (json.loads(await watching.stdout.readline())["pool"] or {}).get("allocated") != allocated:
            pass
        await stack.allocate(f"student-{allocated}")
    watching.send_signal(signal.SIGINT)
    await watching.communicate()
    assert watching.returncode == 0


async def test_watch_without_a_terminal_prints_a_line_per_poll(stack: Stack) -> None:
    watching = await start_brokerctl(stack.url, "watch", "--every", "0.1", "--within", "60", COLUMNS="20")
    assert watching.stdout is not None
    for allocated in range(3):
        while f" {allocated} allocated," not in (line := (await watching.stdout.readline()).decode()):
            assert line
        await stack.allocate(f"student-{allocated}")
    watching.send_signal(signal.SIGINT)
    await watching.communicate()
    assert watching.returncode == 0


async def test_pool_counts_and_lists_sandboxes(stack: Stack) -> None:
    lease = (await stack.allocate("ada", X_Instruqt_Track_ID="dns-101")).json()
    assert (await run_brokerctl(stack, "pool", "--json")).json["available"] == 49
    history = (await run_brokerctl(stack, "pool", "--hours", "1", "--json")).json
    assert history["step_sec"] == 30
    assert "waiting" in (await run_brokerctl(stack, "pool", "--hours", "1")).out
    held = (
        await run_brokerctl(stack, "leases", "--track", "dns-101", "--at", "2100-01-01T00:00:00", "--json")
    ).json
    assert [entry["holder"] for entry in held] == ["ada"]
    by_track = (await run_brokerctl(stack, "pool", "--by", "track_name", "--json")).json
    assert [(group["value"], group["allocated"]) for group in by_track["groups"]] == [("dns-101", 1)]
    assert "dns-101" in (await run_brokerctl(stack, "pool", "--by", "track_name")).out
    listed = (await run_brokerctl(stack, "pool", "--status", "allocated", "--json")).json
    assert [entry["sandbox_id"] for entry in listed] == [lease["sandbox_id"]]
    assert len((await run_brokerctl(stack, "pool", "--prefix", "sandbox-", "--limit", "7", "--json")).json) == 7
    assert lease["name"] in (await run_brokerctl(stack, "pool", "--track", "dns-101")).out


async def test_the_history_of_a_sandbox_and_of_a_student(stack: Stack) -> None:
    lease = (await stack.allocate("ada")).json()
    result = await run_brokerctl(stack, "release", lease["sandbox_id"], "--reason", "class ended", "--json")
    assert (result.status, result.json["status"]) == (0, "pending_deletion")
    await wait_until(stack.nothing_pending)

    details = (await run_brokerctl(stack, "sandbox", lease["sandbox_id"], "--json")).json
    assert [step["status"] for step in details["history"]] == [
        "available",
        "allocated",
        "pending_deletion",
        "deleted",
    ]
    shown = (await run_brokerctl(stack, "sandbox", lease["sandbox_id"])).out
    assert "sandbox.deletion_requested" in shown
    assert "class ended" in shown

    (lease_record,) = (await run_brokerctl(stack, "who", "ada", "--json")).json
    assert (lease_record["sandbox_id"], lease_record["end_note"]) == (lease["sandbox_id"], "class ended")
    assert lease["sandbox_id"] in (await run_brokerctl(stack, "who", "ada")).out
    assert "never had a sandbox" in (await run_brokerctl(stack, "who", "nobody")).out


async def test_an_operator_extends_a_lease_and_replaces_a_broken_sandbox(stack: Stack) -> None:
    broken = (await stack.allocate("ada", X_Lease_Mode="standby")).json()
    listed = (await run_brokerctl(stack, "pool", "--mode", "standby", "--json")).json
    assert [entry["sandbox_id"] for entry in listed] == [broken["sandbox_id"]]
    extend = ("extend", broken["sandbox_id"], "--hours", "9.5", "--reason", "exam")
    assert (await run_brokerctl(stack, *extend, "--json")).json["expires_at"] == broken["expires_at"] + 9.5 * 3600
    assert f"The lease of sandbox {broken['sandbox_id']} ends" in (await run_brokerctl(stack, *extend)).out

    replace = ("replace", broken["sandbox_id"], "--reason", "no DNS")
    first = await run_brokerctl(stack, *replace, "--json")
    assert first.json["sandbox_id"] != broken["sandbox_id"]
    expected = f"Sandbox {first.json['sandbox_id']} ({first.json['name']}) replaces {broken['sandbox_id']}."
    assert expected in (await run_brokerctl(stack, *replace)).out
    story = (await run_brokerctl(stack, "sandbox", broken["sandbox_id"])).out
    assert "sandbox.replaced" in story
    assert "no DNS" in story

    refused = await run_brokerctl(stack, "retry", broken["sandbox_id"], "--json")
    assert (refused.status, refused.error["code"]) == (1, "NOT_DELETION_FAILED")
    assert "end_hold=true" in refused.error["message"]
    ended = await run_brokerctl(stack, "retry", broken["sandbox_id"], "--end-hold")
    assert (ended.status, "is pending_deletion" in ended.out) == (0, True)
    await wait_until(stack.nothing_pending)

    for command in (extend, replace):
        refused = await run_brokerctl(stack, command[0], "1", *command[2:], "--json")
        assert (refused.status, refused.error["code"]) == (1, "SANDBOX_NOT_FOUND")


async def test_retry_repeats_a_permanently_failed_deletion(stack: Stack) -> None:
    await stack.database.execute(
        "UPDATE sandboxes SET status = 'deletion_failed', status_since = now(), deletion_attempts = 8, "
        "deletion_requested_at = now(), deletion_error = 'CSP answered 500' "
        "WHERE sandbox_id = (SELECT min(sandbox_id) FROM sandboxes)"
    )
    await wait_for_status(stack, lambda result: "deletion_failed" in result.out)
    (failed,) = (await run_brokerctl(stack, "pool", "--status", "deletion_failed", "--json")).json
    result = await run_brokerctl(stack, "retry", failed["sandbox_id"])
    assert result.status == 0
    assert "is pending_deletion" in result.out
    assert (await run_brokerctl(stack, "cleanup")).status == 0
    assert (await stack.stats())["deleted"] == 1
    result = await run_brokerctl(stack, "retry", failed["sandbox_id"], "--json")
    assert (result.status, result.error["code"]) == (1, "NOT_DELETION_FAILED")


async def test_a_held_sync_is_shown_before_it_is_forced(stack: Stack) -> None:
    assert (await run_brokerctl(stack, "sync", "--json")).json["synced"] == 50
    await stack.control("PATCH", "behaviour", {"listing_fraction": 0.5})
    result = await run_brokerctl(stack, "sync")
    assert result.status == 1
    assert "sandboxes would be" in result.out
    assert "brokerctl sync --force" in result.err
    assert (await run_brokerctl(stack, "sync", "--json")).error["code"] == "SYNC_HELD"
    result = await run_brokerctl(stack, "sync", "--show", "--json")
    assert result.status == 4
    assert result.json["held"]["stale"]["count"] > 20
    await wait_for_status(stack, lambda result: "listing is held" in result.out)

    refused = await run_brokerctl(stack, "sync", "--force")
    assert refused.status == 2
    assert "--yes" in refused.err
    assert (await stack.stats())["stale"] == 0
    assert (await run_brokerctl(stack, "sync", "--force", "--yes")).status == 0
    assert (await stack.stats())["stale"] > 20
    assert (await run_brokerctl(stack, "sync", "--show")).status == 0


async def test_a_sync_without_csp_has_the_exit_status_for_a_retry(stack: Stack) -> None:
    await stack.control("PATCH", "behaviour", {"fail_next_listings": 1})
    result = await run_brokerctl(stack, "sync", "--json")
    assert (result.status, result.error["code"]) == (3, "CSP_UNAVAILABLE")


async def test_cleanup_waits_for_a_long_job(stack: Stack) -> None:
    port = free_port()
    gateway = await stack.start_service(
        "gateway", name="impatient gateway", settings={"GATEWAY_PORT": str(port), "ADMIN_WAIT_SEC": "1"}
    )
    try:
        await stack.control("PATCH", "behaviour", {"delete_latency_sec": 1})
        leases = [(await stack.allocate(f"student-{number}")).json() for number in range(6)]
        await asyncio.gather(
            *(stack.release(lease["sandbox_id"], student) for lease, student in _with_students(leases))
        )
        result = await run_brokerctl(stack, "cleanup", "--json", url=f"http://127.0.0.1:{port}")
        assert result.status == 0, result
        assert result.json["status"] == "completed"
        assert (await stack.stats())["deleted"] == 6
    finally:
        await gateway.stop()


def _with_students(leases: list[dict[str, str]]) -> list[tuple[dict[str, str], str]]:
    return [(lease, f"student-{number}") for number, lease in enumerate(leases)]


# Dead letters


async def publish(stack: Stack, queue: topology.Queue, body: bytes, count: int = 1) -> None:
    connection = await aio_pika.connect(stack.environment["AMQP_URL"])
    async with connection, connection.channel() as channel:
        for number in range(count):
            message = aio_pika.Message(body, correlation_id=f"correlation-{number}")
            await channel.default_exchange.publish(message, queue.name)


async def wait_for_dead_letters(stack: Stack, count: int) -> list[dict[str, str]]:
    letters: list[dict[str, str]] = []

    async def has_arrived() -> bool:
        nonlocal letters
        letters = (await run_brokerctl(stack, "dlq", "list", "--json")).json
        return len(letters) == count

    await wait_until(has_arrived)
    return letters


async def test_dead_letters_are_listed_shown_and_dropped(stack: Stack) -> None:
    assert "no dead letters" in (await run_brokerctl(stack, "dlq", "list")).out
    queues = (topology.ALLOCATOR_COMMANDS, topology.ALLOCATOR_MAINTENANCE, topology.SYNCER_COMMANDS)
    for queue in (*queues, topology.REAPER_COMMANDS):
        await publish(stack, queue, b"nonsense \x1b[2J")
        await publish(stack, queue, b'{"commands": [{"type": "Unknown"}]}')
    letters = await wait_for_dead_letters(stack, 8)
    assert {(letter["service"], letter["queue"]) for letter in letters} == {
        ("allocator", "allocator.commands"),
        ("allocator", "allocator.maintenance"),
        ("csp-syncer", "csp-syncer.commands"),
        ("reaper", "reaper.commands"),
    }
    await wait_for_status(stack, lambda result: "8 messages could not be processed" in result.out)
    assert (await stack.allocate("ada")).status_code == 201  # dead letters do not block requests

    unreadable = next(letter for letter in letters if not letter["commands"])
    shown = await run_brokerctl(stack, "dlq", "show", unreadable["dead_letter_id"])
    assert "nonsense" in shown.out
    assert "\x1b" not in shown.out  # control characters of the message are escaped
    assert "not an envelope" in shown.out
    unknown_command = next(letter for letter in letters if letter["commands"])
    letter = (await run_brokerctl(stack, "dlq", "show", unknown_command["dead_letter_id"], "--json")).json
    assert json.loads(letter["payload"]) == {"commands": [{"type": "Unknown"}]}

    result = await run_brokerctl(
        stack, "dlq", "drop", unreadable["dead_letter_id"], unknown_command["dead_letter_id"]
    )
    assert (result.status, len(result.out.splitlines())) == (0, 2)
    assert (await run_brokerctl(stack, "dlq", "drop", "--all")).status == 2  # a script cannot confirm
    result = await run_brokerctl(stack, "dlq", "drop", "--all", "--yes", "--json")
    assert {answer["status"] for answer in result.lines} == {"dropped"}
    assert (await run_brokerctl(stack, "dlq", "list", "--json")).json == []


async def test_a_replay_executes_failed_commands_only(stack: Stack) -> None:
    lease = (await stack.allocate("ada")).json()
    await stack.database.execute("ALTER TABLE leases ADD CONSTRAINT test CHECK (ended_at IS NULL)")
    try:
        assert (await stack.release(lease["sandbox_id"], "ada")).status_code == 500
    finally:
        await stack.database.execute("ALTER TABLE leases DROP CONSTRAINT test")
    (letter,) = await wait_for_dead_letters(stack, 1)
    assert "CheckViolation" in letter["reason"]
    allocated = '{"commands": [{"type": "AllocateSandbox", "request_id": "r", "holder": "ada"}]}'
    carried_out: uuid.UUID = await stack.database.fetchval(
        "INSERT INTO dead_letters VALUES (gen_random_uuid(), now(), 'allocator.commands', 'why', '{}', NULL, NULL, "
        "NULL, $1) RETURNING dead_letter_id",
        allocated.encode(),
    )
    result = await run_brokerctl(stack, "dlq", "replay", letter["dead_letter_id"], str(carried_out))
    assert result.status == 0, result
    assert "is back in allocator.commands" in result.out
    assert "all its students have got a sandbox" in result.out
    await wait_until(stack.nothing_pending)

    async def deleted() -> bool:
        return (await stack.stats())["deleted"] == 1

    await wait_until(deleted)
    stats = await stack.stats()
    assert (stats["available"], stats["allocated"]) == (49, 0)
    assert await wait_for_dead_letters(stack, 0) == []
    again = await run_brokerctl(stack, "dlq", "replay", letter["dead_letter_id"], "--json")
    assert (again.status, again.error["code"]) == (1, "DEAD_LETTER_NOT_FOUND")


# Exit status and error messages


@pytest.mark.parametrize(
    ("arguments", "settings", "status", "result"),
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
async def test_an_error_has_its_exit_status_and_names_the_remedy(
    stack: Stack, arguments: tuple[str, ...], settings: dict[str, str], status: int, result: str
) -> None:
    found = await run_brokerctl(stack, *arguments, **settings)
    assert (found.status, found.out) == (status, "")
    assert result in found.err
    assert "wrong" not in found.err
    assert TRACK_TOKEN not in found.err


async def test_a_server_other_than_the_broker_is_detected(stack: Stack) -> None:
    result = await run_brokerctl(stack, "pool", url=stack.simulator)
    assert result.status == 3
    assert "it is not this broker's API" in result.err


async def test_settings_are_read_from_a_file(stack: Stack, tmp_path: object) -> None:
    file = f"{tmp_path}/broker.env"
    with open(file, "w") as config:  # noqa: ASYNC230
        config.write(f"BROKER_API_URL={stack.url}/v1/\nBROKER_ADMIN_TOKEN='{ADMIN_TOKEN},another'\n")
    no_settings = {"BROKER_API_URL": "", "BROKER_ADMIN_TOKEN": ""}
    assert (await run_brokerctl(stack, "--config", file, "pool", "--json", **no_settings)).json["available"] == 50
    assert (await run_brokerctl(stack, "pool", "--json", **no_settings, BROKERCTL_CONFIG=file)).json[
        "available"
    ] == 50
    assert (await run_brokerctl(stack, "--config", f"{file}.gone", "pool", **no_settings)).status == 2


async def test_help_and_shell_completion_need_no_settings(stack: Stack) -> None:
    no_settings = {"BROKER_API_URL": "", "BROKER_ADMIN_TOKEN": ""}
    for arguments in ((), ("status",), ("dlq",), ("dlq", "replay")):
        result = await run_brokerctl(stack, *arguments, "--help", **no_settings)
        assert (result.status, result.err) == (0, "")
    result = await run_brokerctl(
        stack,
        _BROKERCTL_COMPLETE="complete_bash",
        COMP_WORDS="brokerctl dlq re",
        COMP_CWORD="2",
        **no_settings,
    )
    assert result.out.split() == ["replay"]
