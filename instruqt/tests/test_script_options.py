"""Options of the allocation scripts: standby, claim, extend, replace; BROKER_OUTPUT_DIR; commands of Instruqt."""

import json
from pathlib import Path

import pytest

from .conftest import CannedServer, Track, build_html_reply, build_json_reply, build_lease_reply, build_refusal
from .test_script_waiting import build_place_reply

HOLDER = "X-Instruqt-Sandbox-ID"
NEW_HOLDER = "X-New-Holder"
EXTENDED = build_json_reply(200, {"expires_at": 1728075723, "max_expires_at": 1728082923})


@pytest.fixture
def allocated_track(track: Track) -> Track:
    """Track with an allocated sandbox."""
    (track.directory / "sandbox_id.txt").write_text("2012224")
    return track


def add_command(track: Track, name: str, line: str) -> None:
    """Add a command to the host, as Instruqt does."""
    directory = track.directory.parent / "bin"
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(f"#!/bin/sh\n{line}\n")
    (directory / name).chmod(0o755)
    if not track.environment["PATH"].startswith(f"{directory}:"):
        track.environment["PATH"] = f"{directory}:{track.environment['PATH']}"


# Hot start


@pytest.mark.parametrize("unset", [None, "", "  "], ids=["unset", "empty", "blank"])
@pytest.mark.parametrize("variable", ["INSTRUQT__SANDBOX_ID", "_SANDBOX_ID"])
def test_a_standby_lease_without_participant_is_held_by_the_sandbox_of_instruqt(
    track: Track, broker: CannedServer, variable: str, unset: str | None
) -> None:
    run = track.allocate("--standby", INSTRUQT_PARTICIPANT_ID=unset, **{variable: "pooled-1"})
    assert (run.code, run.err) == (0, "")
    (call,) = broker.calls
    assert (call.path, call.headers[HOLDER], call.headers["X-Lease-Mode"]) == (
        "/v1/allocate",
        "pooled-1",
        "standby",
    )
    assert track.files()["holder_id.txt"] == "pooled-1"
    assert track.files()["sandbox_id.txt"] == "2012224"


def test_a_standby_lease_without_any_id_keeps_a_random_one(track: Track, broker: CannedServer) -> None:
    broker.replies = [build_refusal(400, "BAD"), build_lease_reply()]
    assert track.allocate("--standby", INSTRUQT_PARTICIPANT_ID=None).code == 1
    assert track.allocate("--standby", INSTRUQT_PARTICIPANT_ID=None).code == 0
    first, second = (call.headers[HOLDER] for call in broker.calls)
    assert first == second == track.files()["holder_id.txt"]
    assert first.startswith("standby-")
    assert len(first) > 30


def test_a_standby_lease_with_a_participant_is_theirs(track: Track, broker: CannedServer) -> None:
    assert track.allocate("--standby", _SANDBOX_ID="pooled-1").code == 0
    assert broker.calls[0].headers[HOLDER] == "student-1"
    assert "holder_id.txt" not in track.files()


def test_a_claim_gives_the_lease_to_the_participant(allocated_track: Track, broker: CannedServer) -> None:
    (allocated_track.directory / "holder_id.txt").write_text("pooled-1\n")
    broker.replies = [build_lease_reply(200)]
    run = allocated_track.allocate("--claim")
    assert (run.code, run.err) == (0, "")
    assert "claimed sandbox sandbox-1" in run.out
    (call,) = broker.calls
    assert (call.method, call.path) == ("POST", "/v1/sandboxes/2012224/claim")
    assert (call.headers[HOLDER], call.headers[NEW_HOLDER]) == ("pooled-1", "student-1")
    assert "Prefer" not in call.headers


@pytest.mark.parametrize("participant", [None, "", "pooled-1"])
def test_a_claim_without_another_participant_keeps_the_holder(
    allocated_track: Track, broker: CannedServer, participant: str | None
) -> None:
    (allocated_track.directory / "holder_id.txt").write_text("pooled-1")
    broker.replies = [build_lease_reply(200)]
    assert allocated_track.allocate("--claim", INSTRUQT_PARTICIPANT_ID=participant).code == 0
    assert broker.calls[0].headers[HOLDER] == "pooled-1"
    assert NEW_HOLDER not in broker.calls[0].headers


def test_a_claim_of_a_lease_of_the_participant_names_no_new_holder(
    allocated_track: Track, broker: CannedServer
) -> None:
    broker.replies = [build_lease_reply(200)]
    assert allocated_track.allocate("--claim").code == 0
    assert broker.calls[0].headers[HOLDER] == "student-1"
    assert NEW_HOLDER not in broker.calls[0].headers


def test_a_claim_after_the_end_of_the_lease_is_refused(allocated_track: Track, broker: CannedServer) -> None:
    broker.replies = [build_refusal(409, "LEASE_ENDED", "The lease has ended.")]
    run = allocated_track.allocate("--claim")
    assert run.code == 1
    assert "409 LEASE_ENDED: The lease has ended." in run.err


@pytest.mark.parametrize(
    ("owner", "asked"), [("student-1", ["student-1"]), ("pooled-1", ["student-1", "pooled-1"])], ids=str
)
def test_the_cleanup_releases_under_the_id_that_holds_the_lease(
    allocated_track: Track, broker: CannedServer, owner: str, asked: list[str]
) -> None:
    (allocated_track.directory / "holder_id.txt").write_text("pooled-1")
    refused = build_refusal(403, "NOT_SANDBOX_OWNER")
    released = build_json_reply(200, {"sandbox_id": "2012224", "status": "pending_deletion"})
    broker.replies = [released] if owner == "student-1" else [refused, released]
    run = allocated_track.clean_up()
    assert (run.code, run.err) == (0, "")
    assert [call.headers[HOLDER] for call in broker.calls] == asked


def test_the_cleanup_of_a_prepared_play_needs_no_participant(allocated_track: Track, broker: CannedServer) -> None:
    (allocated_track.directory / "holder_id.txt").write_text("pooled-1")
    broker.replies = [build_json_reply(200, {"sandbox_id": "2012224", "status": "pending_deletion"})]
    assert allocated_track.clean_up(INSTRUQT_PARTICIPANT_ID=None).code == 0
    assert broker.calls[0].headers[HOLDER] == "pooled-1"


# Extension and replacement


@pytest.mark.parametrize(("text", "number"), [("2", 2), ("0.5", 0.5), ("02", 2), ("1.50", 1.5)])
def test_an_extension_sends_the_hours_once(
    allocated_track: Track, broker: CannedServer, text: str, number: float
) -> None:
    broker.replies = [build_html_reply(503), EXTENDED]
    run = allocated_track.allocate("--extend", text)
    assert (run.code, run.err) == (0, "")
    assert "ends at 2024-10-04 21:02:03 UTC. Extensions are possible until 2024-10-04 23:02:03 UTC." in run.out
    assert [call.path for call in broker.calls] == ["/v1/sandboxes/2012224/extend"] * 2
    assert [json.loads(call.body) for call in broker.calls] == [{"hours": number}] * 2
    first, second = (call.headers["Idempotency-Key"] for call in broker.calls)
    assert first == second
    assert len(first) >= 32
    assert allocated_track.files() == {"sandbox_id.txt": "2012224"}


def test_a_refused_extension_ends_the_script(allocated_track: Track, broker: CannedServer) -> None:
    broker.replies = [build_refusal(409, "EXTENSION_LIMIT", "The lease is at its limit.")]
    run = allocated_track.allocate("--extend", "2")
    assert run.code == 1
    assert "409 EXTENSION_LIMIT: The lease is at its limit." in run.err


def test_a_replacement_writes_the_other_sandbox_and_says_so(allocated_track: Track, broker: CannedServer) -> None:
    broker.replies = [build_place_reply(1), build_lease_reply(201, sandbox_id="2012225")]
    run = allocated_track.allocate("--replace", ' DNS "is" broken \\ ')
    assert (run.code, run.err) == (0, "")
    assert "waiting in line at position 1" in run.out
    assert "THIS IS ANOTHER SANDBOX THAN BEFORE. The files named sandbox 2012224" in run.out
    call = broker.calls[-1]
    assert (call.path, json.loads(call.body)) == ("/v1/sandboxes/2012224/replace", {"reason": 'DNS "is" broken \\'})
    assert call.headers["Prefer"].startswith("respond-async, wait=")
    assert allocated_track.files()["sandbox_id.txt"] == "2012225"


@pytest.mark.parametrize("arguments", [("--claim",), ("--extend", "1"), ("--replace", "broken")], ids=str)
def test_an_option_for_a_lease_needs_the_files(
    track: Track, broker: CannedServer, arguments: tuple[str, ...]
) -> None:
    run = track.allocate(*arguments)
    assert run.code == 2
    assert "sandbox_id.txt is missing or empty" in run.err
    assert broker.calls == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("--extend",),
        ("--extend", "0"),
        ("--extend", "-1"),
        ("--extend", "soon"),
        ("--extend", "nan"),
        ("--replace",),
        ("--replace", " "),
        ("--replace", "x" * 501),
        ("--claim", "--standby"),
        ("--unknown",),
        ("surplus",),
    ],
    ids=lambda arguments: " ".join(arguments)[:30],
)
def test_wrong_arguments_end_the_script(track: Track, broker: CannedServer, arguments: tuple[str, ...]) -> None:
    run = track.allocate(*arguments)
    assert run.code == 2
    assert "usage" in run.err.lower()
    assert broker.calls == []


# Directory of the files


def test_the_files_are_in_the_output_directory(track: Track, broker: CannedServer) -> None:
    broker.replies = [
        build_lease_reply(),
        build_json_reply(200, {"sandbox_id": "2012224", "status": "pending_deletion"}),
    ]
    assert track.allocate(BROKER_OUTPUT_DIR="of the/broker").code == 0
    assert (track.directory / "of the" / "broker" / "sandbox_id.txt").read_text() == "2012224"
    assert track.files() == {}
    assert track.clean_up(BROKER_OUTPUT_DIR=str(track.directory / "of the" / "broker")).code == 0
    assert broker.calls[1].path == "/v1/sandboxes/2012224/mark-for-deletion"


def test_an_output_directory_that_cannot_be_created_prevents_the_request(
    track: Track, broker: CannedServer
) -> None:
    (track.directory / "file").write_text("")
    run = track.allocate(BROKER_OUTPUT_DIR="file/broker")
    assert run.code == 2
    assert "cannot write" in run.err
    assert broker.calls == []


# Commands of Instruqt


def test_the_variables_of_the_agent_are_set(track: Track, broker: CannedServer) -> None:
    log = track.directory.parent / "agent.log"
    add_command(track, "agent", f"printf '%s\\n' \"$*\" >>{log}")
    broker.replies = [build_lease_reply(name="it's; $HOME")]
    run = track.allocate()
    assert (run.code, run.err) == (0, "")
    assert log.read_text().splitlines() == [
        "variable set STUDENT_TENANT it's; $HOME",
        "variable set CSP_ACCOUNT_ID af06cbf7-b07c-4c4f-bfa4-bd7dd0e2d4c3",
        "variable set SANDBOX_ID 2012224",
    ]


def test_a_failing_agent_does_not_fail_the_allocation(track: Track, broker: CannedServer) -> None:
    add_command(track, "agent", "exit 127")
    run = track.allocate()
    assert (run.code, run.err) == (0, "")
    assert "agent failed, and the script goes on" in run.out
    assert track.files()["sandbox_id.txt"] == "2012224"


def test_a_failure_is_shown_to_the_student(track: Track, broker: CannedServer) -> None:
    log = track.directory.parent / "message.log"
    add_command(track, "fail-message", f"printf '%s' \"$1\" >{log}")
    broker.replies = [build_refusal(409, "POOL_EXHAUSTED", "No sandbox\nis left.")]
    assert track.allocate().code == 1
    assert log.read_text().startswith(
        "409 POOL_EXHAUSTED: No sandbox?is left. [request req-1]. Start the lab again"
    )


# A cleanup that never fails


@pytest.mark.parametrize("value", ["false", "False", " no ", "0"])
@pytest.mark.parametrize("fault", ["refusal", "no token", "unreadable"])
def test_a_lenient_cleanup_never_fails(
    allocated_track: Track, broker: CannedServer, fault: str, value: str
) -> None:
    broker.replies = [build_refusal(403, "NOT_SANDBOX_OWNER")]
    if fault == "unreadable":
        (allocated_track.directory / "sandbox_id.txt").unlink()
        (allocated_track.directory / "sandbox_id.txt").mkdir()
    token = None if fault == "no token" else allocated_track.environment["BROKER_API_TOKEN"]
    run = allocated_track.clean_up(CLEANUP_STRICT=value, BROKER_API_TOKEN=token)
    assert run.code == 0
    assert "ERROR:" in run.err


def test_an_unknown_strictness_is_named(allocated_track: Track, broker: CannedServer) -> None:
    run = allocated_track.clean_up(CLEANUP_STRICT="maybe")
    assert run.code == 2
    assert "CLEANUP_STRICT" in run.err


def test_no_secret_is_in_the_arguments_of_a_process(track: Track, broker: CannedServer) -> None:
    """The test of the log of each run covers the output; this one covers `ps`."""
    log = track.directory.parent / "curl.log"
    real = Path("/usr/bin/curl")
    add_command(track, "curl", f'printf \'%s \' "$@" >>{log}\nexec {real} "$@"')
    assert track.allocate().code == 0
    if track.shell:
        assert log.read_text()
        assert track.environment["BROKER_API_TOKEN"] not in log.read_text()
