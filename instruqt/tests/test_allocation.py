"""Allocation script: request headers, files, refusals and faulty responses."""

import stat
from pathlib import Path

import pytest

from .conftest import (
    LEASE,
    SCRIPTS,
    SECRET_FILE,
    CannedServer,
    Reply,
    Track,
    build_json_reply,
    build_lease_reply,
    build_refusal,
)

ALLOCATION_SCRIPT = SCRIPTS / "instruqt_broker_allocation.py"
AS_ANOTHER_USER = "os.geteuid = lambda: 12345"
FILES = {
    "sandbox_id.txt": "2012224",
    "external_id.txt": "af06cbf7-b07c-4c4f-bfa4-bd7dd0e2d4c3",
    "sandbox_name.txt": "sandbox-1",
    "sandbox_env.sh": "export STUDENT_TENANT=sandbox-1"
    " CSP_ACCOUNT_ID=af06cbf7-b07c-4c4f-bfa4-bd7dd0e2d4c3 SANDBOX_ID=2012224\n",
}


def test_a_new_lease_is_written_to_exactly_four_files_besides_the_secret(
    track: Track, broker: CannedServer
) -> None:
    run = track.allocate()
    assert (run.code, run.err) == (0, "")
    assert "allocated sandbox sandbox-1" in run.out
    assert track.files() == FILES


def test_the_request_contains_student_track_and_prefix(track: Track, broker: CannedServer) -> None:
    run = track.allocate(INSTRUQT_TRACK_SLUG="dns-101", SANDBOX_NAME_PREFIX="lab-adventure")
    assert run.code == 0
    [call] = broker.calls
    assert (call.method, call.path, call.body) == ("POST", "/v1/allocate", b"")
    assert call.headers["Authorization"] == "Bearer s3cret-track-token"
    assert call.headers["X-Instruqt-Sandbox-ID"] == "student-1"
    assert call.headers["X-Instruqt-Track-ID"] == "dns-101"
    assert call.headers["X-Sandbox-Name-Prefix"] == "lab-adventure"
    assert call.headers["User-Agent"].startswith("instruqt_broker_allocation/")


@pytest.mark.parametrize("blank", [None, "  "])
def test_blank_optional_headers_are_omitted(track: Track, broker: CannedServer, blank: str | None) -> None:
    assert track.allocate(INSTRUQT_TRACK_SLUG=blank, SANDBOX_NAME_PREFIX=blank).code == 0
    [call] = broker.calls
    assert "X-Instruqt-Track-ID" not in call.headers
    assert "X-Sandbox-Name-Prefix" not in call.headers


def test_a_repeated_run_replaces_the_files_and_reports_the_existing_lease(
    track: Track, broker: CannedServer
) -> None:
    (track.directory / "sandbox_id.txt").write_text("from an earlier run")
    broker.replies = [build_lease_reply(200)]
    run = track.allocate()
    assert run.code == 0
    assert "already holds" in run.out
    assert track.files() == FILES


@pytest.mark.parametrize("status", [200, 201])
def test_a_rerun_says_in_capitals_that_it_received_another_sandbox(
    track: Track, broker: CannedServer, status: int
) -> None:
    (track.directory / "sandbox_id.txt").write_text("2012223\n")
    broker.replies = [build_lease_reply(status)]
    run = track.allocate()
    assert run.code == 0
    assert "THIS IS ANOTHER SANDBOX THAN BEFORE. The files named sandbox 2012223" in run.out
    assert track.files() == FILES


@pytest.mark.parametrize("earlier", [None, b"", b"2012224\n"], ids=["first run", "empty file", "same sandbox"])
def test_a_run_with_the_sandbox_of_the_files_mentions_no_other(
    track: Track, broker: CannedServer, earlier: bytes | None
) -> None:
    if earlier is not None:
        (track.directory / "sandbox_id.txt").write_bytes(earlier)
    run = track.allocate()
    assert (run.code, run.err) == (0, "")
    assert "ANOTHER" not in run.out


@pytest.mark.parametrize("earlier", [b"\xff\xfe", b"\x1b[31m" + b"x" * 5000], ids=["no UTF-8", "long"])
def test_an_unusual_earlier_file_is_replaced(track: Track, broker: CannedServer, earlier: bytes) -> None:
    (track.directory / "sandbox_id.txt").write_bytes(earlier)
    run = track.allocate()
    assert (run.code, run.err) == (0, "")
    assert max(len(line) for line in run.out.splitlines()) < 1300
    assert "\x1b" not in run.out
    assert track.files() == FILES


def test_other_users_can_read_the_files(track: Track, broker: CannedServer) -> None:
    track.allocate()
    paths = [path for path in track.directory.iterdir() if path.name != SECRET_FILE]
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {0o644}


@pytest.mark.parametrize(
    "name",
    [
        'it\'s "quoted"; $(touch pwned) `touch pwned` $HOME & # \\ !',
        "two\nlines\n",
        " -n tenänt ☃ ",
    ],
)
def test_the_shell_reads_any_name_unchanged(track: Track, broker: CannedServer, name: str) -> None:
    broker.replies = [build_lease_reply(name=name)]
    assert track.allocate().code == 0
    print_variables = r'source ./sandbox_env.sh && printf "%s\0" "$STUDENT_TENANT" "$CSP_ACCOUNT_ID" "$SANDBOX_ID"'
    run = track.run("bash", "-c", print_variables)
    assert run.out.split("\0") == [name, LEASE["external_id"], LEASE["sandbox_id"], ""]
    assert set(track.files()) == set(FILES)
    assert track.files()["sandbox_name.txt"] == name


def test_an_exhausted_pool_ends_the_script_with_advice(track: Track, broker: CannedServer) -> None:
    broker.replies = [build_refusal(409, "POOL_EXHAUSTED", "No available sandboxes in pool", retry_after=30)]
    run = track.allocate(BROKER_TIMEOUT_SEC="120")
    assert run.code == 1
    assert "409 POOL_EXHAUSTED: No available sandboxes in pool [request req-1]" in run.err
    assert "when other students have finished" in run.err
    assert "SANDBOX_NAME_PREFIX" in run.err
    assert len(broker.calls) == 1
    assert track.files() == {}


@pytest.mark.parametrize(
    "changes",
    [
        {"sandbox_id": 2012224},
        {"sandbox_id": " "},
        {"external_id": ""},
        {"name": ""},
        {"name": "nul\0"},
        {"name": "\ud800"},
    ],
    ids=str,
)
def test_an_incomplete_lease_writes_no_file(track: Track, broker: CannedServer, changes: dict[str, object]) -> None:
    broker.replies = [build_lease_reply(201, **changes)]
    run = track.allocate(BROKER_TIMEOUT_SEC="0.2")
    assert run.code == 1
    assert "gave up" in run.err
    assert track.files() == {}


@pytest.mark.parametrize(
    "reply",
    [
        Reply(201),
        Reply(204),
        Reply(201, b"<html>Welcome to the hotel Wi-Fi</html>"),
        Reply(201, b"[" * 100_000),
        build_json_reply(200, ["a list"]),
        Reply(201, build_lease_reply().body[:-20], content_length=len(build_lease_reply().body)),
    ],
    ids=["empty", "no content", "html", "deep", "list", "truncated"],
)
def test_a_2xx_response_without_a_lease_is_retried_and_writes_no_file(
    track: Track, broker: CannedServer, reply: Reply
) -> None:
    broker.replies = [reply]
    run = track.allocate(BROKER_TIMEOUT_SEC="0.2")
    assert run.code == 1
    assert "gave up at attempt 1" in run.err
    assert track.files() == {}


def test_a_directory_in_place_of_a_file_prevents_the_request(track: Track, broker: CannedServer) -> None:
    (track.directory / "external_id.txt").mkdir()
    run = track.allocate()
    assert run.code == 2
    assert f"cannot replace {track.directory / 'external_id.txt'}: it is a directory." in run.err
    assert broker.calls == []
    assert track.files() == {}, "a temporary file was left behind"


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_user_in_a_sticky_directory_prevents_the_request(
    python_track: Track, broker: CannedServer, name: str
) -> None:
    (python_track.directory / name).write_text("2012223")
    python_track.directory.chmod(0o1777)
    run = python_track.run_patched(AS_ANOTHER_USER, ALLOCATION_SCRIPT)
    assert run.code == 2
    assert f"cannot replace {python_track.directory / name}: it belongs to another user" in run.err
    assert broker.calls == []
    assert python_track.files() == {name: "2012223"}


@pytest.mark.parametrize("mode", [0o777, 0o1777], ids=["foreign file", "foreign sticky directory without files"])
def test_a_directory_of_another_user_is_usable_if_the_files_can_be_replaced(
    python_track: Track, broker: CannedServer, mode: int
) -> None:
    if mode == 0o777:
        (python_track.directory / "sandbox_id.txt").write_text("2012224")
    python_track.directory.chmod(mode)
    run = python_track.run_patched(AS_ANOTHER_USER, ALLOCATION_SCRIPT)
    assert (run.code, run.err) == (0, "")
    assert python_track.files() == FILES


def test_a_platform_without_unix_functions_loses_no_lease(python_track: Track, broker: CannedServer) -> None:
    (python_track.directory / "sandbox_id.txt").write_text("2012224")
    run = python_track.run_patched("del os.fchmod, os.fchown, os.geteuid, os.getuid, os.umask", ALLOCATION_SCRIPT)
    assert (run.code, run.err) == (0, "")
    assert python_track.files() == FILES


def test_a_full_disk_leaves_the_old_files_intact(python_track: Track, broker: CannedServer) -> None:
    (python_track.directory / "sandbox_id.txt").write_text("old")
    run = python_track.allocate(launcher=("bash", "-c", 'ulimit -f 0 && exec "$@"', "bash"))
    assert run.code == 2
    assert f"cannot write {python_track.directory}: File too large" in run.err
    assert python_track.files() == {"sandbox_id.txt": "old"}, "a temporary file was left behind"


def test_an_unwritable_directory_prevents_the_request(track: Track, broker: CannedServer) -> None:
    track.directory = Path("/proc")
    run = track.allocate()
    assert run.code == 2
    assert "cannot write /proc" in run.err
    assert broker.calls == []


def test_a_deleted_directory_prevents_the_request(track: Track, broker: CannedServer) -> None:
    run = track.allocate(launcher=("bash", "-c", 'mkdir here && cd here && rmdir ../here && exec "$@"', "bash"))
    assert run.code == 2
    assert "cannot write the working directory" in run.err
    assert broker.calls == []
