import pytest

from .conftest import CannedServer, Reply, Track, json_reply, page, refusal

RELEASED = json_reply(
    200, {"sandbox_id": "2012224", "status": "pending_deletion", "deletion_requested_at": 1728060000}
)


@pytest.fixture(autouse=True)
def released(broker: CannedServer) -> None:
    broker.replies = [RELEASED]


@pytest.fixture
def used(track: Track) -> Track:
    """A track whose student has a sandbox."""
    (track.directory / "sandbox_id.txt").write_text("2012224")
    return track


def test_the_students_sandbox_is_handed_back(used: Track, broker: CannedServer) -> None:
    run = used.clean_up()
    assert (run.code, run.err) == (0, "")
    assert "sandbox 2012224 is handed back (pending_deletion)" in run.out
    [call] = broker.calls
    assert (call.method, call.path) == ("POST", "/v1/sandboxes/2012224/mark-for-deletion")
    assert call.headers["Authorization"] == "Bearer s3cret-track-token"
    assert call.headers["X-Instruqt-Sandbox-ID"] == "student-1"


def test_cleaning_up_twice_is_success_and_the_files_stay(used: Track, broker: CannedServer) -> None:
    assert used.clean_up().code == 0
    assert used.clean_up().code == 0
    assert len(broker.calls) == 2
    assert used.files() == {"sandbox_id.txt": "2012224"}


@pytest.mark.parametrize("content", [None, "", " \n"], ids=["missing", "empty", "blank"])
def test_nothing_to_clean_up_is_success_even_without_settings(
    track: Track, broker: CannedServer, content: str | None
) -> None:
    if content is not None:
        (track.directory / "sandbox_id.txt").write_text(content)
    run = track.clean_up(BROKER_API_TOKEN=None, INSTRUQT_PARTICIPANT_ID=None)
    assert (run.code, run.err) == (0, "")
    assert "nothing to clean up" in run.out
    assert broker.calls == []


def test_a_sandbox_that_the_broker_does_not_know_is_nothing_to_clean_up(used: Track, broker: CannedServer) -> None:
    broker.replies = [refusal(404, "SANDBOX_NOT_FOUND")]
    run = used.clean_up()
    assert (run.code, run.err) == (0, "")
    assert "the broker does not know sandbox 2012224" in run.out


def test_a_404_from_something_else_is_not_taken_for_success(used: Track, broker: CannedServer) -> None:
    broker.replies = [page(404)]
    run = used.clean_up()
    assert run.code == 1
    assert "Check BROKER_API_URL" in run.err


def test_another_students_sandbox_is_refused_at_once(used: Track, broker: CannedServer) -> None:
    broker.replies = [refusal(403, "NOT_SANDBOX_OWNER", "This sandbox is another student's.")]
    run = used.clean_up()
    assert run.code == 1
    assert "403 NOT_SANDBOX_OWNER: This sandbox is another student's." in run.err
    assert "Check that INSTRUQT_PARTICIPANT_ID" in run.err
    assert len(broker.calls) == 1


@pytest.mark.parametrize("fault", [page(403), page(200)], ids=["WAF", "200 HTML"])
def test_a_fault_is_asked_again_and_never_taken_for_success(
    used: Track, broker: CannedServer, fault: Reply
) -> None:
    broker.replies = [fault]
    run = used.clean_up(BROKER_TIMEOUT_SEC="0.2")
    assert run.code == 1
    assert "gave up at attempt 1" in run.err


def test_a_retry_hands_the_sandbox_back(used: Track, broker: CannedServer) -> None:
    broker.replies = [page(503), RELEASED]
    assert used.clean_up().code == 0
    assert len(broker.calls) == 2


def test_a_missing_token_is_named(used: Track, broker: CannedServer) -> None:
    run = used.clean_up(BROKER_API_TOKEN=None)
    assert run.code == 2
    assert "BROKER_API_TOKEN environment variable not set" in run.err
    assert broker.calls == []


def test_the_id_cannot_leave_its_place_in_the_address(used: Track, broker: CannedServer) -> None:
    (used.directory / "sandbox_id.txt").write_text("../admin/sync?force=1#é\n")
    used.clean_up()
    assert broker.calls[0].path == "/v1/sandboxes/..%2Fadmin%2Fsync%3Fforce%3D1%23%C3%A9/mark-for-deletion"


def test_a_file_that_cannot_be_read_is_named(track: Track, broker: CannedServer) -> None:
    (track.directory / "sandbox_id.txt").mkdir()
    run = track.clean_up()
    assert run.code == 2
    assert "cannot read sandbox_id.txt" in run.err
    assert broker.calls == []
