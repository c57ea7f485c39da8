"""Cleanup script: release, repeated runs, refusals and faulty files."""

import pytest

from .conftest import CannedServer, Reply, Track, build_html_reply, build_json_reply, build_refusal

RELEASED = build_json_reply(
    200, {"sandbox_id": "2012224", "status": "pending_deletion", "deletion_requested_at": 1728060000}
)


@pytest.fixture(autouse=True)
def reply_with_release(broker: CannedServer) -> None:
    broker.replies = [RELEASED]


@pytest.fixture
def allocated_track(track: Track) -> Track:
    """Track with an allocated sandbox."""
    (track.directory / "sandbox_id.txt").write_text("2012224")
    return track


def test_the_students_sandbox_is_released(allocated_track: Track, broker: CannedServer) -> None:
    run = allocated_track.clean_up()
    assert (run.code, run.err) == (0, "")
    assert "released sandbox 2012224 (status pending_deletion)" in run.out
    [call] = broker.calls
    assert (call.method, call.path) == ("POST", "/v1/sandboxes/2012224/mark-for-deletion")
    assert call.headers["Authorization"] == "Bearer s3cret-track-token"
    assert call.headers["X-Instruqt-Sandbox-ID"] == "student-1"


def test_a_second_cleanup_succeeds_and_keeps_the_files(allocated_track: Track, broker: CannedServer) -> None:
    assert allocated_track.clean_up().code == 0
    assert allocated_track.clean_up().code == 0
    assert len(broker.calls) == 2
    assert allocated_track.files() == {"sandbox_id.txt": "2012224"}


@pytest.mark.parametrize("content", [None, "", " \n"], ids=["missing", "empty", "blank"])
def test_a_cleanup_without_sandbox_succeeds_even_without_settings(
    track: Track, broker: CannedServer, content: str | None
) -> None:
    if content is not None:
        (track.directory / "sandbox_id.txt").write_text(content)
    run = track.clean_up(BROKER_API_TOKEN=None, INSTRUQT_PARTICIPANT_ID=None)
    assert (run.code, run.err) == (0, "")
    assert "nothing to clean up" in run.out
    assert broker.calls == []


def test_an_unknown_sandbox_is_success(allocated_track: Track, broker: CannedServer) -> None:
    broker.replies = [build_refusal(404, "SANDBOX_NOT_FOUND")]
    run = allocated_track.clean_up()
    assert (run.code, run.err) == (0, "")
    assert "the broker has no record of sandbox 2012224" in run.out


def test_the_sandbox_of_another_student_is_refused_at_once(allocated_track: Track, broker: CannedServer) -> None:
    broker.replies = [build_refusal(403, "NOT_SANDBOX_OWNER", "This sandbox is another student's.")]
    run = allocated_track.clean_up()
    assert run.code == 1
    assert "403 NOT_SANDBOX_OWNER: This sandbox is another student's." in run.err
    assert "Check that INSTRUQT_PARTICIPANT_ID" in run.err
    assert len(broker.calls) == 1


@pytest.mark.parametrize(
    "fault", [build_html_reply(status) for status in (403, 404, 200)], ids=["WAF", "ingress", "200"]
)
def test_a_faulty_response_is_retried_and_never_counts_as_success(
    allocated_track: Track, broker: CannedServer, fault: Reply
) -> None:
    broker.replies = [fault]
    run = allocated_track.clean_up(BROKER_TIMEOUT_SEC="0.2")
    assert run.code == 1
    assert "gave up at attempt 1" in run.err


def test_a_retry_releases_the_sandbox(allocated_track: Track, broker: CannedServer) -> None:
    broker.replies = [build_html_reply(503), RELEASED]
    assert allocated_track.clean_up().code == 0
    assert len(broker.calls) == 2


def test_a_missing_token_is_named(allocated_track: Track, broker: CannedServer) -> None:
    run = allocated_track.clean_up(BROKER_API_TOKEN=None)
    assert run.code == 2
    assert "BROKER_API_TOKEN environment variable not set" in run.err
    assert broker.calls == []


def test_the_id_is_percent_encoded_in_the_path(allocated_track: Track, broker: CannedServer) -> None:
    (allocated_track.directory / "sandbox_id.txt").write_text("../admin/sync?force=1#é\n")
    allocated_track.clean_up()
    assert broker.calls[0].path == "/v1/sandboxes/..%2Fadmin%2Fsync%3Fforce%3D1%23%C3%A9/mark-for-deletion"


def test_an_unreadable_file_is_named(track: Track, broker: CannedServer) -> None:
    (track.directory / "sandbox_id.txt").mkdir()
    run = track.clean_up()
    assert run.code == 2
    assert "cannot read sandbox_id.txt" in run.err
    assert broker.calls == []
