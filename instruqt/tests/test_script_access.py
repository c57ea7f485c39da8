"""Option --access of the allocation scripts: the login inside the sandbox, its files, and the wait for it."""

import stat

import pytest

from .conftest import CannedServer, Track, build_json_reply, build_lease_reply, build_refusal

PASSWORD = "Ab1!#%+-=?@_x"
LOGIN = {
    "status": "ready",
    "email": "student-1@labs.example.com",
    "password": PASSWORD,
    "user_id": "user-1",
    "login_url": "https://csp.example.com",
}
READY = build_json_reply(200, LOGIN)
PENDING = build_json_reply(202, {"status": "pending", "retry_after": 0.01})
FAILED = build_json_reply(200, {"status": "failed", "reason": "CSP refuses the sign-in."})
FILES = ("user_email.txt", "user_password.txt", "user_id.txt", "user_credentials.sh")


def test_the_login_is_written_to_files_of_the_user_only(track: Track, broker: CannedServer) -> None:
    broker.replies = [build_lease_reply(), READY]
    run = track.allocate("--access")
    assert (run.code, run.err) == (0, "")
    allocation, request = broker.calls
    assert allocation.headers["X-Sandbox-Access"] == "user"
    assert (request.method, request.path, request.body) == ("GET", "/v1/sandboxes/2012224/access", b"")
    for header in ("X-Instruqt-Sandbox-ID", "X-Lease-Secret"):
        assert request.headers[header] == allocation.headers[header]
        assert request.headers[header]
    files = track.files()
    assert {name: files[name] for name in FILES[:3]} == {
        "user_email.txt": "student-1@labs.example.com",
        "user_password.txt": PASSWORD,
        "user_id.txt": "user-1",
    }
    assert files["user_credentials.sh"] == (
        "export CSP_USER_EMAIL=student-1@labs.example.com CSP_USER_PASSWORD='Ab1!#%+-=?@_x' CSP_USER_ID=user-1"
        " CSP_LOGIN_URL=https://csp.example.com\n"
    )
    modes = {name: stat.S_IMODE((track.directory / name).stat().st_mode) for name in (*FILES, "sandbox_id.txt")}
    assert modes == {**dict.fromkeys(FILES, 0o600), "sandbox_id.txt": 0o644}
    assert PASSWORD not in run.out


def test_without_the_option_no_login_is_asked_for(track: Track, broker: CannedServer) -> None:
    assert track.allocate().code == 0
    (call,) = broker.calls
    assert "X-Sandbox-Access" not in call.headers
    assert not set(FILES) & set(track.files())


def test_a_pending_login_is_waited_for(track: Track, broker: CannedServer) -> None:
    broker.replies = [build_lease_reply(), PENDING, PENDING, READY]
    run = track.allocate("--access")
    assert run.code == 0
    assert [call.method for call in broker.calls] == ["POST", "GET", "GET", "GET"]
    assert "waiting for the login inside sandbox 2012224" in run.out


def test_the_wait_ends_after_its_limit(track: Track, broker: CannedServer) -> None:
    broker.replies = [build_lease_reply(), PENDING]
    run = track.allocate("--access", BROKER_ACCESS_SEC="0.2")
    assert run.code == 1
    assert "the login was not ready after the 0.2 s of BROKER_ACCESS_SEC" in run.err
    assert track.files()["sandbox_id.txt"] == "2012224"


def test_a_failed_login_ends_with_the_reason(track: Track, broker: CannedServer) -> None:
    broker.replies = [build_lease_reply(), FAILED]
    run = track.allocate("--access")
    assert run.code == 1
    assert "there is no login inside the sandbox yet: CSP refuses the sign-in. Run this again later." in run.err
    assert not set(FILES) & set(track.files())


@pytest.mark.parametrize(
    ("status", "code", "advice"),
    [
        (404, "ACCESS_NOT_REQUESTED", "allocate it with --access"),
        (410, "ACCESS_ENDED", "Allocate a sandbox first."),
        (403, "NOT_SANDBOX_OWNER", "token for tracks"),
    ],
)
def test_a_refusal_gives_advice(track: Track, broker: CannedServer, status: int, code: str, advice: str) -> None:
    broker.replies = [build_lease_reply(), build_refusal(status, code)]
    run = track.allocate("--access")
    assert run.code == 1
    assert code in run.err
    assert advice in run.err


def test_an_outage_during_the_wait_is_retried(track: Track, broker: CannedServer) -> None:
    broker.replies = [build_lease_reply(), build_refusal(503, "DATABASE_UNAVAILABLE"), READY]
    assert track.allocate("--access").code == 0
    assert len(broker.calls) == 3


def test_a_claim_with_access_fetches_the_login_of_the_standby_lease(track: Track, broker: CannedServer) -> None:
    broker.replies = [build_lease_reply(), READY]
    assert track.allocate("--standby", "--access", INSTRUQT_PARTICIPANT_ID=None, _SANDBOX_ID="pooled-1").code == 0
    allocation, request = broker.calls
    assert (allocation.headers["X-Lease-Mode"], allocation.headers["X-Sandbox-Access"]) == ("standby", "user")
    assert request.headers["X-Instruqt-Sandbox-ID"] == "pooled-1"
    broker.calls.clear()
    broker.replies = [build_lease_reply(200), build_refusal(403, "NOT_SANDBOX_OWNER"), READY]
    run = track.allocate("--access", "--claim")
    assert (run.code, run.err) == (0, "")
    assert [call.path for call in broker.calls] == [
        "/v1/sandboxes/2012224/claim",
        *["/v1/sandboxes/2012224/access"] * 2,
    ]


def test_a_replacement_with_access_fetches_the_new_login(track: Track, broker: CannedServer) -> None:
    (track.directory / "sandbox_id.txt").write_text("2012224")
    broker.replies = [build_lease_reply(sandbox_id="2012225"), READY]
    assert track.allocate("--replace", "no DNS", "--access").code == 0
    assert broker.calls[1].path == "/v1/sandboxes/2012225/access"
