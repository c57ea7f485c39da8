"""Lease secret: created before the first request, kept for the user only, and sent by every command."""

import re
import stat

import pytest

from .conftest import SECRET_FILE, CannedServer, Track, build_json_reply, build_lease_reply, build_refusal

HEADER = "X-Lease-Secret"
EXTENDED = build_json_reply(200, {"expires_at": 1728075723, "max_expires_at": 1728082923})
RELEASED = build_json_reply(
    200, {"sandbox_id": "2012224", "status": "pending_deletion", "deletion_requested_at": 1728060000}
)


@pytest.mark.parametrize("arguments", [(), ("--standby",)])
def test_the_secret_exists_before_the_first_request(
    track: Track, broker: CannedServer, arguments: tuple[str, ...]
) -> None:
    broker.replies = [build_refusal(400, "BAD")]
    assert track.allocate(*arguments).code == 1
    path = track.directory / SECRET_FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert re.fullmatch("[0-9a-f]{64}", path.read_text())
    (call,) = broker.calls
    assert call.headers[HEADER] == path.read_text()


def test_every_command_sends_the_secret_of_the_allocation(track: Track, broker: CannedServer) -> None:
    broker.replies = [build_lease_reply(), build_lease_reply(200), EXTENDED, build_lease_reply(200), RELEASED]
    runs = [
        track.allocate(),
        track.allocate(),
        track.allocate("--extend", "1"),
        track.allocate("--claim"),
        track.clean_up(),
    ]
    assert [run.code for run in runs] == [0] * 5
    secret = (track.directory / SECRET_FILE).read_text()
    assert [call.headers[HEADER] for call in broker.calls] == [secret] * 5
    assert not any(secret in run.out + run.err for run in runs)


def test_two_tracks_have_different_secrets(track: Track, broker: CannedServer) -> None:
    track.allocate()
    (track.directory / SECRET_FILE).unlink()
    track.allocate()
    first, second = (call.headers[HEADER] for call in broker.calls)
    assert first != second


def test_a_lease_of_an_earlier_script_is_released_without_a_secret(track: Track, broker: CannedServer) -> None:
    (track.directory / "sandbox_id.txt").write_text("2012224")
    broker.replies = [RELEASED]
    assert track.clean_up().code == 0
    assert HEADER not in broker.calls[0].headers
    assert not (track.directory / SECRET_FILE).exists()


@pytest.mark.parametrize("content", ["", "short", "x" * 200, "\x1b" * 20])
def test_a_damaged_secret_is_replaced_by_the_allocation(track: Track, broker: CannedServer, content: str) -> None:
    (track.directory / SECRET_FILE).write_text(content)
    assert track.allocate().code == 0
    secret = (track.directory / SECRET_FILE).read_text()
    assert re.fullmatch("[0-9a-f]{64}", secret)
    assert broker.calls[0].headers[HEADER] == secret


def test_an_unreadable_secret_ends_the_script_with_advice(track: Track, broker: CannedServer) -> None:
    (track.directory / "sandbox_id.txt").write_text("2012224")
    (track.directory / SECRET_FILE).mkdir()
    for run in (track.allocate("--extend", "1"), track.clean_up()):
        assert run.code == 2
        assert f"cannot read {SECRET_FILE}" in run.err
        assert "as the user who allocated the sandbox" in run.err
    assert broker.calls == []
