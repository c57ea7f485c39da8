import stat
from pathlib import Path

import pytest

from .conftest import LEASE, CannedServer, Reply, Track, json_reply, lease, refusal

FILES = {
    "sandbox_id.txt": "2012224",
    "external_id.txt": "af06cbf7-b07c-4c4f-bfa4-bd7dd0e2d4c3",
    "sandbox_name.txt": "sandbox-1",
    "sandbox_env.sh": "export STUDENT_TENANT=sandbox-1"
    " CSP_ACCOUNT_ID=af06cbf7-b07c-4c4f-bfa4-bd7dd0e2d4c3 SANDBOX_ID=2012224\n",
}


def test_a_new_lease_is_written_to_four_files_and_nothing_else(track: Track, broker: CannedServer) -> None:
    run = track.allocate()
    assert (run.code, run.err) == (0, "")
    assert "allocated sandbox sandbox-1" in run.out
    assert track.files() == FILES


def test_the_request_carries_the_student_the_track_and_the_prefix(track: Track, broker: CannedServer) -> None:
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
def test_optional_headers_are_left_out_when_blank(track: Track, broker: CannedServer, blank: str | None) -> None:
    assert track.allocate(INSTRUQT_TRACK_SLUG=blank, SANDBOX_NAME_PREFIX=blank).code == 0
    [call] = broker.calls
    assert "X-Instruqt-Track-ID" not in call.headers
    assert "X-Sandbox-Name-Prefix" not in call.headers


def test_a_repeat_replaces_the_files_and_says_that_the_sandbox_is_the_same(
    track: Track, broker: CannedServer
) -> None:
    (track.directory / "sandbox_id.txt").write_text("of an earlier run")
    broker.replies = [lease(200)]
    run = track.allocate()
    assert run.code == 0
    assert "already holds" in run.out
    assert track.files() == FILES


def test_the_files_can_be_read_by_other_users(track: Track, broker: CannedServer) -> None:
    track.allocate()
    assert {stat.S_IMODE(path.stat().st_mode) for path in track.directory.iterdir()} == {0o644}


@pytest.mark.parametrize(
    "name",
    [
        'it\'s "quoted"; $(touch pwned) `touch pwned` $HOME & # \\ !',
        "two\nlines\n",
        " -n tenänt ☃ ",
    ],
)
def test_any_name_survives_the_shell(track: Track, broker: CannedServer, name: str) -> None:
    broker.replies = [lease(name=name)]
    assert track.allocate().code == 0
    show = r'source ./sandbox_env.sh && printf "%s\0" "$STUDENT_TENANT" "$CSP_ACCOUNT_ID" "$SANDBOX_ID"'
    run = track.run("bash", "-c", show)
    assert run.out.split("\0") == [name, LEASE["external_id"], LEASE["sandbox_id"], ""]
    assert set(track.files()) == set(FILES)
    assert track.files()["sandbox_name.txt"] == name


def test_an_exhausted_pool_is_refused_at_once_with_what_to_do(track: Track, broker: CannedServer) -> None:
    broker.replies = [refusal(409, "POOL_EXHAUSTED", "No available sandboxes in pool", retry_after=30)]
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
    broker.replies = [lease(201, **changes)]
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
        json_reply(200, ["a list"]),
        Reply(201, lease().body[:-20], claims=len(lease().body)),
    ],
    ids=["empty", "no content", "html", "deep", "list", "truncated"],
)
def test_a_success_that_is_not_a_lease_counts_as_a_fault_and_writes_no_file(
    track: Track, broker: CannedServer, reply: Reply
) -> None:
    broker.replies = [reply]
    run = track.allocate(BROKER_TIMEOUT_SEC="0.2")
    assert run.code == 1
    assert "gave up at attempt 1" in run.err
    assert track.files() == {}


def test_a_directory_in_the_place_of_a_file_is_named(track: Track, broker: CannedServer) -> None:
    (track.directory / "external_id.txt").mkdir()
    run = track.allocate()
    assert run.code == 2
    assert str(track.directory / "external_id.txt") in run.err
    assert track.files() == {"sandbox_id.txt": "2012224"}, "no temporary file stays"


def test_a_full_disk_leaves_the_old_files_whole(track: Track, broker: CannedServer) -> None:
    (track.directory / "sandbox_id.txt").write_text("old")
    run = track.allocate("bash", "-c", 'ulimit -f 0 && exec "$@"', "bash")
    assert run.code == 2
    assert f"cannot write {track.directory}: File too large" in run.err
    assert track.files() == {"sandbox_id.txt": "old"}, "no temporary file stays"


def test_no_sandbox_is_taken_when_the_directory_is_not_writable(track: Track, broker: CannedServer) -> None:
    track.directory = Path("/proc")
    run = track.allocate()
    assert run.code == 2
    assert "cannot write /proc" in run.err
    assert broker.calls == []


def test_no_sandbox_is_taken_when_the_directory_is_gone(track: Track, broker: CannedServer) -> None:
    run = track.allocate("bash", "-c", 'mkdir here && cd here && rmdir ../here && exec "$@"', "bash")
    assert run.code == 2
    assert "cannot write the working directory" in run.err
    assert broker.calls == []
